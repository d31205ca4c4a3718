// Draws what was watched, and holds the state of its tab: idle, running, done, opened.
const tab = element.closest(".llmq-view") || element;
const IDLE = { state: "idle", text: "", doing: "", note: "", banner: "" };
let shown = IDLE;
let settled = IDLE; // what stands again when a run is refused
let asked = 0; // how often something was asked
let open = 0; // which of them has no end yet

const fold = (folded) => { tab.dataset.folded = folded; };

const draw = () => {
  const { state, text, doing, fraction, note, banner } = shown;
  if (document.activeElement === part("stop") && state !== "running") followFocus("change");
  tab.dataset.state = state;
  if (state === "idle") delete tab.dataset.shown;
  else tab.dataset.shown = "true";
  part("banner").hidden = !banner;
  setText(part("banner"), banner || "");
  if (shown.asked) {
    part("prompt").hidden = !shown.asked.prompt;
    setText(part("prompt"), shown.asked.prompt);
    setText(part("settings"), shown.asked.settings);
  }
  const line = part("text");
  line.setAttribute("aria-live", state === "running" && fraction ? "off" : "polite"); // a count is seen, not heard
  setText(line, (text || doing || "").replaceAll(" · ", "\u00a0· ")); // a method's name stays on one line
  setText(part("note"), state === "running" ? (text && doing) || "" : note || "");
  const bar = part("bar");
  bar.dataset.empty = state !== "running";
  if (fraction === null || fraction === undefined) bar.removeAttribute("value");
  else bar.value = fraction;
};

const show = (value) => {
  shown = value;
  if (value.state !== "running") [settled, open] = [value, 0];
  else if (!open) open = ++asked;
  draw();
};

const refuse = (value, text) => {
  show({ ...value, state: value.state === "running" ? "done" : value.state, doing: "", text });
  fold(false);
};

const changed = () => {
  const value = props.value || IDLE;
  if (value.state === "refused") {
    refuse(settled, value.text);
  } else if (!value.state && shown.state === "running" && !shown.text) {
    return; // the sentence of the run before this one, at another threshold
  } else {
    show({ ...shown, ...value });
    if (value.state && value.state !== "idle") fold(true);
  }
};

// A click folds the form at once: what the server says of it may take a while under load.
const begin = () => {
  const prompt = document.querySelector("#outlier-prompt textarea")?.value ?? "";
  open = ++asked;
  followFocus("stop");
  show({ ...IDLE, state: "running", asked: { prompt, settings: "" }, doing: "Starting" });
  fold(true);
};

document.addEventListener("click", ({ target }) => { if (target.closest("#watch")) begin(); });
document.addEventListener("keydown", ({ target, key, shiftKey }) => {
  if (target.closest("#outlier-prompt") && key === "Enter" && shiftKey) begin();
});
part("stop").addEventListener("click", () => trigger("stop"));
part("change").addEventListener("click", () => {
  fold(false);
  document.querySelector("#outlier-prompt textarea")?.focus();
});
part("again").addEventListener("click", () => document.querySelector("#watch")?.click());

fold(false);
whenLost(() => open, () => refuse(shown.text ? shown : settled, LOST));
watch("value", changed);
changed();
