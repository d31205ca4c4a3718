// Draws the plotly figure in `props.value`; a new value or theme changes the same chart, so the page does not jump.
const place = element.querySelector('[data-part="figure"]');
const title = element.querySelector('[data-part="title"]');
const words = element.querySelector('[data-part="words"]');
const frame = element.querySelector(".llmq-figure");
const failed = element.querySelector('[data-part="failed"]');
const config = { displaylogo: false, responsive: true, showSendToCloud: false, plotlyServerURL: "",
  modeBarButtonsToRemove: ["lasso2d", "select2d"] };

// A snug figure is as high as two fifths of the window.
const heightOf = ({ height }) => (props.snug ? Math.min(height, Math.max(280, Math.round(innerHeight * 0.42))) : height);

const clicked = ({ points: [{ x, y, data }] }) => trigger("select", { x, y, type: data.type });

const draw = async () => {
  const figure = props.value;
  const empty = !figure || !figure.data;
  frame.hidden = empty;
  if (empty) return;
  if (title.textContent !== figure.title) title.textContent = figure.title;
  if (words.textContent !== figure.words) words.textContent = figure.words;
  words.hidden = !figure.words;
  try {
    const library = await loadPlotly();
    const { data, layout } = painted(figure, element);
    layout.height = heightOf(layout);
    layout.modebar = { bgcolor: "rgba(0, 0, 0, 0)", color: layout.font.color };
    if (props.snug) layout.margin = { ...layout.margin, t: 8 };
    place.style.height = `${layout.height}px`;
    await library.react(place, data, layout, config);
    place.removeAllListeners("plotly_click");
    place.on("plotly_click", clicked);
  } catch (error) {
    failed.hidden = false;
  }
};

new ResizeObserver(() => {
  if (window.Plotly && place.data && place.offsetWidth) window.Plotly.Plots.resize(place);
}).observe(element);
watch("value", draw);
repaintWithTheme(draw);
draw();
