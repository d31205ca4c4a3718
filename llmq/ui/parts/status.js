const line = element.querySelector(".llmq-status");
const bar = element.querySelector(".llmq-progress");
const show = () => {
  const value = props.value || "";
  const [text, fraction] = typeof value === "string" ? [value, undefined] : [value.text, value.fraction];
  line.textContent = text;
  bar.hidden = fraction === undefined;
  if (fraction === null) bar.removeAttribute("value");
  else if (fraction !== undefined) bar.value = fraction;
};
watch("value", show);
show();
