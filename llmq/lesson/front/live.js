// The card of a step on the real page: it outlines the button to press, then what the answer is about.
"use strict";
(() => {
  const lesson = window.LLMQ_LESSON, asked = new URLSearchParams(window.location.search);
  const number = Number(asked.get("lesson")) - 1, step = lesson.steps[number], wanted = asked.get("lang");
  const language = lesson.languages.includes(wanted) ? wanted : lesson.languages[0];
  if (!step) return;
  const say = (key, values = {}) => lesson.words[key][language].replace(/\{(\w+)(?:\|\S+?)?\}/g, (_, name) => values[name] ?? "");
  const lessonAt = new URL("lesson/", document.currentScript?.src.replace(/lesson\/live\.js.*$/, "") ?? window.location.href);
  const make = (tag, text, attributes = {}) => {
    const made = document.createElement(tag);
    Object.entries(attributes).forEach(([name, value]) => made.setAttribute(name, value));
    made.textContent = text;
    return made;
  };
  const told = make("p", say(step.live.press ? "live.press" : "live.look"), { role: "status" });
  const link = (text, to, query) => make("a", text, { href: `${to}?${new URLSearchParams(query)}` });
  const next = lesson.steps[number + 1];
  const card = make("aside", "", { id: "llmq-lesson", "data-step": step.name, "aria-label": say("live.card", { number: number + 1, title: "" }), lang: language });
  const app = new URL("../", lessonAt).href;
  card.append(make("b", say("live.card", { number: number + 1, title: say(`${step.name}.title`) })), told,
    link(say("live.back"), lessonAt.href, { lesson: number + 1, lang: language }),
    ...(next ? [link(say("live.next"), app, { ...next.live.query, lesson: number + 2, live: 1, lang: language })] : []));
  document.body.append(card);
  if (step.live.later) document.head.append(make("style", `${step.live.later} { display: none !important; }`));

  const seen = (selector) => [...document.querySelectorAll(selector)].find((one) => one.offsetParent);
  const light = (place) => {
    document.querySelectorAll(".llmq-lit").forEach((one) => one.classList.remove("llmq-lit"));
    place.classList.add("llmq-lit");
    place.scrollIntoView({ block: place.offsetHeight > 0.7 * window.innerHeight ? "start" : "center", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  };
  // First the button, once it is there; after it was pressed, what to look at, once nothing runs any more. Whatever runs
  // can be stopped: a Stop button that is seen tells of it, soon after the press or never.
  const SOON = 15000;
  let lit = null, pressed = step.live.press ? 0 : -Infinity, ran = false;
  const look = () => {
    const runs = Boolean(seen('[data-part="stop"]'));
    if (!pressed) {
      const button = seen(step.live.press);
      if (button && lit !== button) {
        lit = button;
        light(button);
        button.addEventListener("click", () => { pressed = Date.now(); }, { once: true });
      }
      return;
    }
    ran ||= runs;
    if (runs || !(ran || Date.now() - pressed > SOON)) return;
    const place = seen(step.live.lit);
    if (!place) return;
    light(place);
    if (step.live.press) told.textContent = say("live.done");
    clearInterval(timer);
  };
  const timer = setInterval(look, 200);
})();
