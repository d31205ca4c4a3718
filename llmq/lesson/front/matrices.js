// A small matrix and its scales, and the map of a real model's loud channels.
const loudMatrix = ({ matrix, row, column, loud }, where) => matrix.map((line, i) => line.map((x, j) => (
  (where === "row" ? i === row : j === column) ? x * loud : x)));

// Each number back from its code; `scales`: "one" for the matrix, or "rows". Columns in `apart` stay as they are.
const roundMatrix = (matrix, scales, apart = new Set()) => {
  const inside = (line) => line.filter((_, j) => !apart.has(j)).map(Math.abs);
  const largest = Math.max(...matrix.flatMap(inside), 1e-9);
  return matrix.map((line) => {
    const scale = (scales === "rows" ? Math.max(...inside(line), 1e-9) : largest) / 127;
    return line.map((x, j) => (apart.has(j) ? x : Math.round(x / scale) * scale));
  });
};

const matrixTable = (matrix, back, kindOf) => el("table", { class: "matrix", "data-part": "matrix" }, el("tbody", {},
  matrix.map((line, i) => el("tr", {}, line.map((x, j) => {
    const error = Math.abs(back[i][j] - x) / Math.max(Math.abs(x), 1e-9);
    return el("td", { class: kindOf(i, j), style: { "--error": Math.min(1, error).toFixed(3) } },
      el("b", {}, written(x)), el("small", {}, written(back[i][j])));
  })))));

const errorOf = (matrix, back, counted) => meanOf(matrix.flatMap((line, i) => line.flatMap((x, j) => (
  counted(i, j) ? [Math.abs(back[i][j] - x)] : []))));

EXHIBITS.vectorwise = (step, revealed) => {
  const { data } = step, place = el("div", { class: "stack" });
  let where = revealed ? "column" : "row", scales = "rows";
  const loud = (i, j) => (where === "row" ? i === data.row : j === data.column);
  const draw = () => {
    const matrix = loudMatrix(data, where), back = roundMatrix(matrix, scales);
    place.replaceChildren(
      matrixTable(matrix, back, (i, j) => (loud(i, j) ? "loud" : "")),
      el("p", { class: "figure-line", "aria-live": "polite" }, say("vectorwise.now", { error: errorOf(matrix, back, (i, j) => !loud(i, j)) })));
  };
  draw();
  return el("div", { class: "stack" },
    choiceOf(say("vectorwise.loud"), [["row", say("vectorwise.row")], ["column", say("vectorwise.column")]], where, (name) => { where = name; draw(); }),
    revealed && choiceOf(say("vectorwise.scales"), [["one", say("vectorwise.one")], ["rows", say("vectorwise.rows")]], scales, (name) => { scales = name; draw(); }),
    place, el("p", { class: "quiet" }, say("ui.matrix")), !revealed && hidden());
};

EXHIBITS.decomposition = (step, revealed) => {
  const { data } = step, matrix = loudMatrix(data, "column"), place = el("div", { class: "stack" });
  const draw = (threshold) => {
    const apart = new Set(matrix[0].map((_, j) => j).filter((j) => matrix.some((line) => Math.abs(line[j]) >= threshold)));
    const back = roundMatrix(matrix, "rows", apart);
    place.replaceChildren(
      matrixTable(matrix, back, (_, j) => (apart.has(j) ? "apart" : "")),
      el("p", { class: "figure-line", "aria-live": "polite" }, say("decomposition.now", {
        columns: apart.size, error: errorOf(matrix, back, (_, j) => j !== data.column) })));
  };
  draw(revealed ? data.threshold : 100);
  return el("div", { class: "stack" },
    revealed && slider(say("ui.threshold"), { min: 0.5, max: 70, step: 0.5, value: data.threshold }, draw),
    place, el("p", { class: "quiet" }, say("ui.matrix")), !revealed && hidden(),
    revealed && barRow(say("decomposition.all"), 1, written(step.values.columns)),
    revealed && barRow(say("decomposition.kept"), step.values.share, written(step.values.kept), "warm"));
};

const peaksOf = ({ sixteenths, width }) => {
  const bytes = Uint8Array.from(atob(sixteenths), (letter) => letter.charCodeAt(0)), view = new DataView(bytes.buffer);
  return Array.from({ length: bytes.length / 2 / width }, (_, row) => Array.from({ length: width },
    (_, column) => view.getUint16(2 * (row * width + column), true) / 16));
};
const ramp = (name, place) => getComputedStyle(document.documentElement).getPropertyValue(`--llmq-${name}-${place}`).trim() || "#888";

EXHIBITS.outliers = (step, revealed) => {
  if (!revealed) return el("div", { class: "stack" }, hidden());
  const { data } = step, rows = peaksOf(data), told = el("p", { class: "figure-line", "aria-live": "polite" });
  const canvas = el("canvas", { width: data.width, height: rows.length, class: "map", "data-part": "map", role: "img",
    "aria-label": say("outliers.map") });
  const pointed = el("p", { class: "quiet" }, say("outliers.point"));
  const around = at.presents ? 2 : 1;
  const draw = (threshold) => {
    const pen = canvas.getContext("2d"), under = [1, 4, 7, 9, 11].map((i) => ramp("under", i)), over = [2, 5, 8].map((i) => ramp("over", i));
    let loud = 0;
    const each = (draw) => rows.forEach((row, y) => row.forEach((x, channel) => draw(x, channel, y)));
    each((x, channel, y) => {
      pen.fillStyle = under[Math.min(4, Math.floor(5 * Math.sqrt(x / threshold)))];
      pen.fillRect(channel, y, 1, 1);
    });
    each((x, channel, y) => {
      if (x < threshold) return;
      loud += 1;
      pen.fillStyle = over[Math.min(2, Math.floor(Math.log2(x / threshold)))];
      pen.fillRect(channel - around, y, 2 * around + 1, 1); // a single dot of 576 is not seen from the last row
    });
    const channels = new Set(rows.flatMap((row) => row.flatMap((x, at) => (x >= threshold ? [at] : []))));
    told.textContent = say("outliers.now", { loud, all: rows.length * data.width, channels: channels.size, width: data.width });
  };
  canvas.addEventListener("pointermove", ({ offsetX, offsetY }) => {
    const at = Math.min(data.width - 1, Math.max(0, Math.floor((offsetX / canvas.clientWidth) * data.width)));
    const y = Math.min(rows.length - 1, Math.max(0, Math.floor((offsetY / canvas.clientHeight) * rows.length)));
    pointed.textContent = say("outliers.here", { layer: data.names[y][0], channel: at, value: rows[y][at] });
  });
  draw(data.threshold);
  return el("div", { class: "stack" },
    slider(say("ui.threshold"), { min: 2, max: 20, step: 0.5, value: data.threshold }, draw), canvas, told, pointed);
};
