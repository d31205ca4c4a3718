// The text that both methods read, token by token. Token text reaches the page through textContent only.
const part = (name) => element.querySelector(`[data-part="${name}"]`);
let chosen = -1;

const node = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

// What cannot be seen gets a sign.
const visible = (text) => (text === "" ? "∅" : /^[^\S\n]+$/.test(text)
  ? text.replace(/\t/g, "⇥").replace(/[^\S⇥]/g, "␣") : text.replace(/\r?\n/g, "⏎"));
const percent = (p) => (p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : `${(100 * p).toPrecision(2)} %`);
const level = (kl) => props.edges.filter((edge) => kl === null || kl >= edge).length;
const nats = (kl) => (kl === null ? "infinite" : `${kl.toPrecision(3)} nats`);

const guesses = (label, list, number) => {
  const box = node("section", `llmq-guesses llmq-c${number}`);
  const rows = node("ol");
  for (const [text, p] of list) {
    const row = node("li");
    row.append(node("span", "llmq-guess", visible(text)), node("span", "llmq-chance", percent(p)));
    row.style.setProperty("--llmq-share", `${100 * p}%`);
    rows.append(row);
  }
  box.append(node("h3", "", label), rows);
  return box;
};

const describe = (position) => {
  const token = props.value.tokens[position - props.value.first];
  if (!token) return;
  const [text, kl, rank, mine, yours] = token;
  const [own, other] = props.value.labels;
  const top = rank === 1 ? "same first choice" : `the first choice of ${own} is number ${rank} of ${other}`;
  part("about").textContent = `Token ${position}, “${visible(text)}”: KL ${nats(kl)}, ${top}.`;
  part("lists").replaceChildren(guesses(props.value.labels[0], mine, 0), guesses(props.value.labels[1], yours, 1));
};

const buttons = () => [...part("text").querySelectorAll("button")];

const choose = (button, tell) => {
  for (const other of buttons()) {
    other.tabIndex = other === button ? 0 : -1;
    if (tell) other.setAttribute("aria-pressed", other === button ? "true" : "false");
  }
  const position = Number(button.dataset.position);
  describe(position);
  if (!tell) return;
  chosen = position;
  trigger("select", { position });
};

const tokenButton = ([text, kl, rank], position) => {
  const made = node("button", `llmq-token llmq-kl${level(kl)}${rank === 1 ? "" : " llmq-other"}`, visible(text));
  made.type = "button";
  made.dataset.position = position;
  made.tabIndex = -1;
  made.setAttribute("aria-pressed", "false");
  return made;
};

const draw = () => {
  const value = props.value;
  const empty = !value || !value.tokens;
  part("legend").hidden = part("help").hidden = empty;
  part("summary").textContent = empty ? part("summary").dataset.placeholder : value.summary;
  part("about").textContent = "";
  part("lists").replaceChildren();
  const text = part("text");
  text.replaceChildren();
  chosen = -1;
  if (empty) return;
  text.append(node("span", "llmq-unread", visible(value.opening)));
  value.tokens.forEach((token, index) => {
    const position = value.first + index;
    if (position === value.continuation) text.append(node("span", "llmq-first", "answer"));
    text.append(tokenButton(token, position));
    if (token[0].includes("\n")) text.append(node("br"));
  });
  const all = buttons();
  if (all.length) all[0].tabIndex = 0;
};

part("text").addEventListener("mouseover", (event) => {
  const button = event.target.closest("button");
  if (button) describe(Number(button.dataset.position));
});
part("text").addEventListener("mouseleave", () => { if (chosen >= 0) describe(chosen); });
part("text").addEventListener("focusin", (event) => {
  const button = event.target.closest("button");
  if (button) choose(button, false);
});
part("text").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) choose(button, true);
});
part("text").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
  if (step === undefined) return;
  const all = buttons();
  const now = all.indexOf(document.activeElement);
  if (now < 0) return;
  event.preventDefault();
  all[Math.min(Math.max(now + step, 0), all.length - 1)].focus();
});

watch("value", draw);
draw();
