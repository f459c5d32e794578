"use strict";
// Try it: a text's latents token by token; a latent held at a value, and what the LM makes of that.

ksparse.views.try = async function tryView(path, asked, current) {
  const { el, run } = ksparse;
  document.title = `${run.name} · try it`;
  if (!ksparse.live) {
    ksparse.show(el("h1", {}, "Try it"), el("p", { class: "missing" }, "This needs the LM, which these pages come without. ", el("code", {}, run.serve), " has it."));
    return;
  }
  const number = (name) => (/^\d+$/.test(asked.get(name) ?? "") ? Number(asked.get(name)) : null);
  const state = { text: asked.get("text") ?? "", latent: number("latent"), at: number("at"), value: asked.get("value") };
  const written = el("textarea", { id: "text", rows: 3, maxlength: 20000, spellcheck: "false", "aria-label": "Text to read", placeholder: "Type a text: its latents, token by token" });
  written.value = state.text;
  const form = el("form", { class: "try", on: { submit: (event) => { event.preventDefault(); go({ text: written.value, at: null }); } } }, written,
    el("div", { class: "actions" }, el("button", { class: "button", id: "read" }, "Read it"), el("span", { class: "aside" }, "Ctrl + Enter")));
  written.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit(); });
  const found = el("div", { class: "read", "aria-live": "polite" }), effect = el("div", { class: "effect-of", "aria-live": "polite" });
  ksparse.show(el("h1", {}, "Try it"), form, found, effect);
  if (!state.text) return;
  try {
    found.replaceChildren(el("p", { class: "note" }, "Reading the text with the LM …"));
    const read = await ksparse.ask("activations", { text: state.text });
    if (current()) await shown(read);
  } catch (error) {
    found.replaceChildren(el("p", { class: "missing" }, error.message));
  }

  async function shown({ tokens, latents }) {
    const largest = run.columns.some(({ key }) => key === "max_act") ? await ksparse.column("max_act") : null;
    const at = state.at == null || state.at >= tokens.length ? tokens.length - 1 : state.at;
    state.latent ??= latents[at][0]?.[0] ?? null; // to begin with, the largest on the token
    const values = latents.map((active) => active.find(([other]) => other === state.latent)?.[1] ?? 0);
    const top = Math.max(...values, largest?.[state.latent] || 0);
    const buttons = tokens.map((token, i) => el("button", { type: "button", class: "token", "aria-pressed": String(i === at), title: ksparse.number(values[i]),
      style: { "--a": top > 0 ? (values[i] / top).toFixed(2) : 0 }, on: { click: () => go({ at: i }) } }, token));
    const glosses = await Promise.all(latents[at].map(([other]) => ksparse.gloss(other)));
    if (!current()) return;
    found.replaceChildren(el("p", { class: "text tokens" }, buttons),
      el("p", { class: "note" }, "The colour is ", state.latent == null ? "of no latent: none is active here" : ["latent ", el("a", { href: `#/latent/${state.latent}` }, String(state.latent)), ", up to its largest anywhere"], ". Choose a token to see its latents, and a latent to see it on the text."),
      el("div", { class: "try-columns" }, el("section", {}, el("h2", {}, "Latents on ", el("bdi", { class: "text" }, `"${tokens[at]}"`), el("span", { class: "aside" }, "value, and share of its largest anywhere")),
        el("div", { class: "list", id: "active", tabindex: 0 }, latents[at].map(([other, value], i) => el("div", { class: "row" }, el("span", { class: "said" }, `${ksparse.number(value)}${largest?.[other] > 0 ? ` · ${Math.round((100 * value) / largest[other])} %` : ""}`),
          el("button", { type: "button", class: "small button", title: `Show latent ${other} on the text`, "aria-pressed": String(other === state.latent), on: { click: () => go({ latent: other }) } }, "show"), ksparse.link(other, glosses[i]))))),
      holding(values, at, tokens, largest)));
    if (state.latent != null && state.value != null) await change();
  }

  function holding(values, at, tokens, largest) {
    if (state.latent == null) return null;
    const most = largest?.[state.latent] || Math.max(...values) || 1;
    const value = el("input", { id: "value", type: "number", step: "any", value: state.value ?? ksparse.number(most).replaceAll(",", ""), "aria-label": "Value to hold the latent at", required: true });
    const place = el("select", { id: "where", "aria-label": "Where it is held" }, el("option", { value: "" }, "at every token"), el("option", { value: at, selected: asked.get("where") != null && asked.get("where") !== "" }, `at “${tokens[at]}” alone`));
    const hold = (to) => go({ value: to, where: place.value, at });
    return el("section", { class: "holding" }, el("h2", {}, "Hold ", el("a", { href: `#/latent/${state.latent}` }, `latent ${state.latent}`)),
      el("form", { class: "hold", on: { submit: (event) => { event.preventDefault(); hold(value.value); } } }, el("label", {}, "at ", value), place, el("button", { class: "button", id: "hold" }, "Hold it"),
        el("button", { type: "button", class: "button", id: "ablate", on: { click: () => hold("0") } }, "Ablate it")),
      el("p", { class: "note" }, `Here it is ${ksparse.number(Math.max(...values))} at most; on held-out text up to ${ksparse.number(most)}. All else in the activation, also what the autoencoder misses, stays as it is.`));
  }

  async function change() {
    const where = asked.get("where");
    effect.replaceChildren(el("p", { class: "note" }, "Asking the LM …"));
    try {
      const { predictions, plain, changed, kl } = await ksparse.ask("change", { text: state.text, latent: state.latent, value: Number(state.value), at: where ? Number(where) : null });
      if (!current()) return;
      const most = Math.max(...predictions.flatMap((each) => [each.plain, each.changed]));
      const bar = (value, kind) => el("td", {}, el("span", { class: "track" }, el("span", { class: `fill ${kind}`, style: { width: `${(100 * value) / most}%` } })), el("span", { class: "said" }, ksparse.percent(value)));
      const side = (title, tokens, kind) => el("div", { class: `side ${kind}` }, el("h3", {}, title), el("p", { class: "text" }, el("span", { class: "prompt" }, ksparse.visible(state.text.slice(-160)).replaceAll("⟨U+000A⟩", "↵")), el("span", { class: "written" }, tokens.join(""))));
      effect.replaceChildren(el("h2", {}, Number(state.value) === 0 ? "Without it" : `Held at ${ksparse.number(Number(state.value))}`, el("span", { class: "aside" }, `KL of the next prediction ${ksparse.written(kl)} nats`)),
        el("div", { class: "sides", id: "continuations" }, side("As it is", plain, "was"), side(Number(state.value) === 0 ? "Ablated" : "Held", changed, "held")),
        el("table", { class: "predictions", id: "predictions" }, el("thead", {}, el("tr", {}, ["Next token", "As it is", Number(state.value) === 0 ? "Ablated" : "Held"].map((word) => el("th", { scope: "col" }, word)))),
          el("tbody", {}, predictions.map((each) => el("tr", {}, el("th", { scope: "row" }, el("bdi", { class: "text" }, `"${each.token}"`)), bar(each.plain, "was"), bar(each.changed, "held"))))));
    } catch (error) {
      effect.replaceChildren(el("p", { class: "missing" }, error.message));
    }
  }

  function go(changes) {
    const { text, latent, at, value, where } = { ...state, where: asked.get("where"), ...changes };
    location.hash = ksparse.to("try", { text, latent, at, value, where });
  }
};
