// The nodes of one result: strip and panes. All text of prompts and models reaches the page through textContent.
// Figures with a row for every method: [key of the value's strip, field of its card, heading, its word in the glossary].
const FIGURES = [["memory", "weights", ["Memory", " of the weights"], "weight"],
  ["speed", "speed", ["speed", "", "Writing "], "tok/s"]];

// On a phone only the first of the words is shown.
const tileHeading = ([short, after = "", before = ""], word) => {
  const shown = term(short, { "data-word": word });
  shown.firstChild.after(node("span", { class: "llmq-wide" }, after));
  shown.prepend(node("span", { class: "llmq-wide" }, before));
  return node("dt", {}, shown);
};

const makeTile = (contestants, name, words, word) => {
  const change = node("dd", { class: "llmq-change", "data-figure": name });
  const rows = contestants.map(({ title }, index) => {
    const bar = node("span", { class: "llmq-bar" });
    const value = node("span", { class: "llmq-value" });
    const root = node("dd", { class: `llmq-row llmq-c${index}` }, node("span", { class: "llmq-name" }, title), bar, value);
    return { root, bar, value };
  });
  const root = node("dl", { class: "llmq-tile" }, tileHeading(words, word), change, ...rows.map((row) => row.root));
  return { root, change, rows };
};

const makeSame = () => {
  const count = node("dd", { class: "llmq-change", "data-figure": "same" });
  const more = node("span", { class: "llmq-wide" });
  const why = node("button", { type: "button", class: "llmq-quiet-link", "data-part": "show-why" }, "Why?");
  return { root: node("dl", { class: "llmq-tile" }, tileHeading(["Same words"], "token"), count,
    node("dd", { class: "llmq-row llmq-note" }, more, " ", why)), count, more, why };
};

const PANE_FIELDS = [["speed", "Writes"], ["first_token", "First token after"], ["weights", "Weights"],
  ["peak", "Peak memory"], ["tokens", "Tokens"]];

const makePane = ({ title, about }, index) => {
  const slots = { state_text: node("span", { class: "llmq-state" }), note: node("p", { class: "llmq-note" }) };
  const arithmetic = node("p", { class: "llmq-arithmetic" });
  const list = node("dl", {});
  for (const [name, shown] of PANE_FIELDS) {
    slots[name] = node("dd", { "data-field": name });
    list.append(node("div", {}, node("dt", {}, shown), slots[name]));
  }
  const text = node("div", { class: "llmq-text", role: "region", tabindex: "0", "aria-label": `What ${title} wrote`,
    dir: "auto", id: `pane-${index}` });
  const root = node("section", { class: `llmq-pane llmq-c${index}`, "aria-label": title },
    node("header", {}, node("h2", { title }, about ? term(title, { "data-says": about }) : title), slots.state_text),
    text, list, slots.note, arithmetic);
  return { root, slots, text, arithmetic };
};

// What cannot be seen gets a sign where it is marked: line breaks, and white space that stands alone.
const visible = (text) => (/^[^\S\n]+$/.test(text) ? text.replace(/\t/g, "⇥").replace(/[^\S⇥]/g, "␣") : text)
  .replace(/\r?\n/g, "⏎\n");

// The text of one pane out of pieces [text, kind], with a mark where the two texts part, if they do.
const pieces = (list, parted) => {
  const nodes = [];
  let marked = !parted;
  for (const [text, kind] of list) {
    if (!marked && kind !== "prefix") {
      nodes.push(node("span", { class: "llmq-first" }, "they part here"));
      marked = true;
    }
    const space = kind === "diff" && text.trim() ? text.match(/^ */)[0] : ""; // what differs is the word behind it
    nodes.push(space, kind === "diff" ? node("mark", {}, visible(text.slice(space.length))) : text);
  }
  if (!marked) nodes.push(node("span", { class: "llmq-first" }, "this one ends here"));
  return nodes;
};
