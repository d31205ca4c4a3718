// Builds the two texts out of spans. Token text reaches the page through textContent only.
const part = (name) => element.querySelector(`[data-part="${name}"]`);
const PLACEHOLDER = part("summary").textContent;

const node = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

// What cannot be seen gets a sign: line breaks always, other white space and empty tokens where they are all there is.
const visible = (text) => {
  if (text === "") return "∅";
  const signs = /^[^\S\n]+$/.test(text) ? text.replace(/\t/g, "⇥").replace(/[^\S⇥]/g, "␣") : text;
  return signs.replace(/\r?\n/g, "⏎\n");
};

const marker = (position, ended) => {
  const made = node("span", "llmq-diff-first");
  made.append(node("span", "llmq-diff-flag", `first difference, token ${position + 1}${ended ? ": ends here" : ""}`));
  return made;
};

const tokenNode = ([text, kind]) => {
  if (kind !== "diff") return document.createTextNode(text === "" ? "" : text.replace(/\r?\n/g, "⏎\n"));
  return node("mark", "llmq-diff-token", visible(text));
};

const textPane = (label, tokens, first, index) => {
  const pane = node("section", `llmq-diff-pane llmq-c${index}`);
  const body = node("p", "llmq-diff-text");
  tokens.forEach((token, position) => {
    if (position === first) body.append(marker(position, false));
    body.append(tokenNode(token));
  });
  if (first !== null && first >= tokens.length) body.append(marker(first, true));
  pane.append(node("h3", "", label), body);
  return pane;
};

const summary = ({ labels, tokens_a, tokens_b, first_divergence, aligned }) => {
  if (first_divergence === null) return `All ${tokens_a.length} tokens are the same in ${labels[0]} and ${labels[1]}.`;
  const rest = aligned ? "Underlined tokens differ; plain ones after the mark agree again."
    : "Too long to align: everything after the mark is underlined.";
  const start = first_divergence === 0 ? "The texts differ from the first token on."
    : `The first ${first_divergence} of ${Math.max(tokens_a.length, tokens_b.length)} tokens are the same.`;
  return `${start} ${rest}`;
};

const draw = () => {
  const value = props.value;
  if (!value || !value.labels) {
    part("summary").textContent = PLACEHOLDER;
    part("texts").replaceChildren();
    return;
  }
  part("summary").textContent = summary(value);
  const first = value.first_divergence;
  const [left, right] = value.panes;
  part("texts").replaceChildren(textPane(value.labels[0], value.tokens_a, first, left),
    textPane(value.labels[1], value.tokens_b, first, right));
  if (first === null) delete element.dataset.firstDivergence;
  else element.dataset.firstDivergence = first;
};

watch("value", draw);
draw();
