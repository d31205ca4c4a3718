(prompt, model, method, threshold, kind) => {
  const LONGEST = 4000; // characters of a prompt that a link can carry, as in Compare
  if ([...(prompt || "")].length > LONGEST) {
    return `The prompt has more than ${LONGEST.toLocaleString("en")} characters, too many for a link.`;
  }
  const shown = document.querySelector('#observatory [role="tab"][aria-selected="true"]');
  const part = (shown?.id || "").match(/^part-(.+)-button$/)?.[1] || "activations";
  const query = new URLSearchParams({ view: "outliers", part, prompt, model, method, threshold, kind });
  return `${window.location.origin}${window.location.pathname}?${query}`;
}
