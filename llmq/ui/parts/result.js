// Draws the result, and holds the one state of its tab: idle, running, done, example, replaying, replayed.
const EMPTY = { run: null, state: "idle", memory: "Memory", contestants: [], columns: [], samples: [], cards: [], texts: [] };
const redrawPause = () => (still() ? 1000 : 250); // milliseconds
const tab = element.closest(".llmq-view") || element;

let shown = EMPTY;
let settled = EMPTY; // what stands again when a run is refused
let asked = 0; // how often something was asked
let open = 0; // which of them has no end yet
let drawnRun = EMPTY.run;
let drawnPieces = null;
let pending = null; // what cancels the drawing to come
let lastDraw = -Infinity;
let example = null; // the one that a click held up
let dropped = false; // whether Stop came before the recording that was asked for
let tiles = [];
let same = null;
let panes = [];

const fold = (folded) => { tab.dataset.folded = folded; };

const enter = (state) => {
  if (tab.dataset.state === state) return;
  if (document.activeElement === part("stop") && ["done", "replayed"].includes(state)) followFocus("change");
  tab.dataset.state = state;
  for (const kept of tab.querySelectorAll(".llmq-keep")) kept.inert = state === "running"; // by keyboard too
  if (!["running", "replaying"].includes(state)) return;
  fold(true);
  if (tab.getBoundingClientRect().top < 0) tab.scrollIntoView({ block: "start" }); // whoever pressed Replay was below
};

const build = ({ contestants }) => {
  tiles = FIGURES.map(([name, , ...words]) => makeTile(contestants, name, ...words));
  same = contestants.length > 1 ? makeSame() : null;
  panes = contestants.map(makePane);
  part("strip").replaceChildren(...tiles.map((tile) => tile.root), ...(same ? [same.root] : []));
  part("panes").replaceChildren(...panes.map((pane) => pane.root));
};

const fillStrip = (value) => {
  FIGURES.forEach(([name, field], number) => {
    const { change, rows } = tiles[number];
    const { shares, changes } = value.strip[name];
    setText(change, changes.length === 2 ? changes[1] : "");
    rows.forEach(({ bar, value: slot }, index) => {
      bar.style.setProperty("--llmq-share", shares[index] ?? 0);
      const told = changes.length > 2 ? changes[index] : "";
      setText(slot, [value.cards[index][field], told].filter(Boolean).join("  "));
    });
  });
  if (!same) return;
  setText(same.count, value.strip.same);
  setText(same.more, value.strip.parted);
  same.why.dataset.empty = !(value.details || []).length;
};

const fillPane = (pane, card, written, list, parted) => {
  const { root, slots, text } = pane;
  root.dataset.state = card.state;
  setText(pane.arithmetic, card.arithmetic);
  for (const [name, slot] of Object.entries(slots)) setText(slot, card[name]);
  if (list) {
    if (drawnPieces !== shown.pieces) {
      text.replaceChildren(...pieces(list, parted));
      const mark = text.querySelector(".llmq-first");
      text.scrollTop = mark ? mark.offsetTop - 60 : 0;
    }
    return;
  }
  const below = text.scrollHeight - text.scrollTop - text.clientHeight < 24;
  setText(text, written);
  if (below) text.scrollTop = text.scrollHeight;
};

// What is going on, and in the end what came out: one line, which a screen reader hears once each time it changes.
const sentence = ({ status, headline }) =>
  (headline ? [status === "Finished." ? "" : status, headline] : [status]).filter(Boolean).join(" ");

// Of a bar without an end it is not known how far it is.
const busy = (waiting, fraction = null) => {
  part("bar").dataset.empty = !waiting;
  if (fraction === null) part("bar").removeAttribute("value");
  else part("bar").value = fraction;
  part("status").setAttribute("aria-live", fraction === null ? "polite" : "off"); // a count is seen, not heard
};

const fillFrame = (value) => {
  part("banner").hidden = !value.recording;
  setText(part("banner"), value.recording || "");
  part("asked").hidden = !value.asked;
  if (value.asked) {
    setText(part("prompt"), value.asked.prompt);
    setText(part("settings"), value.asked.settings);
  }
  busy(["running", "replaying"].includes(value.state) && !value.texts.some(Boolean), value.fraction);
  setText(part("status"), sentence(value));
  part("shown").hidden = !value.contestants.length;
  part("why").dataset.empty = !(value.details || []).length;
  part("details").replaceChildren(...(value.details || []).map((line) => node("p", {}, line)));
};

const draw = () => {
  pending = null;
  lastDraw = performance.now();
  enter(shown.state);
  fillFrame(shown);
  if (shown.notice) {
    fold(false);
    part("status").scrollIntoView({ block: "nearest" }); // below the form, which may fill a phone
  }
  if (shown.run !== drawnRun) {
    drawnRun = element.dataset.run = shown.run;
    element.dataset.points = 0;
    drawnPieces = null;
    build(shown);
  }
  if (!shown.contestants.length) return;
  fillStrip(shown);
  panes.forEach((pane, index) => fillPane(pane, shown.cards[index], shown.texts[index],
    shown.pieces && shown.pieces[index], shown.first !== null));
  drawnPieces = shown.pieces;
  drawPlot(shown);
  fillTable(shown);
};

const schedule = () => {
  if (pending) return;
  let frame = null;
  const timer = setTimeout(() => { frame = requestAnimationFrame(draw); },
    Math.max(0, lastDraw + redrawPause() - performance.now()));
  pending = () => { clearTimeout(timer); cancelAnimationFrame(frame); pending = null; };
};

const show = (value) => {
  shown = value;
  if (value.state !== "running") [settled, open] = [value.notice ? settled : value, 0];
  else if (!open) open = ++asked;
  schedule();
};

const halt = () => {
  playing?.stop();
  playing = null;
};

// A click folds the form at once: what the server says of it may take a while under load.
const begin = (state) => {
  if (shown.state === "example" && playing) example = playing;
  dropped = false;
  halt();
  pending?.(); // what was shown until now is not drawn over what is said here
  open = ++asked;
  followFocus("stop");
  enter(state);
  busy(true);
  setText(part("status"), "Starting");
};

document.addEventListener("click", ({ target }) => {
  if (target.closest("#generate")) begin("running");
  if (target.closest("#replay")) begin("replaying");
});
document.addEventListener("keydown", ({ target, key, shiftKey }) => {
  if (key === "Escape") target.closest(".llmq-term")?.blur();
  if (target.closest("#prompt") && key === "Enter" && shiftKey) begin("running");
});

// A recording takes the place of what is shown; an example plays below an open form.
const showRecording = (recording) => {
  const [during, after] = recording.example ? ["example", "example"] : ["replaying", "replayed"];
  playing = play(recording, (value, ended) => show({ ...value, state: ended ? after : during }));
};

// The form opens again below what is said; a recording that was playing stands where it was, an example at its end.
const refuse = (value, notice) => {
  halt();
  const state = { running: "done", replaying: "replayed" }[value.state] || value.state;
  const stood = state === "example" && example ? example.end() : value;
  show({ ...stood, state, status: notice, headline: "", notice: true });
};

const changed = () => {
  const value = props.value || {};
  if (value.notice) {
    refuse(settled, value.notice);
    return;
  }
  halt();
  if (value.frames && dropped) dropped = false;
  else if (value.frames) showRecording(value);
  else show(value.run ? value : EMPTY);
};

const stopAll = () => {
  if (tab.dataset.state === "replaying") {
    dropped = !playing;
    halt();
    show({ ...shown, state: "replayed", status: "Recording stopped." });
  } else {
    trigger("stop");
  }
};

part("stop").addEventListener("click", stopAll);
part("skip").addEventListener("click", () => playing?.finish());
part("change").addEventListener("click", () => {
  fold(false);
  document.querySelector("#prompt textarea")?.focus();
});
part("strip").addEventListener("click", ({ target }) => {
  if (!target.closest('[data-part="show-why"]')) return;
  part("why").open = true;
  part("verdict").scrollIntoView({ block: "start" });
  part("why").querySelector("summary").focus({ preventScroll: true });
});
part("again").addEventListener("click", () => document.querySelector("#generate")?.click());
part("figures").addEventListener("toggle", () => fillTable(shown));

const observeSize = () => {
  const resize = new ResizeObserver(() => {
    if (!element.isConnected) resize.disconnect();
    else if (host.clientWidth && host.clientWidth !== drawnWidth) requestAnimationFrame(() => redrawPlot(shown));
  });
  resize.observe(host);
};

// 4.8 MB, needed for the first plot only: fetched when the page has nothing else to do.
const whenIdle = window.requestIdleCallback || ((task) => setTimeout(task, 200));
whenIdle(() => loadPlotly().then((library) => {
  plotly = library;
  redrawPlot(shown);
  repaintWithTheme(() => redrawPlot(shown));
  observeSize();
}).catch((error) => {
  console.error("llmq: no plot", error);
  host.remove();
  part("plot-error").hidden = false;
}));

fold(false);
whenLost(() => open, () => refuse(shown, LOST));
watch("value", changed);
changed();
