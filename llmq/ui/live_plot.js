// The plot: two subplots in one plotly figure whose node is made once and then only extended.
const STACK_BELOW = 720; // pixels; narrower than this, the subplots stand one above the other
const DASHES = ["solid", "6px,3px", "2px,3px"];
const CONTEXT_DASHES = { device: "solid", process: "solid", device_process: "8px,4px", allocated: "2px,3px" };

const host = part("plot");
const colour = (name) => getComputedStyle(host).getPropertyValue(`--llmq-${name}`).trim();

// plotly.js comes from this app's own server: the root is what Gradio says it is, or the page's own folder.
const plotlyUrl = () => {
  const config = window.gradio_config || {};
  const page = new URL(".", window.location.href);
  const root = new URL((config.root || page.href).replace(/\/*$/, "/"), page);
  const here = config.is_colab || root.hostname === window.location.hostname;
  return new URL(props.plotly_path, (here ? window.location.origin : root.origin) + root.pathname).href;
};

const loadPlotly = () => {
  if (window.Plotly) return Promise.resolve(window.Plotly);
  window.llmqPlotly ||= new Promise((resolve, reject) => {
    const tag = node("script", { src: plotlyUrl() });
    tag.onload = () => resolve(window.Plotly);
    tag.onerror = () => { window.llmqPlotly = undefined; reject(new Error(tag.src)); };
    document.head.append(tag);
  });
  return window.llmqPlotly;
};

const line = ({ key, contestant }) => contestant === null
  ? { color: colour("ink-soft"), width: 1.5, dash: CONTEXT_DASHES[key] }
  : { color: colour(`line-${contestant}`), width: 2, dash: DASHES[contestant % DASHES.length] };

const scaled = ({ axis }, points) => axis === "memory" ? points.map((mb) => mb === null ? null : mb * 1e6) : points;

// The speed subplot begins with the first decode step: loading may take far longer than the run.
const firstDecode = (value) => value.series.t.findIndex((_, row) =>
  value.columns.some(({ axis, key }) => axis === "speed" && value.series[key][row] !== null));

const makeTrace = (value, start) => (column, position) => {
  const speed = column.axis === "speed";
  const rows = (points) => points.slice(speed ? start : 0);
  const named = value.columns.findIndex((other) => other.name === column.name) === position;
  return {
    x: rows(value.series.t), y: scaled(column, rows(value.series[column.key])),
    name: column.name, legendgroup: column.name, showlegend: named,
    mode: "lines", line: line(column), connectgaps: false,
    xaxis: speed ? "x2" : "x", yaxis: speed ? "y2" : "y",
    hovertemplate: speed ? "%{y:.1f} tok/s" : "%{y:.4s}B",
  };
};

const axis = (extra) => ({
  gridcolor: colour("grid"), linecolor: colour("grid"), zerolinecolor: colour("grid"), tickfont: { color: colour("ink-soft") },
  fixedrange: host.clientWidth < STACK_BELOW, rangemode: "tozero", automargin: true, ...extra,
});

const heading = (text, x, y) => ({
  text, x, y, xref: "paper", yref: "paper", xanchor: "left", yanchor: "bottom", yshift: 6, showarrow: false,
  font: { size: 14, color: colour("ink") },
});

const makeLayout = (value) => {
  const stacked = host.clientWidth < STACK_BELOW;
  const seconds = { title: { text: "seconds since the start", font: { size: 12, color: colour("ink-soft") }, standoff: 6 } };
  return {
    width: host.clientWidth, height: stacked ? 580 : 320, uirevision: value.run || "none",
    margin: { l: 48, r: 12, t: 36, b: 40 }, hovermode: "x unified", dragmode: stacked ? false : "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(host).fontFamily, size: 12, color: colour("ink") },
    hoverlabel: { bgcolor: colour("surface"), bordercolor: colour("grid"), font: { color: colour("ink") } },
    legend: { orientation: "h", x: 0, y: stacked ? -0.14 : -0.24, yanchor: "top" },
    xaxis: axis({ ...seconds, domain: stacked ? [0, 1] : [0, 0.47], anchor: "y" }),
    yaxis: axis({ domain: stacked ? [0.62, 1] : [0, 1], tickformat: "~s", ticksuffix: "B" }),
    xaxis2: axis({ ...seconds, domain: stacked ? [0, 1] : [0.55, 1], anchor: "y2", rangemode: "normal" }),
    yaxis2: axis({ domain: stacked ? [0, 0.38] : [0, 1], anchor: "x2" }),
    annotations: [heading(value.memory || "Memory", 0, 1),
      heading("Decode speed, tokens per second", stacked ? 0 : 0.55, stacked ? 0.38 : 1)],
  };
};

const PLOT_OPTIONS = { displaylogo: false, responsive: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

let plotly = null;
let drawn = { run: null, columns: 0, points: 0, width: 0 };

const redrawPlot = (value) => {
  if (!plotly || !host.clientWidth) return;
  plotly.react(host, value.columns.map(makeTrace(value, Math.max(0, firstDecode(value)))), makeLayout(value), PLOT_OPTIONS);
  drawn = { run: value.run, columns: value.columns.length, points: value.series.t.length, width: host.clientWidth };
  element.dataset.points = drawn.points;
};

const extendPlot = (value) => {
  const tail = (points) => points.slice(drawn.points);
  const y = value.columns.map((column) => scaled(column, tail(value.series[column.key])));
  plotly.extendTraces(host, { x: y.map(() => tail(value.series.t)), y }, [...y.keys()]);
  element.dataset.points = drawn.points = value.series.t.length;
};

const drawPlot = (value) => {
  if (!plotly || !host.clientWidth) return; // hidden in another tab: drawn when it is shown
  const same = drawn.run === value.run && drawn.columns === value.columns.length && drawn.points <= value.series.t.length;
  if (!same) redrawPlot(value);
  else if (value.series.t.length > drawn.points) extendPlot(value);
};
