// Draws the answer in `props.value`: the sentence, and a row for every method with its bar on the scale of all.
const CELLS = [["weights", "Weights", "weights"], ["kv", "KV cache", "kv"], ["workspace", "Workspace", "workspace"],
  ["total", "Total", ""], ["left", "Free left", ""]];
const VERDICTS = new Map([[true, ["✓ fits", "yes"]], [false, ["✕ does not fit", "no"]], [null, ["fit not known", "unknown"]]]);

const cell = (text, label, colour) => {
  const name = node("span", { class: "llmq-fit-label" }, label);
  if (colour) name.prepend(node("i", { class: `llmq-fit-${colour}` }));
  return node("td", { role: "cell" }, name, node("span", {}, text));
};

const fitRow = (row) => {
  const [verdict, kind] = VERDICTS.get(row.fits);
  const head = node("th", { role: "rowheader", scope: "row" }, node("span", { class: "llmq-fit-method" }, row.method), " ",
    node("span", { class: "llmq-fit-verdict" }, verdict));
  if (row.others) head.append(node("span", { class: "llmq-fit-others" }, `also ${row.others}`));
  const bar = node("div", { class: "llmq-fit-bar", "aria-hidden": "true" });
  row.shares.forEach((share, index) => {
    const piece = node("span", { class: `llmq-fit-${CELLS[index][2]}` });
    piece.style.width = `${share * 100}%`;
    bar.append(piece);
  });
  return node("tr", { role: "row", "data-fits": kind, "data-method": row.method }, head,
    node("td", { role: "cell", class: "llmq-fit-scale" }, bar),
    ...CELLS.map(([key, label, colour]) => cell(row.figures[key], label, colour)),
    cell(row.largest, "Longest context", ""), cell(row.batch, "Largest batch", ""));
};

const draw = () => {
  const { headline, failed, rows, end, usable, device, note } = props.value;
  const line = part("headline");
  setText(line, headline);
  line.dataset.failed = Boolean(failed);
  part("table").hidden = !rows.length;
  setText(part("note"), note || "");
  if (!rows.length) return;
  element.style.setProperty("--llmq-end", end);
  element.style.setProperty("--llmq-usable", usable);
  setText(part("scale"), `Card: ${device}`);
  part("rows").replaceChildren(...rows.map(fitRow));
};

watch("value", draw);
draw();
