(model, card, memory, context, batch) => {
  const query = new URLSearchParams({ view: "fit", model: model || "", card: card === "other" ? memory : card, context,
    batch });
  return `${window.location.origin}${window.location.pathname}?${query}`;
}
