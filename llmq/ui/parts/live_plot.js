// The plot: two subplots in one plotly figure whose node is made once and then only extended.
const STACK_BELOW = 720; // pixels; narrower than this, the subplots stand one above the other
const DASHES = ["solid", "6px,3px", "2px,3px"];
const CONTEXT_DASHES = { device: "solid", process: "solid", device_process: "8px,4px", allocated: "2px,3px" };

const host = part("plot");
const colour = (name) => getComputedStyle(host).getPropertyValue(`--llmq-${name}`).trim();

const line = ({ key, contestant }) => contestant === null
  ? { color: colour("ink-soft"), width: 1.5, dash: CONTEXT_DASHES[key] }
  : { color: colour(`line-${contestant}`), width: 2, dash: DASHES[contestant % DASHES.length] };

const times = ({ samples }, start) => samples.slice(start).map((row) => row[0]);

// Memory travels in MB and is drawn in bytes, so that plotly writes the unit.
const heights = (value, position, start) => value.columns[position].axis === "speed" ? figures(value, position, start)
  : figures(value, position, start).map((megabytes) => megabytes === null ? null : megabytes * 1e6);

// The speed subplot begins with the first decode step: loading may take far longer than the run.
const firstDecode = ({ columns, samples }) => samples.findIndex((row) =>
  columns.some(({ axis }, position) => axis === "speed" && (row[position + 1] ?? null) !== null));

const makeTrace = (value, decodeStart) => (column, position) => {
  const speed = column.axis === "speed";
  const start = speed ? Math.max(0, decodeStart) : 0;
  const named = value.columns.findIndex((other) => other.name === column.name) === position;
  return {
    x: times(value, start), y: heights(value, position, start),
    name: column.name, legendgroup: column.name, showlegend: named,
    mode: "lines", line: line(column), connectgaps: false,
    visible: column.key === "process" ? "legendonly" : true, // it would flatten the curves of the methods
    xaxis: speed ? "x2" : "x", yaxis: speed ? "y2" : "y",
    hovertemplate: speed ? "%{y:.1f} tok/s" : "%{y:.4s}B",
  };
};

const axis = (extra) => ({
  gridcolor: colour("grid"), linecolor: colour("grid"), zerolinecolor: colour("grid"),
  tickfont: { color: colour("ink-soft") },
  fixedrange: host.clientWidth < STACK_BELOW, rangemode: "tozero", automargin: true, ...extra,
});

const heading = (text, x, y, xshift) => ({
  text, x, y, xref: "paper", yref: "paper", xanchor: "left", yanchor: "bottom", xshift, yshift: 6, showarrow: false,
  font: { size: 14, color: colour("ink") },
});

const speedTitle = (value) => firstDecode(value) >= 0
  ? "Writing speed, tokens per second" : "Writing speed: begins with the second token";

const makeLayout = (value) => {
  const stacked = host.clientWidth < STACK_BELOW;
  const left = stacked ? -36 : 0; // pixels from the axis, so that a phone shows the whole heading
  const seconds = {
    title: { text: "seconds since the start", font: { size: 12, color: colour("ink-soft") }, standoff: 6 },
    unifiedhovertitle: { text: "%{x:.1f} s" },
  };
  return {
    width: host.clientWidth, height: stacked ? 580 : 320, uirevision: value.run || "none",
    margin: { l: 48, r: 12, t: 36, b: 40 }, hovermode: "x unified", dragmode: stacked ? false : "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(host).fontFamily, size: 12, color: colour("ink") },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("ink-soft"), activecolor: colour("ink") },
    hoverlabel: { bgcolor: colour("surface"), bordercolor: colour("grid"), font: { color: colour("ink") } },
    legend: { orientation: "h", x: 0, y: stacked ? -0.14 : -0.24, yanchor: "top" },
    xaxis: axis({ ...seconds, domain: stacked ? [0, 1] : [0, 0.47], anchor: "y" }),
    yaxis: axis({ domain: stacked ? [0.6, 1] : [0, 1], tickformat: "~s", ticksuffix: "B" }),
    xaxis2: axis({ ...seconds, domain: stacked ? [0, 1] : [0.55, 1], anchor: "y2", rangemode: "normal" }),
    yaxis2: axis({ domain: stacked ? [0, 0.4] : [0, 1], anchor: "x2" }),
    annotations: [heading(value.memory === "VRAM" ? "VRAM over time" : "Memory of each method over time", 0, 1, left),
      heading(speedTitle(value), stacked ? 0 : 0.55, stacked ? 0.4 : 1, left)],
  };
};

// Without the two 'cloud' lines, plotly.js 4 offers a button that uploads the chart to another host.
const PLOT_OPTIONS = {
  displaylogo: false, responsive: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  showSendToCloud: false, plotlyServerURL: "",
};

let plotly = null;
let drawn = { run: null, columns: 0, points: 0, decodeStart: -1 };
let drawnWidth = 0; // pixels

const redrawPlot = (value) => {
  if (!plotly || !host.clientWidth) return;
  const decodeStart = firstDecode(value);
  plotly.react(host, value.columns.map(makeTrace(value, decodeStart)), makeLayout(value), PLOT_OPTIONS);
  drawn = { run: value.run, columns: value.columns.length, points: value.samples.length, decodeStart };
  drawnWidth = host.clientWidth;
  element.dataset.points = drawn.points;
};

const extendPlot = (value) => {
  const y = value.columns.map((_, position) => heights(value, position, drawn.points));
  plotly.extendTraces(host, { x: y.map(() => times(value, drawn.points)), y }, [...y.keys()]);
  element.dataset.points = drawn.points = value.samples.length;
};

// The same run with the same curves, only longer: then the new points suffice.
const grewOnly = (value) => drawn.run === value.run && drawn.columns === value.columns.length
  && drawn.points <= value.samples.length && (drawn.decodeStart >= 0 || firstDecode(value) < 0);

const drawPlot = (value) => {
  if (!plotly || !host.clientWidth) return; // hidden in another tab: drawn when it is shown
  if (!grewOnly(value)) redrawPlot(value);
  else if (value.samples.length > drawn.points) extendPlot(value);
};
