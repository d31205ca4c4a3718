() => {
  // Underlines the words of the glossary in what the page shows, and explains one below it while it is pointed at,
  // touched or has the focus. `nodes.js` and `glossary.term` make such words, too.
  const terms = __TERMS__;
  const word = new RegExp(__WORD__, "gi");
  // What people and models wrote, what is clicked, and what changes several times a second stays as it is.
  const not = "button, a, summary, input, textarea, select, option, code, pre, svg, q, dd, td, h1, script, style, " +
    "label:has(> [type=radio]), label:has(> [type=checkbox]), [role=gridcell], [contenteditable], .wrap-inner, " +
    ".llmq-term, .llmq-text, .llmq-texts, .llmq-reading-text, .llmq-reading-about, .llmq-panes h3, .llmq-plot, " +
    ".llmq-name, .llmq-method-settings legend, .js-plotly-plot, .toast-wrap, #llmq-says";
  const whole = ".prose, .llmq-panes"; // in these a word is explained once, elsewhere once in each of these:
  const once = "table, dl, figure, p, li, h2, h3";

  const says = document.createElement("div");
  Object.assign(says, { id: "llmq-says", popover: "manual" });
  says.setAttribute("role", "tooltip");
  document.body.append(says);
  let told = null;

  const hide = () => {
    told?.removeAttribute("aria-describedby");
    told = null;
    says.hidePopover();
  };

  const show = (term) => {
    if (told === term) return;
    if (told) hide();
    told = term;
    says.textContent = term.dataset.says ?? terms[term.dataset.word];
    term.setAttribute("aria-describedby", says.id);
    says.showPopover();
    const { left, top, bottom } = term.getClientRects()[0];
    const { width, height } = says.getBoundingClientRect();
    says.style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`;
    says.style.top = `${bottom + height < innerHeight ? bottom : Math.max(0, top - height)}px`;
  };

  const termOf = (target) => target?.closest?.(".llmq-term");
  const held = () => termOf(document.activeElement);
  document.addEventListener("focusin", ({ target }) => termOf(target) && show(target));
  document.addEventListener("focusout", ({ target }) => termOf(target) && hide());
  document.addEventListener("pointerover", ({ target }) => {
    if (termOf(target)) show(termOf(target));
    else if (told && told !== held() && target !== says) hide();
  });
  document.addEventListener("keydown", ({ key }) => told && key === "Escape" && hide());
  document.addEventListener("scroll", ({ target }) => told && target.contains(told) && hide(),
    { capture: true, passive: true });
  document.addEventListener("click", (event) => { // a word in a label is no click on its field
    if (termOf(event.target)?.closest("label")) event.preventDefault();
  });

  const underlined = (shown) => Object.assign(document.createElement("span"),
    { className: "llmq-term", tabIndex: 0, textContent: shown });

  const explain = (text) => {
    const inside = text.parentElement;
    if (!inside || inside.closest(not)) return;
    const place = inside.closest(whole) ?? inside.closest(once) ?? inside;
    const known = new Set([...place.querySelectorAll(".llmq-term")].map(({ dataset }) => dataset.word));
    const pieces = [];
    let end = 0;
    for (const found of text.data.matchAll(word)) {
      const name = found[1].toLowerCase();
      if (known.has(name)) continue;
      known.add(name);
      const made = underlined(found[0]);
      made.dataset.word = name;
      pieces.push(text.data.slice(end, found.index), made);
      end = found.index + found[0].length;
    }
    if (end) text.replaceWith(...pieces, text.data.slice(end));
  };

  const textsIn = (node) => {
    if (node.nodeType === Node.TEXT_NODE) return [node];
    if (node.nodeType !== Node.ELEMENT_NODE || node.closest(not)) return [];
    const found = [], walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) if (walker.currentNode.data.trim()) found.push(walker.currentNode);
    return found;
  };

  let added = new Set();
  const explainAdded = () => {
    const nodes = added;
    added = new Set();
    for (const node of nodes) if (node.isConnected) textsIn(node).forEach(explain);
    if (told && !told.isConnected) hide();
  };
  new MutationObserver((changes) => {
    const idle = !added.size;
    for (const { addedNodes } of changes) addedNodes.forEach((node) => added.add(node));
    if (idle && added.size) requestAnimationFrame(explainAdded);
  }).observe(document.body, { childList: true, subtree: true });
  added.add(document.body);
  explainAdded();
}
