// Rounding by hand, one loud number, and what weights weigh.
const coded = (numbers, scale) => numbers.map((x) => {
  const code = Math.max(-127, Math.min(127, Math.round(x / scale)));
  return { x, code, back: code * scale, error: Math.abs(code * scale - x) };
});
const bitsOf = (code) => [...(code & 255).toString(2).padStart(8, "0")];

const codeTable = (rows, loud = -1) => el("table", { class: "codes", "data-part": "codes" },
  el("thead", {}, el("tr", {}, ["number", "divided", "code", "back", "error"].map((name) => el("th", {}, say(`ui.col.${name}`))))),
  el("tbody", {}, rows.map((row, place) => el("tr", { class: place === loud ? "loud" : "" },
    [row.x, row.x / row.scale, row.code, row.back, row.error].map((value, i) => el("td", {}, i === 2 ? String(value) : written(value)))))));

EXHIBITS.round = (step, revealed) => {
  const numbers = [...step.data.numbers], place = el("div", { class: "stack" });
  let chosen = 0;
  const draw = () => {
    const scale = Math.max(...numbers.map(Math.abs), 1e-9) / 127;
    const rows = coded(numbers, scale).map((row) => ({ ...row, scale }));
    const { code } = rows[chosen];
    place.replaceChildren(...[
      el("p", { class: "rule" }, say("round.rule", { largest: Math.max(...numbers.map(Math.abs)), scale })),
      el("div", { class: "fields" }, numbers.map((x, i) => el("input", { type: "number", step: "any", value: x,
        "aria-label": say("ui.number"), onchange: (event) => { numbers[i] = Number(event.target.value) || 0; chosen = i; draw(); } }))),
      revealed ? codeTable(rows, chosen) : hidden(),
      revealed && el("p", {}, say("round.bits", { code, number: numbers[chosen] })),
      revealed && el("div", { class: "bits", role: "img", "aria-label": bitsOf(code).join("") },
        bitsOf(code).map((bit, i) => el("span", { class: `bit ${i ? "" : "sign"}`, "data-on": bit },
          el("b", {}, bit), el("small", {}, i ? String(2 ** (7 - i)) : "−128")))),
    ].filter(Boolean));
  };
  draw();
  return place;
};

EXHIBITS.absmax = (step, revealed) => {
  const { numbers, place: at, loud } = step.data, place = el("div", { class: "stack" });
  const draw = (largest) => {
    const all = numbers.map((x, i) => (i === at ? largest : x)), scale = Math.max(...all.map(Math.abs)) / 127;
    const rows = coded(all, scale).map((row) => ({ ...row, scale }));
    const others = rows.filter((_, i) => i !== at);
    place.replaceChildren(codeTable(rows, at), el("p", { class: "figure-line", "aria-live": "polite" }, say("absmax.now", {
      scale, codes: new Set(others.map((row) => row.code)).size, error: meanOf(others.map((row) => row.error)) })));
  };
  draw(revealed ? loud : 1);
  return el("div", { class: "stack" },
    revealed && slider(say("absmax.slider"), { min: 1, max: 100, step: 1, value: loud }, draw), place, !revealed && hidden());
};

EXHIBITS.fp16 = (step, revealed) => {
  const bits = Object.fromEntries(step.data.bits), rows = forTheLastRow(step.data.rows, (row) => row.model === step.values.model);
  const largest = Math.max(...rows.map((row) => row.bytes.fp16));
  return el("div", { class: "stack", "data-part": "bars" }, rows.map((row) => el("div", { class: "bar-group" },
    el("h3", {}, say("fp16.model", { model: row.model, parameters: row.parameters })),
    revealed ? Object.entries(row.bytes).map(([method, bytes]) => barRow(say("ui.bits", { bits: bits[method] }), bytes / largest,
      bytes < 1e9 ? written(bytes, "MB") : written(bytes, "GB"), `bits-${bits[method]}`)) : hidden())));
};
