// Nodes of a component: found by their part, made, and filled through textContent alone.
const part = (name) => element.querySelector(`[data-part="${name}"]`);

const node = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
};

const setText = (target, text) => {
  if (target.textContent !== text) target.textContent = text;
};
