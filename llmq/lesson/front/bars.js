// Speeds, the race of the methods, and what fits.
EXHIBITS.time = (step, revealed) => {
  if (!revealed) return el("div", { class: "stack" }, hidden());
  const largest = Math.max(...step.data.rows.map((row) => row.over));
  const stages = Object.entries(step.data.stages).filter(([, seconds]) => seconds), whole = stages.reduce((sum, [, seconds]) => sum + seconds, 0);
  return el("div", { class: "stack" },
    el("div", { class: "stack", "data-part": "speeds" }, ["hf", "lean"].map((loop) => el("div", { class: "bar-group" },
      el("h3", {}, say(`time.${loop}`)),
      step.data.rows.filter((row) => row.loop === loop).map((row) => barRow(methodName(row), row.over / largest,
        say(row.spread > 0.1 ? "time.spread" : "time.speed", { over: row.over, speed: row.speed, spread: row.spread }), row.method === "fp16" ? "side-0" : "side-1"))))),
    el("h3", {}, say("time.stages")),
    el("div", { class: "stages" }, stages.map(([name, seconds], i) => el("span", { class: `stage stage-${i}`, style: { "--share": `${(100 * seconds) / whole}%` } }))),
    el("p", { class: "legend" }, stages.map(([name, seconds], i) => el("span", {}, el("span", { class: `stage stage-${i}` }),
      `${say(`time.stage.${name}`)} ${written(seconds / whole, "%")}`))));
};

const SAID = ["awq", "absmax"]; // besides those of the question, by the answer
EXHIBITS.race = (step, revealed) => {
  if (!revealed) return el("div", { class: "stack" }, hidden());
  const low = -3, high = Math.log10(Math.max(...step.data.rows.map((row) => row.kl)));
  const named = [...step.questions.race, ...SAID];
  const rows = forTheLastRow([...step.data.rows].sort((one, other) => one.kl - other.kl), (row) => named.includes(row.method));
  return el("div", { class: "stack dense", "data-part": "bars" }, rows.map((row) => barRow(
    el("span", {}, methodName(row), " ", el("small", {}, written(row.bytes, "MB"))), (Math.log10(row.kl) - low) / (high - low),
    written(row.kl), row.method === step.right.race ? "best" : "")), el("p", { class: "quiet" }, say("race.axis")));
};

EXHIBITS.fit = (step, revealed) => {
  if (!revealed) return el("div", { class: "stack" }, hidden());
  const { cells, bits } = step.data, cards = [...new Set(cells.map((cell) => cell.card))], models = [...new Set(cells.map((cell) => cell.model))];
  const shown = forTheLastRow(models, (model) => model !== models[0]);
  const cellOf = (model, card) => cells.find((cell) => cell.model === model && cell.card === card);
  return el("div", { class: "stack" }, el("table", { class: "fits", "data-part": "table" },
    el("thead", {}, el("tr", {}, el("th", {}, ""), cards.map((card) => el("th", { scope: "col" }, card)))),
    el("tbody", {}, shown.map((model) => el("tr", {}, el("th", { scope: "row" }, model), cards.map((card) => el("td", {},
      bits.map(([method, width]) => { const [bytes, fits] = cellOf(model, card).needs[method];
        return el("div", { class: fits ? "room" : "not" }, el("span", {}, `${fits ? "✓" : "✗"} ${say("ui.bits", { bits: width })}`), el("small", {}, written(bytes, "GB"))); }))))))),
    el("p", { class: "quiet" }, say("fit.says", { tokens: cells[0].tokens })));
};
