"use strict";
// Try it: a text's latents, token by token; latents steered, and what the LM makes of it.

const FEW = 8; // latents of a token that are listed at first

ksparse.views.try = async function tryView(path, query, current) {
  const { el, run } = ksparse;
  document.title = `${run.name} · try it`;
  if (!ksparse.live) {
    ksparse.show(el("h1", {}, "Try it"), el("p", { class: "missing" },
      "This needs the LM, which these pages come without. Start ", el("code", {}, run.serve),
      " to use it."));
    return;
  }
  const largest = await ksparse.largestValues();
  const text = query.get("text") ?? (await ksparse.load("example")).text;
  if (!current()) return;
  const whole = (name) => (/^\d+$/.test(query.get(name) ?? "") ? Number(query.get(name)) : null);
  const state = { text, token: whole("at"), shown: whole("latent") };
  const input = el("textarea", {
    id: "text", rows: 2, maxlength: 20000, spellcheck: "false", "aria-label": "Text",
    placeholder: "Type a text",
  });
  input.value = text;
  const reading = el("div", { class: "read", id: "reading", "aria-live": "polite" });
  const result = el("div", { class: "effect-of", id: "effect", "aria-live": "polite" });
  const steering = ksparse.steering({ query, largest, result, current, text: () => input.value });
  ksparse.show(el("h1", {}, "Try it"),
    el("div", { class: "try" },
      el("div", { class: "try-text" }, input),
      steering.form, result),
    reading);
  input.addEventListener("change", read);
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) steering.form.requestSubmit();
  });
  steering.onChoice = (latent) => {
    state.shown = latent;
    state.draw?.();
  };
  ksparse.leave = () => {
    steering.stop();
    state.reading?.abort();
  };
  if (steering.wanted) steering.run();
  await read();

  // Ask for the text's latents.
  async function read() {
    state.reading?.abort();
    state.text = input.value;
    state.draw = null;
    if (!state.text) {
      reading.replaceChildren();
      return;
    }
    const { signal } = state.reading = new AbortController();
    reading.replaceChildren(el("p", { class: "note" }, "Reading the text with the LM …"));
    try {
      const found = await ksparse.request("activations", { text: state.text }, { signal });
      if (!current() || signal.aborted) return;
      const last = found.tokens.length - 1;
      if (state.token == null || state.token > last) state.token = last;
      state.shown ??= steering.latents()[0] ?? found.latents[state.token][0]?.[0] ?? null;
      state.draw = () => draw(found);
      await state.draw();
    } catch (error) {
      if (error.name !== "AbortError" && current()) {
        reading.replaceChildren(el("p", { class: "missing", role: "alert" }, error.message));
      }
    }
  }

  async function draw({ tokens, latents }) {
    const at = state.token;
    const values = latents.map(
      (active) => active.find(([other]) => other === state.shown)?.[1] ?? 0);
    const glosses = await Promise.all(latents[at].map(([other]) => ksparse.gloss(other)));
    if (!current() || at !== state.token) return;
    steering.place(at, tokens[at]);
    const choose = (i) => {
      state.token = i;
      draw({ tokens, latents });
    };
    reading.replaceChildren(
      el("h2", {}, "Latents on this text",
        el("span", { class: "aside" }, "choose a token to see those that are active on it")),
      tokenButtons(tokens, values, at, choose),
      el("p", { class: "note" }, explainColour()),
      activeLatents(tokens[at], latents[at], glosses, () => draw({ tokens, latents })));
  }

  function tokenButtons(tokens, values, at, choose) {
    const most = Math.max(...values, largest?.[state.shown] || 0);
    return el("p", { class: "text tokens" }, tokens.map((token, i) => el("button", {
      type: "button", class: "token", "aria-pressed": String(i === at),
      title: ksparse.number(values[i]),
      style: { "--a": most > 0 ? (values[i] / most).toFixed(2) : 0 },
      on: { click: () => choose(i) },
    }, token)));
  }

  function explainColour() {
    if (state.shown == null) return "No latent is active here, so nothing is coloured.";
    return ["The colour is latent ",
      el("a", { href: `#/latent/${state.shown}` }, String(state.shown)),
      ", relative to its largest activation."];
  }

  function activeLatents(token, active, glosses, redraw) {
    const share = (other, value) =>
      largest?.[other] > 0 ? ` · ${Math.round((100 * value) / largest[other])} %` : "";
    const button = (title, word, pressed, click) => el("button", {
      type: "button", class: "small button", title, "aria-pressed": pressed, on: { click },
    }, word);
    const row = ([other, value], i) => el("div", { class: "row" },
      el("span", { class: "said" }, `${ksparse.number(value)}${share(other, value)}`),
      el("span", { class: "choices" },
        button(`Show latent ${other} on the text`, "show", String(other === state.shown), () => {
          state.shown = other;
          redraw();
        }),
        button(`Steer with latent ${other}`, "steer", null, () => steering.add(other))),
      ksparse.link(other, glosses[i]));
    const list = el("div", { class: "list", id: "active" }, active.slice(0, FEW).map(row));
    const rest = active.slice(FEW);
    const more = rest.length
      ? el("button", {
        type: "button", class: "button small more",
        on: {
          click: () => {
            list.append(...rest.map((entry, i) => row(entry, FEW + i)));
            more.remove();
          },
        },
      }, `all ${active.length}`)
      : null;
    return el("section", { class: "hits" },
      el("h2", {}, "On ", el("bdi", { class: "text" }, `"${token}"`),
        el("span", { class: "aside" }, "value, and share of the latent’s largest")),
      active.length ? list : el("p", { class: "none" }, "None is active."), more);
  }
};
