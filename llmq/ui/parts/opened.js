() => {
  // What an address asks of the page itself: autorun=1, view=outliers, embed=1 or sidebar=hidden. Which part of the
  // Outliers tab is open, `part`, the server says: on a phone most of its tabs stand in a menu, without a name.
  const asked = new URLSearchParams(window.location.search);
  const view = asked.get("view");
  if (view) document.querySelector(`#tab-${CSS.escape(view)}-button`)?.click();
  if (asked.get("embed") === "1") document.body.classList.add("llmq-embedded");
  if (asked.get("autorun") === "1") document.querySelector("#generate")?.click();
}
