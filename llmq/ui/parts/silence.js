// Draws what silencing one channel did; a click shows at once that it has begun.
let shown = {};
let asked = 0; // how often something was asked
let open = 0; // which of them has no end yet

const draw = (value) => {
  shown = { ...shown, ...value };
  const { lead, recorded, change, texts, said, running, doing, fraction } = shown;
  setText(part("lead"), lead || "");
  setText(part("doing"), doing || "");
  part("doing").setAttribute("aria-live", running ? "off" : "polite"); // a count is seen, not heard
  part("silence").hidden = Boolean(running);
  part("stop").hidden = part("bar").hidden = !running;
  if (!running || typeof fraction !== "number") part("bar").removeAttribute("value");
  else part("bar").value = fraction;
  part("outcome").hidden = !change;
  if (!change) return;
  setText(part("recorded"), recorded || "");
  setText(part("before"), change[0]);
  setText(part("after"), change[1]);
  part("texts").replaceChildren(...texts.map(([name, text]) =>
    node("div", {}, node("dt", {}, name), node("dd", { dir: "auto" }, text))));
  setText(part("said"), said || "");
};

const changed = () => {
  if (props.value.running === false) open = 0;
  draw(props.value);
};

part("silence").addEventListener("click", () => {
  open = ++asked;
  part("silence").hidden = true;
  part("stop").hidden = part("bar").hidden = false;
  part("stop").focus();
  setText(part("doing"), "Starting");
  trigger("submit");
});
part("stop").addEventListener("click", () => trigger("stop"));
whenLost(() => open, () => {
  open = 0;
  draw({ running: false, doing: LOST });
});
watch("value", changed);
changed();
