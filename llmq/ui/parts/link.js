(prompt, model, left, right, third, threshold, max_new_tokens, schedule, temperature, top_k, top_p, seed) => {
  const LONGEST = 4000; // characters of a prompt that a link can carry; some servers cut longer ones
  if ([...(prompt || "")].length > LONGEST) {
    return `The prompt has more than ${LONGEST.toLocaleString("en")} characters, too many for a link.`;
  }
  const methods = [left, right, third].filter((name) => name && name !== "none").join(",");
  const query = new URLSearchParams({ prompt, model, methods, threshold, max_new_tokens, schedule, temperature, top_k,
    top_p, seed });
  return `${window.location.origin}${window.location.pathname}?${query}`;
}
