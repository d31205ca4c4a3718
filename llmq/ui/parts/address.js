(link) => {
  // Gradio loads the page again after a lost connection: the address then says what the form said. It follows what a
  // person changes in the tab that is open, and makes no entry of the history; a recording's settings are not theirs.
  const asked = new URL(window.location.href);
  const said = link.startsWith("http") ? new URL(link).searchParams : asked.searchParams;
  if (said === asked.searchParams) said.delete("prompt"); // too long for a link
  const forms = { outliers: "#outliers-view", fit: "#fit-form" };
  const form = document.querySelector(forms[said.get("view")] || "#compare-view");
  const follows = form?.offsetParent && form.dataset.folded !== "true" && !document.body.matches(".llmq-embedded");
  if (!follows || !navigator.userActivation?.hasBeenActive) return;
  for (const name of ["__theme", "lesson", "live", "lang"]) { // of the page, not of a form
    if (asked.searchParams.has(name)) said.set(name, asked.searchParams.get(name));
  }
  asked.search = said;
  window.history.replaceState(window.history.state, "", asked);
}
