() => {
  // A step of the lesson on the page itself: its card, which the lesson's own files draw. `?lesson=7&live=1` asks for it.
  const asked = new URLSearchParams(window.location.search);
  const root = new URL(`${(window.gradio_config?.root ?? "").replace(/\/$/, "")}/`, window.location.href);
  for (const link of document.querySelectorAll('a[href="lesson/"]')) link.href = new URL("lesson/", root);
  if (!asked.get("lesson") || !asked.get("live") || document.querySelector("#llmq-lesson")) return;
  const load = (name, then) => document.head.append(Object.assign(document.createElement("script"),
    { src: new URL(`lesson/${name}`, root), onload: then }));
  load("data.js", () => load("live.js"));
}
