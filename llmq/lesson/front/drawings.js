// What every exhibit is made with. EXHIBITS[name](step, revealed, state) returns an element; a part that an answer is
// about has `data-part`, by which the card lights it up.
const EXHIBITS = {};

const bar = (share, label, attributes = {}) => el("div", { class: "bar", ...attributes },
  el("span", { class: "bar-fill", style: { "--share": `${Math.max(0.4, 100 * Math.min(1, share))}%` } }),
  el("span", { class: "bar-label" }, label));

const barRow = (name, share, label, kind = "") => el("div", { class: `bar-row ${kind}` },
  el("span", { class: "bar-name" }, name), bar(share, label));

const slider = (label, { min, max, step, value }, changed) => {
  const shown = el("output", {}, written(value));
  const range = el("input", { type: "range", min, max, step, value, "aria-label": label });
  range.addEventListener("input", () => { shown.textContent = written(Number(range.value)); changed(Number(range.value)); });
  return el("label", { class: "slider" }, el("span", {}, label), range, shown);
};

const choiceOf = (label, options, value, changed) => el("div", { class: "choice", role: "group", "aria-label": label },
  el("span", { class: "choice-name" }, label),
  options.map(([name, text]) => button(text, (event) => {
    for (const other of event.target.parentElement.querySelectorAll("button")) {
      other.setAttribute("aria-pressed", String(other === event.target));
    }
    changed(name);
  }, { "aria-pressed": String(name === value) })));

const hidden = () => el("p", { class: "covered" }, say(at.presents || CLASS.teacher ? "ui.coveredHere" : "ui.covered"));

// A projector shows few rows, large enough to be read from the last row of seats.
const forTheLastRow = (rows, needed) => (at.presents ? rows.filter(needed) : rows);

// Tokens as people see them: a line break is an arrow, a space at the edge is kept.
const tokenText = (text) => text.replaceAll("\n", "↵").replaceAll(" ", " ");
const tokenNode = (text, attributes = {}) => el("span", { class: "token", dir: "auto", ...attributes }, tokenText(text));
const meanOf = (values) => values.reduce((sum, x) => sum + x, 0) / values.length;
