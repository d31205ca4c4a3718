// A class on this server: join, vote, follow; and for the teacher lead, reset, export. A page from a disk has none.
const CLASS = {
  code: null, token: null, teacher: false, follows: true, state: null, failed: "", changed: () => {},
  get on() { return Boolean(this.token); },
};
const POLL = 2000;

const call = async (path, { body, token = CLASS.token } = {}) => {
  const headers = { ...(token ? { Authorization: `Bearer ${token}` } : {}), ...(body ? { "Content-Type": "application/json" } : {}) };
  const answer = await fetch(`class${path}`, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), cache: "no-store" });
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw Object.assign(new Error(found.error || say("class.unreachable")), { status: answer.status });
  return found;
};

// What went wrong, in the lesson's language where it is one of the usual things.
const TOLD = { 401: "class.key", 404: "class.ended", 429: "class.busy" };
const tell = (error) => {
  CLASS.failed = TOLD[error.status] ? say(TOLD[error.status]) : error.status ? error.message : say("class.unreachable");
  CLASS.changed();
};
const within = (path, more) => call(`/${CLASS.code}${path}`, more);

const enter = (code, token, teacher) => {
  Object.assign(CLASS, { code, token, teacher, state: null, failed: "" });
  kept.set("class", { code, token, teacher });
};
const leave = () => { enter(null, null, false); kept.set("class", null); CLASS.changed(); };

const teach = async (key) => {
  try {
    const made = await call("/teach", { body: { key }, token: null });
    enter(made.class, made.token, true);
    await poll();
  } catch (error) { tell(error); }
};

const join = async (code) => {
  const known = kept.get("class");
  try {
    if (known?.code === code) enter(code, known.token, known.teacher);
    else enter(code, (await call(`/${code}/join`, { body: {}, token: null })).token, false);
    await poll();
  } catch (error) { tell(error); }
};

// The token of an ended class, or of one that this server never had, is thrown away; a lost connection is not.
const poll = async () => {
  if (!CLASS.on) return;
  try {
    const found = await within(CLASS.state ? `?seen=${CLASS.state.version}` : "");
    const lost = Boolean(CLASS.failed);
    CLASS.failed = "";
    if (found.votes) CLASS.state = found;
    if (found.votes || lost) CLASS.changed();
  } catch (error) {
    if ([401, 404].includes(error.status)) leave();
    tell(error);
  }
};

const vote = async (question, choice) => {
  if (!CLASS.on || CLASS.teacher) return choice;
  try {
    const { choice: counted } = await within("/vote", { body: { question, choice } });
    await poll();
    return counted;
  } catch (error) { tell(error); return null; }
};
const lead = async (to) => { try { CLASS.state = await within("/lead", { body: to }); CLASS.changed(); } catch (error) { tell(error); } };
const reset = async (question) => { try { CLASS.state = await within("/reset", { body: { question } }); CLASS.changed(); } catch (error) { tell(error); } };
const end = async () => { try { await within("/end", { body: {} }); leave(); CLASS.failed = say("class.over"); CLASS.changed(); } catch (error) { tell(error); } };
const exported = async () => {
  const answer = await fetch(`class/${CLASS.code}/export`, { headers: { Authorization: `Bearer ${CLASS.token}` } });
  const link = el("a", { href: URL.createObjectURL(await answer.blob()), download: `llmq-class-${CLASS.code}.csv` });
  link.click();
  URL.revokeObjectURL(link.href);
};
const rootAddress = () => new URL("../", window.location.href.split(/[?#]/)[0]).href;
const studentsLink = () => `${rootAddress()}lesson/?class=${CLASS.code}`;
const qrAddress = () => `class/${CLASS.code}/qr.svg?at=${encodeURIComponent(rootAddress())}`;
// The central 95 % of how many of `votes` on two texts are right where everybody guesses.
const guessed = (votes) => {
  let chance = votes * Math.log(0.5), sum = 0, low = null;
  for (let right = 0; right <= votes; right += 1) {
    sum += Math.exp(chance);
    if (low === null && sum > 0.025) low = right;
    if (sum >= 0.975) return [low, right];
    chance += Math.log((votes - right) / (right + 1));
  }
  return [low ?? 0, votes];
};

// All votes on the pairs that the teacher has shown the answers of, together.
const allPairs = (step, shown) => {
  const pairs = Object.entries(step.right).filter(([name]) => shown(name) && tallyOf(name)?.counts);
  const sum = (count) => pairs.reduce((all, [name, right]) => all + count(tallyOf(name), right), 0);
  const votes = sum((tally) => tally.votes), [low, high] = guessed(votes);
  return pairs.length > 1 && { pairs: pairs.length, votes, right: sum((tally, right) => tally.counts[right] || 0), low, high };
};
const tallyOf = (question) => CLASS.state?.votes?.[question] ?? null;
