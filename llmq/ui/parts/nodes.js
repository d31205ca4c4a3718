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

// A word that `words.js` explains: by a line of the glossary, { "data-word": name }, or by { "data-says": text }.
const term = (shown, says) => node("span", { class: "llmq-term", tabindex: "0", ...says }, shown);

// The focus goes to the named part where the tab's form or row of buttons, hidden by now, held it; a moment later, so
// that the key that did it does not press that part, too.
const followFocus = (name) => {
  const held = document.activeElement?.closest(".llmq-form, .llmq-asked");
  if (held && held.closest(".llmq-view") === element.closest(".llmq-view")) {
    setTimeout(() => part(name).focus({ preventScroll: true }));
  }
};
