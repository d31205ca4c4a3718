() => {
  // What an address asks of the page itself: autorun=1, view=outliers, part=what-if, embed=1 or sidebar=hidden.
  const asked = new URLSearchParams(window.location.search);
  const choose = (name, tries) => { // a tab's content comes when it is opened for the first time
    const tab = document.querySelector(`#${CSS.escape(name)}-button`);
    if (tab) tab.click();
    else if (tries) setTimeout(() => choose(name, tries - 1), 100);
  };
  const view = asked.get("view");
  const part = asked.get("part");
  if (view) choose(`tab-${view}`, 0);
  if (part) choose(`part-${part}`, 100);
  if (asked.get("embed") === "1") document.body.classList.add("llmq-embedded");
  if (asked.get("autorun") === "1") document.querySelector("#generate")?.click();
}
