// Draws what was watched, and holds the state of its tab: idle, running, done, opened.
const tab = element.closest(".llmq-view") || element;
const IDLE = { state: "idle", text: "", doing: "", note: "", banner: "" };
let shown = IDLE;
let settled = IDLE; // what stands again when a run is refused

const fold = (folded) => { tab.dataset.folded = folded; };

const draw = () => {
  const { state, asked, text, doing, fraction, note, banner } = shown;
  tab.dataset.state = state;
  if (state !== "idle") tab.dataset.shown = "true";
  part("banner").hidden = !banner;
  setText(part("banner"), banner || "");
  if (asked) {
    part("prompt").hidden = !asked.prompt;
    setText(part("prompt"), asked.prompt);
    setText(part("settings"), asked.settings);
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
  if (value.state !== "running") settled = value;
  draw();
};

const changed = () => {
  const value = props.value || IDLE;
  if (typeof value === "string") {
    show({ ...settled, text: value });
    fold(false);
  } else {
    show({ ...shown, ...value });
    if (value.state && value.state !== "idle") fold(true);
  }
};

// A click folds the form at once: what the server says of it may take a while under load.
const begin = () => {
  const prompt = document.querySelector("#outlier-prompt textarea")?.value ?? "";
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
watch("value", changed);
changed();
