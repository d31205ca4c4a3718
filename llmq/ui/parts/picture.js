// Hands over the figure in `props.value` as a PNG, once for every value; nothing of it is drawn on the page.
const download = async () => {
  const { figure, name } = props.value;
  part("failed").hidden = true;
  if (!figure) return;
  try {
    const library = await loadPlotly();
    const { height } = figure.layout;
    await library.downloadImage(figure, { format: "png", width: 900, height, scale: 2, filename: name });
  } catch (error) {
    part("failed").hidden = false;
  }
};

watch("value", download);
