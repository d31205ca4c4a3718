"""Classes of a lesson: a teacher who leads, students who follow and vote, and the one file that keeps both."""
