// Parts of a component's template, and new nodes. All text of prompts and models reaches the page through textContent.
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
