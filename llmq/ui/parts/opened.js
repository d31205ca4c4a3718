() => {
  // What an address asks of the page itself: autorun=1, view=outliers, fit or lab, embed=1. Which part of the Outliers
  // tab is open, `part`, the server says; the Lab's is opened here as soon as it is there.
  const asked = new URLSearchParams(window.location.search);
  const view = asked.get("view");
  const views = ["compare", "outliers", "fit", "lab"];
  // Where the window is narrow, the last tabs are in a menu, nameless but in order.
  const inMenu = () => [...document.querySelectorAll("#tabs > .tab-wrapper .overflow-dropdown button")]
    .at(views.indexOf(view) - views.length);
  if (views.includes(view)) (document.querySelector(`#tab-${view}-button`) || inMenu())?.click();
  const ofLab = (where, name) => [...document.querySelectorAll(`#lab-parts > .tab-wrapper ${where}`)]
    .find((tab) => tab.textContent.trim().toLowerCase() === name);
  const openPart = (name, tries) => {
    const tab = ofLab("[role=tab][id$=-button]", name) ?? ofLab(".overflow-dropdown button", name);
    if (tab) tab.click();
    else if (tries) setTimeout(() => openPart(name, tries - 1), 200);
  };
  if (view === "lab" && asked.get("part")) openPart(asked.get("part").toLowerCase(), 50);
  if (asked.get("embed") === "1") document.body.classList.add("llmq-embedded");
  if (asked.get("autorun") === "1") document.querySelector("#generate")?.click();
}
