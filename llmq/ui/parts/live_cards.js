// Cards and the table of figures. All data reaches the page through textContent.
const part = (name) => element.querySelector(`[data-part="${name}"]`);

const CARD_FIELDS = [
  ["speed", "Decode speed"],
  ["first_token", "Time to first token"],
  ["tokens", "Tokens so far"],
  ["weights", "Weights"],
  ["peak", "Peak memory"],
];

const node = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
};

const setText = (target, text) => {
  if (target.textContent !== text) target.textContent = text;
};

const makeCard = ({ label }, index) => {
  const slots = { arithmetic: node("p", { class: "llmq-arithmetic" }), state_text: node("p", { class: "llmq-state" }),
    note: node("p", { class: "llmq-note" }) };
  const list = node("dl");
  for (const [name, title] of CARD_FIELDS) {
    slots[name] = node("dd", { "data-field": name });
    list.append(node("div", { "data-row": name }, node("dt", {}, title), slots[name]));
  }
  const root = node("article", { class: `llmq-card llmq-c${index}`, "aria-label": label }, node("h3", {}, label),
    slots.arithmetic, slots.state_text, list, slots.note);
  return { root, slots };
};

let cards = [];
const buildCards = (contestants) => {
  cards = contestants.map(makeCard);
  part("cards").replaceChildren(...cards.map((card) => card.root));
};

const fillCards = (value) => {
  value.cards.forEach((texts, index) => {
    const { root, slots } = cards[index];
    root.dataset.state = texts.state;
    for (const [name, slot] of Object.entries(slots)) setText(slot, texts[name]);
  });
  setText(part("status"), value.cards.map((card, i) => `${value.contestants[i].label}: ${card.state_text}`).join("; "));
};

// One column's figures from row `start` on; a row holds the time, then the columns, and may end before a late column.
const figures = ({ samples }, position, start = 0) => samples.slice(start).map((row) => row[position + 1] ?? null);

const fixed = (number) => number.toLocaleString("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });

// A contestant has two curves: its own tensors on the memory axis, and its speed.
const seriesTitle = ({ name, axis, contestant }, memory) => axis === "speed" ? `Decode speed: ${name}`
  : `${memory}: ${name}${contestant === null ? "" : " tensors"}`;

const tableRow = (column, points, memory) => {
  const known = points.filter((point) => point !== null);
  const row = node("tr", {}, node("th", { scope: "row" }, seriesTitle(column, memory)),
    node("td", {}, column.axis === "memory" ? "MB" : "tok/s"));
  const shown = known.length ? [Math.min(...known), Math.max(...known), known[known.length - 1]] : [];
  for (const number of shown) row.append(node("td", {}, fixed(number)));
  return row;
};

const fillTable = (value) => {
  if (!part("figures").open) return;
  part("rows").replaceChildren(...value.columns.map((column, position) =>
    tableRow(column, figures(value, position), value.memory)));
};
