// Texts side by side, the mask, and what is left without one channel.
EXHIBITS.quiz = (step, revealed, state) => {
  const pair = step.data.pairs[state.pair], right = step.right[state.question];
  return el("div", { class: "stack", "data-part": "pair" },
    el("p", { class: "prompt" }, say("ui.prompt"), " ", el("q", { dir: "auto" }, pair.prompt)),
    el("div", { class: "pair" }, ["left", "right"].map((side, i) => el("section", { class: revealed && side === right ? "text int8" : "text" },
      el("h3", {}, say(`quiz.choice.${side}`), revealed ? ` · ${side === right ? "int8" : "FP16"}` : ""),
      el("p", { class: "model-text", dir: "auto" }, pair.texts[i])))));
};

EXHIBITS.transformer = (step, revealed) => {
  const { tokens, shape } = step.data, place = el("div", { class: "stack" });
  let at = Math.floor(tokens.length / 2) - 1;
  const draw = () => {
    const row = el("div", { class: "tokens", role: "group", "aria-label": say("transformer.tokens") }, tokens.map((token, i) => el("button", {
      type: "button", class: `token ${i === at ? "chosen" : i < at ? "seen" : revealed ? "unseen" : ""}`, dir: "auto",
      "aria-pressed": String(i === at), onclick: () => { at = i; draw(); } }, tokenText(token.text))));
    const size = tokens.length, mask = el("svg", { viewBox: `0 0 ${size} ${size}`, class: "mask", "data-part": "mask", role: "img",
      "aria-label": say("transformer.mask") }, tokens.flatMap((_, i) => tokens.map((_, j) => el("rect", { x: j + 0.06, y: i + 0.06,
      width: 0.88, height: 0.88, class: j > i && revealed ? "unseen" : i === at ? "chosen" : "seen" }))));
    place.replaceChildren(row, el("div", { class: "split" },
      revealed ? mask : hidden(),
      el("div", {}, el("h3", {}, say("transformer.next", { token: tokenText(tokens[at].text) })),
        tokens[at].next.map(({ text, share }) => barRow(tokenNode(text), share, written(share, "%"))))));
  };
  draw();
  const parts = ["embedding", "attention", "rope", "mlp", "norm", "head"];
  return el("div", { class: "stack" }, place, el("details", { class: "parts" }, el("summary", {}, say("transformer.parts")),
    el("dl", {}, parts.flatMap((name) => [el("dt", {}, say(`transformer.${name}`)), el("dd", {}, say(`transformer.${name}.says`, shape))]))));
};

EXHIBITS.silence = (step, revealed) => {
  const shown = revealed ? step.data.texts : step.data.texts.slice(0, 1);
  const largest = Math.log10(Math.max(...step.data.texts.map((row) => row.perplexity)));
  return el("div", { class: "stack", "data-part": "texts" }, shown.map((row) => el("section", { class: `text ${row.name}` },
    el("h3", {}, say(`silence.${row.name}`, { channel: row.channels[0] ?? "" })),
    barRow(say("ui.perplexity"), Math.log10(row.perplexity) / largest, written(row.perplexity, row.perplexity < 100 ? "" : "0"), row.name === "strongest" ? "warm" : ""),
    el("p", { class: "model-text", dir: "auto" }, row.text))), !revealed && hidden(), revealed && el("p", { class: "quiet" }, say("ui.logarithmic")));
};

EXHIBITS.parting = (step, revealed) => el("div", { class: "stack", "data-part": "parted" },
  el("p", { class: "prompt" }, say("ui.prompt"), " ", el("q", { dir: "auto" }, step.asked.prompt)),
  el("div", { class: "pair" }, step.data.texts.map((text, i) => el("section", { class: `text side-${i}` },
    el("h3", {}, methodName(text)), el("p", { class: "model-text", dir: "auto" }, text.before, el("mark", {}, text.after))))),
  revealed ? step.data.choices.map(([text, share], i) => barRow(
    el("span", {}, say(i ? "parting.second" : "parting.first"), " ", tokenNode(text)), share ?? 0, share === null ? "?" : written(share, "%"), `side-${i}`)) : hidden());
