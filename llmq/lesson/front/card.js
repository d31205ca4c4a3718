// The card of a step: what it says, its question with the class's votes, the answer, two numbers, and the way on.
const tallyBars = (step, question, revealed) => {
  const tally = tallyOf(question);
  if (!tally) return null;
  if (!tally.counts || (at.presents && !revealed)) return el("p", { class: "quiet tally" }, say(tally.votes === 1 ? "class.vote" : "class.votes", { votes: tally.votes }));
  const right = step.right[question], most = Math.max(1, ...Object.values(tally.counts));
  return el("div", { class: "tally" },
    step.questions[question].map((choice) => barRow(labelOf(step, choice), (tally.counts[choice] || 0) / most, String(tally.counts[choice] || 0),
      revealed && choice === right ? "best" : "")),
    revealed && tally.chance && tally.votes > 1 && el("p", { class: "quiet" }, say("class.chance", {
      right: tally.counts[right] || 0, votes: tally.votes, low: tally.chance[0], high: tally.chance[1] })));
};

const titleOf = (step) => say(`${step.name}.title`);
const labelOf = (step, choice) => say(`${step.name}.choice.${choice}`, step.values);

const choices = (step, state) => el("div", { class: "choices", role: "group", "aria-label": say(`${step.name}.ask`, step.values) },
  step.questions[state.question].map((choice) => {
    const mine = state.mine === choice, right = state.revealed && choice === step.right[state.question];
    return button([labelOf(step, choice), right && el("span", { class: "sign" }, ` ✓ ${say("ui.right")}`), mine && el("span", { class: "sign" }, ` · ${say("ui.yours")}`)],
      () => state.choose(choice), { class: `choose ${mine ? "mine" : ""} ${right ? "right" : ""}`, "data-choice": choice,
        "aria-pressed": String(mine), disabled: state.revealed || CLASS.teacher || undefined });
  }));

const pairOf = (step) => {
  const largest = Math.max(...step.pair), format = LESSON.words[`${step.name}.format`]?.en ?? "";
  return el("div", { class: "numbers" }, step.pair.map((value, i) => el("div", { class: `number side-${i}` },
    el("strong", {}, written(value, format)), el("span", {}, say(i ? `${step.name}.second` : `${step.name}.first`, step.values)),
    bar(value / largest, "", { "aria-hidden": "true" }))));
};

const askedLine = (step) => {
  const { model, methods = [], prompt, date, device_name: device, threshold } = step.asked;
  if (!model) return null;
  const when = date && new Date(date).toLocaleDateString(language, { year: "numeric", month: "long", day: "numeric" });
  const form = [["model", model], ["methods", methods.length > 4 ? say("ui.methods", { methods: methods.length }) : methods.join(", ")],
    ["prompt", prompt], ["threshold", threshold === undefined ? "" : String(threshold)]];
  return el("p", { class: "asked" }, el("span", { class: "badge" }, when ? say("ui.recorded", { date: when, device }) : say("ui.computed")), " ",
    form.filter(([, value]) => value).map(([name, value]) => el("span", { "data-field": name, dir: "auto" }, value)));
};

const liveLink = (step, number) => {
  const tried = el("p", { class: "try" }, el("b", {}, say("ui.try")), " ", say(`${step.name}.try`, step.values));
  if (document.documentElement.dataset.live !== "yes") return tried;
  const query = new URLSearchParams({ ...step.live.query, lesson: number + 1, live: 1, lang: language });
  tried.append(" ", el("a", { class: "live", href: `../?${query}`, target: "_blank" }, say("ui.live")));
  return tried;
};

const card = (step, state, number) => el("section", { class: "card", "aria-labelledby": "title" },
  el("p", { class: "place" }, say("ui.place", { number: number + 1, all: LESSON.steps.length })),
  el("h1", { id: "title", tabindex: -1 }, titleOf(step)),
  el("p", { class: "tell" }, say(`${step.name}.tell`, step.values)),
  el("h2", { class: "ask" }, say(`${step.name}.ask`, { ...step.values, pair: state.pair + 1 })),
  choices(step, state),
  tallyBars(step, state.question, state.revealed),
  el("div", { class: "reveal" },
    !state.revealed && (state.waits ? el("p", { class: "quiet" }, say("class.waits"))
      : button(say("ui.reveal"), state.reveal, { class: state.mine || CLASS.teacher ? "primary" : "", id: "reveal" }))),
  el("div", { "aria-live": "polite" }, state.revealed && el("p", { class: "answer" },
    say(`${step.name}.answer`, { ...step.values, right: step.right[state.question] && labelOf(step, step.right[state.question]) }))),
  state.revealed && state.all && el("p", { class: "answer" }, say("class.all", state.all)),
  state.revealed && state.sum && el("p", { class: "quiet" }, say("quiz.sum", state.sum)),
  state.revealed && step.name === "quiz" && el("div", { class: "row" }, [-1, 1].map((by) => step.data.pairs[state.pair + by]
    && button(say(by < 0 ? "quiz.previous" : "quiz.next"), () => state.turn(state.pair + by), { class: "" }))),
  state.revealed && liveLink(step, number));
