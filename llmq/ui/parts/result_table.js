// The figures of the plot as a table.
// One column's figures from row `start` on; a row holds the time, then the columns, and may end before a late column.
const figures = ({ samples }, position, start = 0) => samples.slice(start).map((row) => row[position + 1] ?? null);

const fixed = (number) => number.toLocaleString("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });

// A contestant has two curves: its own tensors on the memory axis, and its speed.
const seriesTitle = ({ name, axis, contestant }, memory) => axis === "speed" ? `Writing speed: ${name}`
  : `${memory}: ${name}${contestant === null ? "" : " tensors"}`;

const tableRow = (column, points, memory) => {
  const known = points.filter((point) => point !== null);
  const row = node("tr", {}, node("th", { scope: "row" }, seriesTitle(column, memory)),
    node("td", {}, column.axis === "memory" ? "MB" : "tok/s"));
  const shown = known.length ? [Math.min(...known), Math.max(...known), known[known.length - 1]] : [];
  for (const number of shown) row.append(node("td", {}, fixed(number)));
  return row;
};

const fillTable = (value) => {
  if (!part("figures").open) return;
  part("rows").replaceChildren(...value.columns.map((column, position) =>
    tableRow(column, figures(value, position), value.memory)));
};
