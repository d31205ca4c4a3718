// Notices a question that ended without an answer: the server is done with it, and what is shown still waits for more.
// `turn()` is 0 where nothing is open, and another number for every question.
const LOST = "Interrupted: the server did not finish this. Try again.";
const GRACE = 1000; // milliseconds in which the last value may still come

const whenLost = (turn, lost) => {
  const { id } = element.parentElement.closest(".llmq-flush"); // Gradio gives the class to both, the name to the outer
  document.addEventListener("llmq-ended", ({ detail }) => {
    const ended = turn();
    if (detail === id && ended) setTimeout(() => { if (turn() === ended) lost(); }, GRACE);
  });
};
