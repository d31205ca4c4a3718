// Wires the panel: draws `props.value` when it changes, when the panel's size changes and when the theme does.
const EMPTY = { run: null, memory: "Memory", contestants: [], columns: [], series: { t: [] }, cards: [] };
const CAPTION = "Weights and peak memory on the cards, and the coloured memory curves, are exact tensor sizes of each method.";
const current = () => (props.value && props.value.cards ? props.value : EMPTY);
const redrawPause = () => (matchMedia("(prefers-reduced-motion: reduce)").matches ? 1000 : 250); // milliseconds

let shownRun = EMPTY.run;
let pending = false;
let lastDraw = -Infinity;

const drawCards = (value) => {
  if (value.run !== shownRun) {
    shownRun = value.run;
    buildCards(value.contestants);
    part("empty").hidden = value.cards.length > 0;
    part("caption").hidden = value.cards.length === 0;
    setText(part("caption"), CAPTION);
  }
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

const observeTheme = () => {
  const repaint = new MutationObserver(() => {
    if (!element.isConnected) repaint.disconnect();
    else redrawPlot(current());
  });
  for (const root of [document.body, document.documentElement]) {
    repaint.observe(root, { attributes: true, attributeFilter: ["class"] });
  }
};

const observeSize = () => {
  const resize = new ResizeObserver(() => {
    if (!element.isConnected) resize.disconnect();
    else if (host.clientWidth && host.clientWidth !== drawn.width) requestAnimationFrame(() => redrawPlot(current()));
  });
  resize.observe(host);
};

part("figures").addEventListener("toggle", () => fillTable(current()));
watch("value", schedule);
draw();
loadPlotly().then((library) => {
  plotly = library;
  redrawPlot(current());
  observeTheme();
  observeSize();
}).catch((error) => {
  part("plot-error").hidden = false;
  setText(part("plot-error"), `The plot could not be loaded (${error.message}). The table below holds the figures.`);
});
