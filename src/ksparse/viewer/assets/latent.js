"use strict";
// One latent: its numbers, the text that it fires on, and what evaluations found of it.

ksparse.views.latent = async function latentView(path, asked, current) {
  const { el, run } = ksparse;
  const number = Number(path[0]);
  if (!/^\d+$/.test(path[0] ?? "") || number >= run.n) {
    ksparse.show(el("p", { class: "missing" }, `There is no latent ${ksparse.visible(path[0] ?? "")}; the run has 0 to ${ksparse.count(run.n - 1)}.`));
    return;
  }
  const nearest = run.has.weights ? ksparse.load(`near/${Math.floor(number / run.block)}`) : null; // comes a little later than the rest
  const latent = await ksparse.latent(number);
  if (!current()) return;
  document.title = `Latent ${number} · ${run.name}`;
  const near = el("div", { class: "list" }, el("p", { class: "none" }, "…"));
  ksparse.show(head(latent), el("div", { class: "latent" }, el("div", { class: "texts" }, texts(latent)), el("div", { class: "panels" }, panels(latent, near))));
  performance.mark("latent");
  if (nearest) {
    const found = (await nearest).near[number];
    if (current()) near.replaceChildren(...rows(found.map(([other, cosine, gloss]) => [other, cosine.toFixed(2), gloss])));
  }
  setTimeout(() => { for (const other of [number + 1, number - 1]) if (current() && other >= 0 && other < run.n) ksparse.latent(other).catch(() => {}); }, 200); // so that j and k are at once

  // ---- the top

  function head({ values, on, strings }) {
    const { label, star } = ksparse.labels.of(number);
    const starred = el("button", { type: "button", id: "star", class: "star", "aria-pressed": String(star), title: "Star (s)", on: { click: () => ksparse.star() } }, star ? "★" : "☆");
    const named = el("input", { id: "label", class: "label", value: label, maxlength: 1000, placeholder: "a label of your own", "aria-label": "Label of this latent", on: {
      change: (event) => ksparse.saving(ksparse.labels.set(number, { label: event.target.value.trim() })),
      keydown: (event) => { if (event.key === "Enter" || event.key === "Escape") event.target.blur(); } } });
    const step = (to, word) => el("a", { class: "step", href: `#/latent/${(to + run.n) % run.n}`, title: word }, word === "next" ? "›" : "‹");
    return el("div", { class: "latent-head" },
      el("div", { class: "title" }, step(number - 1, "previous"), el("h1", {}, `Latent ${number}`), step(number + 1, "next"), starred, named,
        ksparse.live ? el("a", { class: "button", href: ksparse.to("try", { latent: number }) }, "Try it on a text") : null),
      el("dl", { class: "values" }, run.columns.filter(({ key }) => key in values).map(({ key, label: name, kind, reading }) =>
        el("div", { title: reading }, el("dt", {}, name), el("dd", {}, ksparse.written(values[key], kind))))),
      values.density === 0 ? el("p", { class: "note" }, "It never fires on the evaluation’s text.") : null);
  }

  // ---- text

  function texts({ top, band, bands, random, strings, values }) {
    if (!top) return lacking("stats", "text that it fires on", "There is no text.");
    const group = (title, why, examples) => el("section", { class: "group" }, el("h2", {}, title, el("span", { class: "aside" }, why)),
      examples.length ? el("ol", { class: "texts-list" }, examples.map((example) => el("li", {}, el("data", { value: example.v }, ksparse.number(example.v)),
        ksparse.text(example.t.map((i) => strings[i]), example.a, values.max_act, example.at)))) : el("p", { class: "none" }, "None."));
    const lines = el("button", { type: "button", class: "button small", id: "lines", "aria-pressed": String(ksparse.lines()), title: "Break lines where the text does (n)", on: { click: () => ksparse.lines(!ksparse.lines()) } }, "↵ line breaks");
    return [lines, group("Top", "its strongest, one of a context", top),
      ...(band ? bandsOf(band, bands).map(([title, why, examples]) => group(title, why, examples)) : []),
      group("Random", "drawn from all tokens on which it fires", random)];
  }

  function bandsOf(examples, { count, each }) {
    const share = (part) => `${Math.round((100 * part) / count)} %`;
    return Array.from({ length: count }, (_, i) => [i === 0 ? `Largest ${share(1)}` : i === count - 1 ? `Smallest ${share(1)}` : `From ${share(i)} to ${share(i + 1)}`,
      "at random from this part of its activations, by size", examples.filter(({ place }) => Math.floor(place / each) === i)]);
  }

  // ---- what evaluations found

  function panels(found, nearest) {
    const { values, strings } = found;
    const panel = (title, why, ...children) => el("section", { class: "panel" }, el("h2", {}, title, why ? el("span", { class: "aside" }, why) : null), children);
    return [
      found.histogram ? panel("How large", "activations by value, counts on a log axis", histogram(found.histogram, values.max_act)) : null,
      found.on ? panel("Fires on", "share of its activations", bars(found.on.map(([i, share]) => [strings[i], share]))) : null,
      panel("Effect", found.effect ? "taken out where it is strongest" : "", found.effect ? effect(found.effect, strings) : lacking("ablation", "what taking it out does", "It was not taken out.")),
      panel("Patterns", "that predict it", found.patterns ? patterns(found.patterns, values) : lacking("n2g", "patterns", "No pattern was built for it.")),
      panel("Probe tasks", "that it is among the ten best latents of", found.tasks.length ? el("ul", { class: "plain-list" }, found.tasks.map(({ name, place, gain }) => el("li", {},
        el("a", { href: ksparse.to("search", { q: name }) }, name), el("span", { class: "aside" }, place === 1 ? `best${gain == null ? "" : `, ${gain > 0 ? "+" : ""}${gain.toFixed(3)} nats on its rivals`}` : `place ${place}`)))) : lacking("probes", "probe tasks", "None.")),
      run.has.weights ? panel("Nearest", "cosine of decoder directions", nearest) : null,
      found.together ? panel("Fires with", "correlation, tokens in common", el("div", { class: "list" }, rows(found.together.map(([other, phi, both, gloss]) =>
        [other, `${phi.toFixed(2)} · ${ksparse.count(both)}`, gloss])))) : null,
    ];
  }

  function rows(listed) {
    return listed.length ? listed.map(([other, said, gloss]) => el("div", { class: "row" }, el("span", { class: "said" }, said), ksparse.link(other, gloss))) : [el("p", { class: "none" }, "None.")];
  }

  // Say which command adds what is not there; where the evaluation was run, that it has nothing on this latent.
  function lacking(name, what, nothing) {
    const lack = run.lacks.find(({ command }) => command.endsWith(` ${name}`));
    return lack ? ksparse.missing(what, lack.command) : el("p", { class: "none" }, nothing);
  }

  function patterns({ count, shown }, values) {
    const scores = ["precision", "recall", "f1"].filter((key) => ksparse.known(values[key])).map((key) => `${key === "f1" ? "F1" : key} ${ksparse.percent(values[key])}`);
    return [scores.length ? el("p", { class: "scores" }, scores.join(" · ")) : null,
      el("ul", { class: "patterns" }, shown.map(({ parts, value, support }) => el("li", {}, el("p", { class: "text" },
        parts.map(([text, sign]) => [sign ? el("b", { class: "sign" }, text) : el("bdi", {}, text), " "]), "→ ", ksparse.number(value ?? 0),
        el("span", { class: "aside" }, ` ${support} example${support === 1 ? "" : "s"}`))))),
      count > shown.length ? el("p", { class: "none" }, `${shown.length} of ${count}, those with the most examples`) : null];
  }

  // KL token by token as a heat-map; the tokens that a prediction gains and loses, of the place that is chosen.
  function effect({ t, at, kl, loss, up, down }, names) {
    const moved = el("div", { class: "moved" });
    const largest = Math.max(...kl.filter(ksparse.known), 0);
    const choose = (step) => {
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === step)));
      moved.replaceChildren(el("p", { class: "scores" }, `after ${step === 0 ? "its token" : `${step} token${step > 1 ? "s" : ""}`}: KL ${ksparse.written(kl[step])} nats`,
        ksparse.known(loss[step]) ? `, loss ${loss[step] > 0 ? "+" : ""}${ksparse.number(loss[step])}` : ""),
      ...[["raises", up[step] ?? []], ["lowers", down[step] ?? []]].map(([word, listed]) => el("div", {}, el("span", { class: "aside" }, word), el("span", { class: "text" },
        listed.length ? listed.map(([i, change]) => ksparse.quoted(names[i], (change > 0 ? "+" : "") + change.toFixed(2))) : el("span", { class: "none" }, "nothing")))));
    };
    const buttons = t.slice(at).map((i, step) => el("button", { type: "button", class: "token", title: `KL ${ksparse.written(kl[step])} nats`, on: { click: () => choose(step) },
      style: { "--a": largest > 0 && ksparse.known(kl[step]) ? (kl[step] / largest).toFixed(2) : 0 } }, names[i]));
    choose(0);
    return [el("p", { class: "text effect" }, t.slice(0, at).map((i) => names[i]).join(""), buttons), moved];
  }

  function bars(listed) {
    const largest = Math.max(...listed.map(([, share]) => share));
    return el("ul", { class: "bars" }, listed.map(([token, share]) => el("li", {}, el("bdi", { class: "text" }, `"${token}"`),
      el("span", { class: "track" }, el("span", { class: "fill", style: { width: `${(100 * share) / largest}%` } })), el("span", { class: "said" }, ksparse.percent(share)))));
  }

  function histogram(counts, largest) {
    const width = 320, height = 84, step = width / counts.length;
    const tall = (count) => (count ? 4 + (height - 4) * (Math.log(count) / Math.log(Math.max(2, ...counts))) : 0);
    const bar = (count, i) => {
      const range = `${ksparse.number((i * largest) / counts.length)} to ${ksparse.number(((i + 1) * largest) / counts.length)}: ${ksparse.count(count)} tokens`;
      return el("g", { class: "bin" }, el("title", {}, range), el("rect", { class: "room", x: i * step, y: 0, width: step, height }),
        el("rect", { class: "bar-of", x: i * step + 0.5, y: height - tall(count), width: step - 1, height: tall(count) }));
    };
    const drawn = el("svg", { class: "histogram", viewBox: `0 0 ${width} ${height}`, role: "img", preserveAspectRatio: "none", "aria-label": `Histogram of ${ksparse.count(counts.reduce((a, b) => a + b, 0))} activations from 0 to ${ksparse.number(largest)}` },
      counts.map(bar), el("line", { x1: 0, y1: height, x2: width, y2: height }));
    return [drawn, el("div", { class: "axis" }, el("span", {}, "0"), el("span", {}, ksparse.number(largest)))];
  }
};

// ---- what keys do too

ksparse.star = function star() {
  const button = document.getElementById("star");
  const { path } = ksparse.address();
  if (!button || path[0] !== "latent") return;
  const now = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", String(now));
  button.textContent = now ? "★" : "☆";
  ksparse.saving(ksparse.labels.set(Number(path[1]), { star: now }));
};

// Whether texts break where their lines do.
ksparse.lines = function lines(set) {
  if (set !== undefined) {
    document.documentElement.classList.toggle("lines", set);
    document.getElementById("lines")?.setAttribute("aria-pressed", String(set));
  }
  return document.documentElement.classList.contains("lines");
};

ksparse.saving = (promise) => promise.catch((error) => ksparse.say(`Not saved: ${error.message}`));
