// Bits as boxes: each is a button that turns over; below, what the fields say and the number that comes of them.
const NAMES = { fp16: "FP16", bf16: "BF16", e4m3: "FP8 E4M3", e5m2: "FP8 E5M2", int8: "int8 code", zeropoint: "Zero-point code" };
const PRESETS = { // codes worth a look
  fp16: [["1", 0x3c00], ["0.1", 0x2e66], ["largest", 0x7bff], ["smallest", 0x0001], ["infinity", 0x7c00], ["no number", 0x7e00]],
  bf16: [["1", 0x3f80], ["0.1", 0x3dcd], ["largest", 0x7f7f], ["smallest", 0x0001], ["infinity", 0x7f80], ["no number", 0x7fc0]],
  e4m3: [["1", 0x38], ["0.1", 0x1d], ["largest", 0x7e], ["smallest", 0x01], ["no number", 0x7f]],
  e5m2: [["1", 0x3c], ["0.1", 0x2e], ["largest", 0x7b], ["smallest", 0x01], ["infinity", 0x7c], ["no number", 0x7e]],
  int8: [["0", 0], ["1", 1], ["−1", 255], ["127", 127], ["−127", 129]],
  zeropoint: [["0", 0], ["127", 127], ["−128", 128]],
};
let format = "fp16";
let code = 0x3c00;

const isFloat = () => format in FLOATS;
const width = () => (isFloat() ? 1 + FLOATS[format].exponent + FLOATS[format].significand : 8);
const show = (x) => (Number.isNaN(x) ? "not a number" : Object.is(x, -0) ? "−0"
  : x.toPrecision(8).replace(/\.?0+($|e)/, "$1").replace("Infinity", "∞").replaceAll("-", "−"));
const binary = (x, digits) => x.toString(2).padStart(digits, "0");

const kindOf = (place) => {
  if (place === width() - 1) return "sign";
  if (!isFloat()) return "digit";
  return place >= FLOATS[format].significand ? "exponent" : "significand";
};

const box = (place) => {
  const kind = kindOf(place), on = (code >> place) & 1;
  const worth = isFloat() ? "" : `, counts ${place === 7 ? "−128" : 2 ** place}`;
  const made = node("button", { type: "button", class: `llmq-bit llmq-bit-${kind}`, "aria-pressed": String(Boolean(on)),
    "aria-label": `bit ${place}, ${kind}${worth}`, "data-place": place }, String(on));
  made.addEventListener("click", () => { code ^= 1 << place; draw(); focusOn(place); });
  return made;
};
const focusOn = (place) => part("boxes").querySelector(`[data-place="${place}"]`)?.focus();

const floatLines = () => {
  const { exponent: bits, significand: digits } = FLOATS[format];
  const { sign, exponent, significand } = fieldsOf(format, code), bias = 2 ** (bits - 1) - 1, x = decodeFloat(format, code);
  const lines = [`sign = ${sign}: ${sign ? "minus" : "plus"}`, `exponent = ${binary(exponent, bits)} = ${exponent}`,
    `significand = ${binary(significand, digits)} = ${significand} / ${2 ** digits}`];
  if (!Number.isFinite(x)) return [...lines, `this exponent is kept for what is no finite number: ${show(x)}`];
  const sum = exponent ? `(1 + ${significand} / ${2 ** digits}) × 2^(${exponent} − ${bias})`
    : `(${significand} / ${2 ** digits}) × 2^(1 − ${bias})`;
  return [...lines, `number = ${sign ? "−" : ""}${sum} = ${show(x)}`];
};

const integerLines = () => {
  const whole = decodeInteger(code), scale = Number(part("scale").value), zero = Number(part("zero").value);
  const bits = [...binary(code, 8)].map((bit, i) => (bit === "1" ? (i ? String(2 ** (7 - i)) : "−128") : "")).filter(Boolean);
  const lines = [`code = ${bits.join(" + ") || "0"} = ${show(whole)}`];
  if (!(scale > 0) || !Number.isFinite(zero)) return [...lines, "give a scale over 0 and a zero-point"];
  if (format === "int8") return [...lines, `number = code × scale = ${show(whole)} × ${show(scale)} = ${show(whole * scale)}`,
    ...(whole === -128 ? ["absmax rounding never makes this code: it uses −127 to 127"] : [])];
  return [...lines, `number = (code − zero) × scale = (${show(whole)} − ${zero < 0 ? `(${show(zero)})` : show(zero)}) × ${show(scale)} = ${show((whole - zero) * scale)}`];
};

const step = (by) => { code = (code + by + 2 ** width()) % 2 ** width(); draw(); };

const draw = () => {
  for (const choice of element.querySelectorAll('[name="llmq-format"]')) choice.checked = choice.value === format;
  part("boxes").replaceChildren(...Array.from({ length: width() }, (_, i) => box(width() - 1 - i)));
  part("boxes").setAttribute("aria-label", `Bits of ${NAMES[format]}`);
  part("affine").hidden = isFloat();
  part("zeros").hidden = format !== "zeropoint";
  for (const kind of element.querySelectorAll("[data-kind]")) {
    kind.hidden = !(isFloat() ? ["sign", "exponent", "significand"] : ["sign", "digit"]).includes(kind.dataset.kind);
  }
  setText(part("sum"), (isFloat() ? floatLines() : integerLines()).join("\n"));
  part("presets").replaceChildren(...PRESETS[format].map(([name, value]) => {
    const made = node("button", { type: "button", class: "llmq-button" }, name);
    made.addEventListener("click", () => { code = value; draw(); });
    return made;
  }));
};

for (const choice of element.querySelectorAll('[name="llmq-format"]')) {
  choice.addEventListener("change", () => { format = choice.value; [[, code]] = PRESETS[format]; draw(); });
}
part("boxes").addEventListener("keydown", (event) => {
  const by = { ArrowLeft: 1, ArrowRight: -1 }[event.key], place = Number(event.target.dataset.place);
  if (by) { event.preventDefault(); focusOn(place + by); }
});
for (const name of ["scale", "zero"]) part(name).addEventListener("input", draw);
part("less").addEventListener("click", () => step(-1));
part("more").addEventListener("click", () => step(1));
draw();
