// The words of the lesson in the language that is chosen; numbers are written as that language writes them.
const LESSON = window.LLMQ_LESSON;
const FORMATS = {
  "%": (x, lang) => new Intl.NumberFormat(lang, { style: "percent", maximumSignificantDigits: 2 }).format(x),
  GB: (x, lang) => `${digits(x / 1e9, 3, lang)} ${lang === "fr" ? "Go" : "GB"}`,
  MB: (x, lang) => `${digits(x / 1e6, 3, lang)} ${lang === "fr" ? "Mo" : "MB"}`,
  "0": (x, lang) => new Intl.NumberFormat(lang, { maximumFractionDigits: 0 }).format(x),
  P: (x, lang) => new Intl.NumberFormat(lang, { notation: "compact", compactDisplay: "long", maximumSignificantDigits: x < 1e9 ? 3 : 2 }).format(x),
  x: (x, lang) => digits(x, 2, lang),
};
const digits = (x, most, lang) => new Intl.NumberFormat(lang, { maximumSignificantDigits: most }).format(x);
let language = "en";

const speak = (wanted) => {
  language = LESSON.languages.includes(wanted) ? wanted : LESSON.languages[0];
  document.documentElement.lang = language;
};

const written = (value, format) => {
  if (typeof value !== "number") return String(value);
  if (Object.is(value, -0)) return written(0, format);
  if (format) return FORMATS[format](value, language);
  return Math.abs(value) >= 1000 ? FORMATS["0"](value, language) : digits(value, 3, language);
};

// say("fit.answer", { int8: 1.2e10 }): the text with its {names} filled in; {name|GB} says how a number is written.
const say = (key, values = {}) => {
  const texts = LESSON.words[key];
  if (!texts) return key;
  return texts[language].replace(/\{(\w+)(?:\|(\S+?))?\}/g, (_, name, format) => written(values[name], format));
};
const has = (key) => key in LESSON.words;
const methodName = (row) => (has(`method.${row.method}`) ? say(`method.${row.method}`) : row.title);
