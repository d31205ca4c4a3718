// Where one is in the lesson: the address, the keys, the class's step; and the page that shows it.
const root = document.getElementById("lesson");
const params = () => new URLSearchParams(`${window.location.search.slice(1)}&${window.location.hash.slice(1)}`);
const at = { number: 0, pair: 0, revealed: {}, presents: false };
const mineOf = (question) => (tallyOf(question) && !CLASS.teacher ? tallyOf(question).yours : kept.get(`choice-${question}`)) ?? null;

// How many of the quiz's pairs that were shown one had right.
const sumOf = (step) => {
  const seen = Object.entries(step.right).filter(([name]) => revealedBy(name) && mineOf(name));
  return step.name === "quiz" && seen.length > 1 && { asked: seen.length, right: seen.filter(([name, right]) => mineOf(name) === right).length };
};

// A class stands at a question: every step has one, and the quiz one for each pair.
const pairIn = (text) => Math.max(0, Object.keys(LESSON.steps[stepIn(text)].questions).indexOf(text));
const stepIn = (text) => {
  const named = LESSON.steps.findIndex((step) => step.name === text || text in step.questions), number = named < 0 ? Number(text) - 1 : named;
  return Number.isInteger(number) && number >= 0 && number < LESSON.steps.length ? number : 0;
};

const writeAddress = () => {
  const query = new URLSearchParams({ lesson: at.number + 1, lang: language });
  if (at.presents) query.set("present", "1");
  if (CLASS.code && !CLASS.teacher) query.set("class", CLASS.code);
  try { history.replaceState(null, "", `?${query}`); } catch { window.location.hash = String(query); } // a page from a disk
};

const questionOf = (step) => Object.keys(step.questions)[step.name === "quiz" ? at.pair : 0];
const follow = (on) => { CLASS.follows = on; kept.set("follows", on); };
const follows = () => CLASS.on && !CLASS.teacher && CLASS.follows && Boolean(CLASS.state?.step);
const revealedBy = (question) => (follows() ? (CLASS.state.revealed && question === CLASS.state.step) || Boolean(at.revealed[question] && question !== CLASS.state.step) : Boolean(at.revealed[question]));

const go = (number, { focus = true, tell: told = true } = {}) => {
  if (number < 0 || number >= LESSON.steps.length) return;
  if (focus && follows()) follow(false); // whoever goes elsewhere walks alone
  at.number = number;
  at.pair = 0;
  if (CLASS.teacher && told) lead({ step: questionOf(LESSON.steps[number]), revealed: false });
  writeAddress();
  draw();
  window.scrollTo(0, 0);
  if (focus) document.getElementById("title")?.focus({ preventScroll: true });
};

const reveal = (question) => {
  at.revealed[question] = true;
  if (CLASS.teacher) lead({ step: question, revealed: true });
  draw();
  lightUp();
};

const onward = (by) => {
  const step = LESSON.steps[at.number], question = questionOf(step);
  if (by > 0 && at.presents && !revealedBy(question)) reveal(question);
  else if (by > 0 && step.name === "quiz" && at.presents && step.data.pairs[at.pair + 1]) turn(at.pair + 1);
  else go(at.number + by);
};
const turn = (pair) => { at.pair = pair; if (CLASS.teacher) lead({ step: questionOf(LESSON.steps[at.number]), revealed: false }); draw(); };

// Votes are deleted: the question is asked again, unanswered.
const forget = (question) => {
  if (question) delete at.revealed[question];
  else at.revealed = {};
  reset(question);
};

// The part of the exhibit that the answer is about is outlined and brought into view.
const lightUp = () => {
  const lit = root.querySelector(`.exhibit [data-part="${LESSON.steps[at.number].lit}"]`);
  lit?.classList.add("lit");
  lit?.scrollIntoView({ block: "nearest", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
};

// A step is one screen: what is too tall for it is shown smaller, down to a size that can be read.
const oneScreen = () => {
  const main = root.querySelector("main");
  const parts = [[".exhibit", ".drawing", at.presents ? 0.6 : 0.8], [".card", ".card", at.presents ? 0.7 : 0.8]];
  for (const [, shrunk] of parts) main.querySelector(shrunk).style.zoom = 1;
  if (window.innerWidth < 900) return; // a phone is scrolled
  const room = window.innerHeight - (document.documentElement.scrollHeight - main.offsetHeight);
  for (const [column, shrunk, least] of parts) {
    const tall = () => main.querySelector(column).getBoundingClientRect().height > room;
    for (let zoom = 1; zoom > least && tall();) {
      zoom = Math.max(least, zoom - 0.04);
      main.querySelector(shrunk).style.zoom = zoom;
    }
  }
};
// On a phone the strip of steps is wider than the screen. It alone is scrolled: a draw moves nobody who is reading.
const showCurrent = () => {
  const strip = root.querySelector(".steps"), [whole, current] = [strip, strip.querySelector(".current")].map((one) => one.getBoundingClientRect());
  strip.scrollLeft += current.left - whole.left - (whole.width - current.width) / 2;
};
window.addEventListener("resize", () => root.querySelector("main") && oneScreen());

const present = () => {
  Object.assign(at, { presents: !at.presents, shows: false });
  writeAddress();
  draw();
};

// For whoever has a class's code and no link.
const entrance = () => el("form", { class: "class-bar", onsubmit: async (event) => {
  event.preventDefault();
  await join(new FormData(event.target).get("code").trim().toUpperCase());
  if (!CLASS.on) return;
  follow(true);
  writeAddress();
  followed();
  draw();
} }, el("label", {}, say("class.code"), " ", el("input", { name: "code", required: true, autocomplete: "off", autocapitalize: "characters", maxlength: 12, size: 8 })),
  el("button", {}, say("class.join")), CLASS.failed && el("span", { class: "failed", role: "alert" }, CLASS.failed));

const classBar = () => {
  if (!CLASS.on) return document.documentElement.dataset.class === "yes" ? entrance() : null;
  const people = CLASS.state?.people ?? 0, question = questionOf(LESSON.steps[at.number]);
  if (!CLASS.teacher) {
    return el("div", { class: "class-bar" }, el("span", {}, say("class.in", { code: CLASS.code, people })),
      CLASS.state?.step && button(say(CLASS.follows ? "class.alone" : "class.follow"), () => { follow(!CLASS.follows); followed(); draw(); }, { "aria-pressed": String(CLASS.follows) }),
      CLASS.failed && el("span", { class: "failed", role: "alert" }, CLASS.failed));
  }
  return el("div", { class: "class-bar" },
    el("span", {}, say("class.teacher", { code: CLASS.code, people })),
    button(say("class.show"), () => { at.shows = !at.shows; draw(); }, { id: "show-link" }),
    button(say(CLASS.state?.step ? "class.release" : "class.gather"), () => lead({ step: CLASS.state?.step ? null : question })),
    button(say(at.presents ? "class.desk" : "class.present"), () => {
      present();
      if (at.presents) lead({ step: question }); // those in class come along
    }),
    button(say("class.reset"), () => window.confirm(say("class.sure")) && forget(question)),
    ...(at.presents ? [] : [
      button(say("class.resetAll"), () => window.confirm(say("class.sureAll")) && forget(null)),
      button(say("class.export"), exported), button(say("class.end"), () => window.confirm(say("class.sureEnd")) && end()),
    ]),
    CLASS.failed && el("span", { class: "failed", role: "alert" }, CLASS.failed));
};

const invitation = () => at.shows && CLASS.teacher && el("div", { class: "invitation" },
  el("img", { src: qrAddress(), alt: say("class.qr"), width: 240, height: 240 }),
  el("p", {}, say("class.invite"), " ", el("a", { href: studentsLink() }, studentsLink())));

const topOf = (step) => el("header", { class: "top" },
  el("nav", { class: "steps", "aria-label": say("ui.steps") }, LESSON.steps.map((one, i) => button(String(i + 1), () => go(i), {
    class: i === at.number ? "current" : "", title: titleOf(one), "aria-label": `${i + 1}: ${titleOf(one)}`, "aria-current": i === at.number ? "step" : undefined }))),
  el("div", { class: "languages" }, LESSON.languages.map((name) => button(name.toUpperCase(), () => { speak(name); kept.set("lang", name); writeAddress(); draw(); }, {
    "aria-pressed": String(language === name), lang: name }))),
  !CLASS.on && button(say(at.presents ? "class.desk" : "class.present"), present, { id: "present" }),
  document.documentElement.dataset.live === "yes" && el("a", { href: "../" }, say("ui.app")));

const draw = () => {
  const step = LESSON.steps[at.number], question = questionOf(step), revealed = revealedBy(question);
  const focused = document.activeElement?.id;
  const state = { question, pair: at.pair, revealed, mine: mineOf(question), reveal: () => reveal(question), turn, sum: sumOf(step),
    all: CLASS.teacher && step.name === "quiz" && allPairs(step, revealedBy),
    waits: follows() && question === CLASS.state.step && !CLASS.state.revealed,
    choose: async (choice) => {
      const counted = await vote(question, choice);
      if (counted) kept.set(`choice-${question}`, counted);
      draw();
      document.getElementById("reveal")?.focus();
    } };
  document.title = `${at.number + 1}. ${titleOf(step)} · llmq`;
  document.body.className = `${at.presents ? "presents" : ""} ${revealed ? "revealed" : ""}`;
  root.replaceChildren(topOf(step), ...[classBar(), invitation()].filter(Boolean),
    el("main", { "data-step": step.name, "data-revealed": String(revealed) }, card(step, state, at.number),
      el("section", { class: "exhibit", "aria-label": say("ui.exhibit") }, revealed && pairOf(step),
        el("div", { class: "drawing" }, EXHIBITS[step.name](step, revealed, state)), askedLine(step))),
    el("footer", { class: "way" }, button(say("ui.back"), () => onward(-1), { id: "back", disabled: at.number === 0 || undefined }),
      button(say("ui.next"), () => onward(1), { id: "next", class: revealed ? "primary" : "", disabled: at.number === LESSON.steps.length - 1 && (revealed || !at.presents) || undefined })));
  if (revealed) root.querySelector(`.exhibit [data-part="${step.lit}"]`)?.classList.add("lit");
  oneScreen();
  showCurrent();
  if (focused && document.activeElement?.id !== focused) document.getElementById(focused)?.focus({ preventScroll: true });
};

// A student stands where the teacher does until they walk alone.
const followed = () => {
  if (!follows()) return;
  const number = stepIn(CLASS.state.step);
  if (number !== at.number) go(number, { focus: false });
  at.pair = pairIn(CLASS.state.step);
};
CLASS.changed = () => { followed(); const typing = root.querySelector(".exhibit :focus"); if (!typing || follows()) draw(); };

document.addEventListener("keydown", (event) => {
  const pages = at.presents && event.key.startsWith("Page") && event.target.type === "range"; // a presenter's remote
  if ((event.target.closest("input, textarea, select, details") && !pages) || event.ctrlKey || event.metaKey || event.altKey) return;
  const by = { ArrowRight: 1, PageDown: 1, ArrowLeft: -1, PageUp: -1 }[event.key];
  if (by) { event.preventDefault(); onward(by); }
});
// A slider that was let go gives the keys back to the lesson.
document.addEventListener("pointerup", ({ target }) => { if (at.presents && target.type === "range") target.blur(); });
window.addEventListener("popstate", () => { const number = stepIn(params().get("lesson")); if (number !== at.number) go(number); });

const start = async () => {
  const asked = params();
  speak(asked.get("lang") ?? kept.get("lang") ?? navigator.language.slice(0, 2));
  at.presents = asked.get("present") === "1";
  at.number = stepIn(asked.get("lesson"));
  if (document.documentElement.dataset.class === "yes") {
    const known = kept.get("class"), code = asked.get("class")?.toUpperCase();
    // Who comes by a link to a step walks alone; who loads the page again stays as before, wherever its address is.
    follow(known && (!code || known.code === code) ? kept.get("follows", true) : !asked.has("lesson"));
    if (asked.get("teach")) {
      history.replaceState(null, "", window.location.pathname);
      await teach(asked.get("teach"));
      at.shows = CLASS.on;
    } else if (code) await join(code);
    else if (known?.token) { enter(known.code, known.token, known.teacher); await poll(); }
    if (CLASS.teacher && CLASS.state?.step) [at.number, at.pair] = [stepIn(CLASS.state.step), pairIn(CLASS.state.step)];
    setInterval(poll, POLL);
  }
  writeAddress();
  followed();
  draw();
};
start();
