// Elements of the page. Whatever comes from a model or a person goes in as text, never as markup.
const SVG = new Set(["svg", "rect", "line", "text", "g"]);

const el = (tag, attributes = {}, ...children) => {
  const made = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "style") Object.entries(value).forEach(([rule, what]) => made.style.setProperty(rule, what));
    else if (value !== undefined && value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
};

const button = (label, act, attributes = {}) => el("button", { type: "button", onclick: act, ...attributes }, label);

// What a person keeps between visits; a browser that keeps nothing forgets it, and all still works.
const kept = (() => {
  const name = "llmq-lesson";
  let all = {};
  try { all = JSON.parse(localStorage.getItem(name)) || {}; } catch { all = {}; }
  return {
    get: (key, other) => (key in all ? all[key] : other),
    set: (key, value) => {
      all[key] = value;
      try { localStorage.setItem(name, JSON.stringify(all)); } catch { /* kept until the page is closed */ }
    },
  };
})();
