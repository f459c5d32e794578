"use strict";
// Boxes that say what is missing, each with one command that can be copied.

// A command with a button that copies it. It wraps, so that nothing of it is cut.
ksparse.command = function command(text) {
  const { el } = ksparse;
  const code = el("code", {}, text);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
    } catch { // a browser that does not allow it
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 2_000);
  };
  const button = el("button", {
    type: "button", class: "button small copy", "aria-live": "polite", on: { click: copy },
  }, "Copy");
  return el("span", { class: "command" }, code, button);
};

ksparse.box = (sentence, command) =>
  ksparse.el("div", { class: "missing box" }, ksparse.el("p", {}, sentence),
    command ? ksparse.command(command) : null);

ksparse.missing = (adds, command) =>
  ksparse.box(`Not in this run: ${adds}. This command adds it:`, command);

// One box for everything that the run lacks; null if it lacks nothing.
ksparse.notEvaluated = function notEvaluated() {
  const { missing } = ksparse.run;
  if (!missing) return null;
  return ksparse.box(
    missing.evaluated
      ? `Not in this run yet: ${missing.adds.join("; ")}. This command adds it:`
      : "This run has not been evaluated yet. This command finds the text that its latents fire " +
        "on, what they do, and what they know:",
    missing.command);
};

ksparse.lacks = (name) => ksparse.run.lacks.some((lack) => lack.name === name);
