"use strict";
// Try it: a text's latents, token by token; a latent held at a value, and what the LM makes of it.

ksparse.views.try = async function tryView(path, query, current) {
  const { el, run } = ksparse;
  document.title = `${run.name} · try it`;
  if (!ksparse.live) {
    ksparse.show(el("h1", {}, "Try it"), el("p", { class: "missing" },
      "This needs the LM, which these pages come without. Start ", el("code", {}, run.serve),
      " to use it."));
    return;
  }
  const readNumber = (name) =>
    /^\d+$/.test(query.get(name) ?? "") ? Number(query.get(name)) : null;
  const state = {
    text: query.get("text") ?? "", latent: readNumber("latent"), at: readNumber("at"),
    value: query.get("value"),
  };
  const input = el("textarea", {
    id: "text", rows: 3, maxlength: 20000, spellcheck: "false", "aria-label": "Text to read",
    placeholder: "Type a text to see its latents, token by token",
  });
  input.value = state.text;
  const submit = (event) => {
    event.preventDefault();
    go({ text: input.value, at: null });
  };
  const form = el("form", { class: "try", on: { submit } }, input, el("div", { class: "actions" },
    el("button", { class: "button", id: "read" }, "Read it"),
    el("span", { class: "aside" }, "Ctrl + Enter")));
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  const reading = el("div", { class: "read", "aria-live": "polite" });
  const effect = el("div", { class: "effect-of", "aria-live": "polite" });
  ksparse.show(el("h1", {}, "Try it"), form, reading, effect);
  if (!state.text) return;
  try {
    reading.replaceChildren(el("p", { class: "note" }, "Reading the text with the LM …"));
    const activations = await ksparse.request("activations", { text: state.text });
    if (current()) await showActivations(activations);
  } catch (error) {
    reading.replaceChildren(el("p", { class: "missing" }, error.message));
  }

  async function showActivations({ tokens, latents }) {
    const largest = await ksparse.largestValues();
    const last = tokens.length - 1;
    const at = state.at == null || state.at > last ? last : state.at;
    state.latent ??= latents[at][0]?.[0] ?? null; // at first, the largest on the token
    const values = latents.map(
      (active) => active.find(([other]) => other === state.latent)?.[1] ?? 0);
    const glosses = await Promise.all(latents[at].map(([other]) => ksparse.gloss(other)));
    if (!current()) return;
    reading.replaceChildren(
      tokenButtons(tokens, values, at, largest),
      el("p", { class: "note" }, explainColour(),
        " Choose a token to see its latents, and a latent to see it on the text."),
      el("div", { class: "try-columns" },
        activeLatents(tokens[at], latents[at], glosses, largest),
        holdForm(values, at, tokens, largest)));
    if (state.latent != null && state.value != null) await showChange();
  }

  function tokenButtons(tokens, values, at, largest) {
    const most = Math.max(...values, largest?.[state.latent] || 0);
    return el("p", { class: "text tokens" }, tokens.map((token, i) => el("button", {
      type: "button", class: "token", "aria-pressed": String(i === at),
      title: ksparse.number(values[i]),
      style: { "--a": most > 0 ? (values[i] / most).toFixed(2) : 0 },
      on: { click: () => go({ at: i }) },
    }, token)));
  }

  function explainColour() {
    if (state.latent == null) return "No latent is active here, so nothing is coloured.";
    return ["The colour is latent ",
      el("a", { href: `#/latent/${state.latent}` }, String(state.latent)),
      ", relative to its maximum."];
  }

  function activeLatents(token, active, glosses, largest) {
    const share = (other, value) =>
      largest?.[other] > 0 ? ` · ${Math.round((100 * value) / largest[other])} %` : "";
    const row = ([other, value], i) => el("div", { class: "row" },
      el("span", { class: "said" }, `${ksparse.number(value)}${share(other, value)}`),
      el("button", {
        type: "button", class: "small button", title: `Show latent ${other} on the text`,
        "aria-pressed": String(other === state.latent), on: { click: () => go({ latent: other }) },
      }, "show"),
      ksparse.link(other, glosses[i]));
    return el("section", {},
      el("h2", {}, "Latents on ", el("bdi", { class: "text" }, `"${token}"`),
        el("span", { class: "aside" }, "value, and share of the latent’s maximum")),
      el("div", { class: "list", id: "active", tabindex: 0 }, active.map(row)));
  }

  function holdForm(values, at, tokens, largest) {
    if (state.latent == null) return null;
    const here = Math.max(...values), most = largest?.[state.latent] || here || 1;
    const value = el("input", {
      id: "value", type: "number", step: "any", required: true,
      value: state.value ?? ksparse.number(most).replaceAll(",", ""),
      "aria-label": "Value to hold the latent at",
    });
    const where = query.get("where");
    const place = el("select", { id: "where", "aria-label": "Where it is held" },
      el("option", { value: "" }, "at every token"),
      el("option", { value: at, selected: where != null && where !== "" },
        `only at “${tokens[at]}”`));
    const hold = (to) => go({ value: to, where: place.value, at });
    const submit = (event) => {
      event.preventDefault();
      hold(value.value);
    };
    const elsewhere = largest ? `; on ${run.text} at most ${ksparse.number(most)}` : "";
    return el("section", { class: "holding" },
      el("h2", {}, "Hold ",
        el("a", { href: `#/latent/${state.latent}` }, `latent ${state.latent}`)),
      el("form", { class: "hold", on: { submit } },
        el("label", {}, "at ", value), place,
        el("button", { class: "button", id: "hold" }, "Hold it"),
        el("button", {
          type: "button", class: "button", id: "ablate", on: { click: () => hold("0") },
        }, "Ablate it")),
      el("p", { class: "note" },
        `Here its value is at most ${ksparse.number(here)}${elsewhere}. Everything else in the ` +
        "activation stays as it is, the autoencoder’s error included."));
  }

  async function showChange() {
    const where = query.get("where");
    effect.replaceChildren(el("p", { class: "note" }, "Running the LM …"));
    try {
      const change = await ksparse.request("change", {
        text: state.text, latent: state.latent, value: Number(state.value),
        at: where ? Number(where) : null,
      });
      if (current()) effect.replaceChildren(...changeOf(change));
    } catch (error) {
      effect.replaceChildren(el("p", { class: "missing" }, error.message));
    }
  }

  function changeOf({ predictions, plain, changed, kl }) {
    const value = Number(state.value), word = value === 0 ? "Ablated" : "Held";
    const most = Math.max(...predictions.flatMap((row) => [row.plain, row.changed]));
    const bar = (probability, side) => el("td", {},
      el("span", { class: "track" }, el("span", {
        class: `fill ${side}`, style: { width: `${(100 * probability) / most}%` },
      })),
      el("span", { class: "said" }, ksparse.percent(probability)));
    const prompt = ksparse.visible(state.text.slice(-160)).replaceAll("⟨U+000A⟩", "↵");
    const continuation = (title, tokens, side) => el("div", { class: `side ${side}` },
      el("h3", {}, title), el("p", { class: "text" },
        el("span", { class: "prompt" }, prompt),
        el("span", { class: "written" }, tokens.join(""))));
    const titles = ["Next token", "As it is", word];
    return [
      el("h2", {}, value === 0 ? "Without it" : `Held at ${ksparse.number(value)}`,
        el("span", { class: "aside" }, `KL of the next prediction ${ksparse.format(kl)} nats`)),
      el("div", { class: "sides", id: "continuations" },
        continuation("As it is", plain, "was"), continuation(word, changed, "held")),
      el("table", { class: "predictions", id: "predictions" },
        el("thead", {}, el("tr", {}, titles.map((title) => el("th", { scope: "col" }, title)))),
        el("tbody", {}, predictions.map((row) => el("tr", {},
          el("th", { scope: "row" }, el("bdi", { class: "text" }, `"${row.token}"`)),
          bar(row.plain, "was"), bar(row.changed, "held"))))),
    ];
  }

  function go(changes) {
    const { text, latent, at, value, where } = {
      ...state, where: query.get("where"), ...changes };
    location.hash = ksparse.to("try", { text, latent, at, value, where });
  }
};
