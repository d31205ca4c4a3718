// Plays a recording in the browser: `frames` say what changed and when, so no server is held up while one is watched.
let playing = null;

const take = (value, { set, texts, samples }) => {
  Object.assign(value, set);
  value.texts = value.texts.map((text, index) => text + (texts[index] ?? ""));
  value.samples.push(...samples);
};

const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// Calls `show` with the value as it was recorded, at its pace. Of what is returned `finish()` shows the end at once, and
// `end()` is that value.
const play = ({ frames, ...first }, show) => {
  const value = structuredClone(first);
  const start = performance.now();
  let next = 0;
  let timer = null;
  const step = () => {
    const elapsed = still() ? Infinity : (performance.now() - start) / 1000;
    while (next < frames.length && frames[next].at <= elapsed) take(value, frames[next++]);
    if (next < frames.length) timer = setTimeout(step, Math.max(16, frames[next].at * 1000 - (performance.now() - start)));
    show({ ...value, samples: [...value.samples] }, next === frames.length);
  };
  const stop = () => clearTimeout(timer);
  const end = () => {
    stop();
    while (next < frames.length) take(value, frames[next++]);
    return { ...value, samples: [...value.samples] };
  };
  step();
  return { stop, end, finish: () => show(end(), true) };
};
