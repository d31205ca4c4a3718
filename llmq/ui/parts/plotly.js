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
    const tag = document.createElement("script");
    tag.src = plotlyUrl();
    tag.onload = () => resolve(window.Plotly);
    tag.onerror = () => { window.llmqPlotly = undefined; reject(new Error(tag.src)); };
    document.head.append(tag);
  });
  return window.llmqPlotly;
};

// Calls `repaint` when the page turns light or dark, as long as this component is in it.
const repaintWithTheme = (repaint) => {
  const theme = new MutationObserver(() => {
    if (!element.isConnected) theme.disconnect();
    else repaint();
  });
  for (const root of [document.body, document.documentElement]) {
    theme.observe(root, { attributes: true, attributeFilter: ["class"] });
  }
};
