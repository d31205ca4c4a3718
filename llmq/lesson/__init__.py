"""The lesson: steps that ask, show a recorded answer and explain it, as files that a browser opens by itself."""
