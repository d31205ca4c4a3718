(prompt, model) => {
  // The prompt of one tab comes to the other. Where that one's form is folded it was asked something else: the form is
  // opened, so that nobody runs what is not seen.
  for (const box of document.querySelectorAll("#prompt textarea, #outlier-prompt textarea")) {
    const view = box.closest(".llmq-view");
    if (view && box.value !== prompt && !["running", "replaying"].includes(view.dataset.state)) view.dataset.folded = false;
  }
  return [prompt, model];
}
