// Draws the plotly figure in `props.value`; a new value changes the same chart, so zoom and scroll position stay.
const place = element.querySelector('[data-part="figure"]');
const failed = element.querySelector('[data-part="failed"]');
const config = { displaylogo: false, responsive: true, showSendToCloud: false, plotlyServerURL: "",
  modeBarButtonsToRemove: ["lasso2d", "select2d"] };

const draw = async () => {
  const figure = props.value;
  const empty = !figure || !figure.data;
  place.hidden = empty;
  if (empty) return;
  try {
    const library = await loadPlotly();
    place.style.height = `${figure.layout.height}px`;
    await library.react(place, figure.data, figure.layout, config);
    element.dataset.drawn = figure.layout.title.text;
  } catch (error) {
    failed.hidden = false;
  }
};

new ResizeObserver(() => {
  if (window.Plotly && !place.hidden && place.data && place.offsetWidth) window.Plotly.Plots.resize(place);
}).observe(element);
watch("value", draw);
draw();
