// Wires the panel: draws `props.value` when it changes, when the panel's size changes and when the theme does.
const EMPTY = { run: null, memory: "Memory", contestants: [], columns: [], samples: [], cards: [] };
const current = () => (props.value && props.value.cards ? props.value : EMPTY);
const redrawPause = () => (matchMedia("(prefers-reduced-motion: reduce)").matches ? 1000 : 250); // milliseconds

let shownRun = EMPTY.run;
let pending = false;
let lastDraw = -Infinity;

const drawCards = (value) => {
  if (value.run !== shownRun) {
    shownRun = value.run;
    element.dataset.run = value.run;
    element.dataset.points = 0;
    buildCards(value.contestants);
    part("empty").hidden = value.cards.length > 0;
  }
  for (const shown of [host, part("caption"), part("figures")]) shown.hidden = value.samples.length === 0;
  fillCards(value);
};

const draw = () => {
  pending = false;
  lastDraw = performance.now();
  const value = current();
  drawCards(value);
  drawPlot(value);
  fillTable(value);
};

const schedule = () => {
  if (pending) return;
  pending = true;
  setTimeout(() => requestAnimationFrame(draw), Math.max(0, lastDraw + redrawPause() - performance.now()));
};

const observeSize = () => {
  const resize = new ResizeObserver(() => {
    if (!element.isConnected) resize.disconnect();
    else if (host.clientWidth && host.clientWidth !== drawnWidth) requestAnimationFrame(() => redrawPlot(current()));
  });
  resize.observe(host);
};

part("figures").addEventListener("toggle", () => fillTable(current()));
watch("value", schedule);
draw();
loadPlotly().then((library) => {
  plotly = library;
  redrawPlot(current());
  repaintWithTheme(() => redrawPlot(current()));
  observeSize();
}).catch((error) => {
  console.error("llmq: no plot", error);
  host.remove();
  part("plot-error").hidden = false;
});
