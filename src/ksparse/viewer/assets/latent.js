"use strict";
// One latent: its numbers, the text that it fires on, and what evaluations found of it.

const SHOWN = 5; // examples of a group that are shown at first, and added by "more"

ksparse.views.latent = async function latentView(path, query, current) {
  const { el, run } = ksparse;
  const number = Number(path[0]);
  if (!/^\d+$/.test(path[0] ?? "") || number >= run.n) {
    ksparse.show(el("p", { class: "missing" },
      `There is no latent ${ksparse.visible(path[0] ?? "")}; the run has 0 to ` +
      `${ksparse.count(run.n - 1)}.`));
    return;
  }
  // The nearest latents arrive a little later than the rest.
  const nearest = run.has.weights ? ksparse.load(`near/${Math.floor(number / run.block)}`) : null;
  const latent = await ksparse.latent(number);
  if (!current()) return;
  document.title = `Latent ${number} · ${run.name}`;
  const near = el("div", { class: "list" }, el("p", { class: "none" }, "…"));
  ksparse.show(head(latent), el("div", { class: "latent" },
    el("div", { class: "texts" }, texts(latent)),
    el("div", { class: "panels" }, panels(latent, near))));
  performance.mark("latent");
  if (nearest) {
    const entries = (await nearest).near[number];
    if (current()) {
      near.replaceChildren(...rows(
        entries.map(([other, cosine, gloss]) => [other, cosine.toFixed(2), gloss])));
    }
  }
  setTimeout(prefetchNeighbours, 200);

  function prefetchNeighbours() { // so that the keys j and k respond at once
    for (const other of [number + 1, number - 1]) {
      if (current() && other >= 0 && other < run.n) ksparse.latent(other).catch(() => {});
    }
  }

  // ---- the top

  function explanation() {
    const found = ksparse.labels.explained[number];
    if (!found) return null;
    const score = (key) => `${key} ${
      key in found ? ksparse.format(found[key], "percent") : "– the judge cannot tell"}`;
    return el("p", { class: "note", id: "explanation" }, "Explained by a model: ",
      el("bdi", {}, ksparse.visible(found.text)),
      el("span", { class: "aside" }, `${score("detection")} · ${score("fuzzing")}`));
  }

  function head({ values }) {
    const { label, star } = ksparse.labels.of(number);
    const starButton = el("button", {
      type: "button", id: "star", class: "star", title: "Star (s)",
      "aria-pressed": String(star), on: { click: () => ksparse.star() },
    }, star ? "★" : "☆");
    const labelInput = el("input", {
      id: "label", class: "label", value: label, maxlength: 1000, placeholder: "your label",
      "aria-label": "Label of this latent",
      on: {
        change: (event) =>
          ksparse.saving(ksparse.labels.set(number, { label: event.target.value.trim() })),
        keydown: (event) => {
          if (event.key === "Enter" || event.key === "Escape") event.target.blur();
        },
      },
    });
    const step = (to, title, sign) =>
      el("a", { class: "step", href: `#/latent/${(to + run.n) % run.n}`, title }, sign);
    const measured = run.columns.filter(({ key }) => key in values);
    return el("div", { class: "latent-head" },
      el("div", { class: "title" },
        step(number - 1, "previous", "‹"), el("h1", {}, `Latent ${number}`),
        step(number + 1, "next", "›"), starButton, labelInput,
        ksparse.live
          ? el("a", { class: "button", href: ksparse.to("try", { latent: number }) },
            "Steer with this latent")
          : null),
      explanation(),
      el("dl", { class: "values" }, measured.map(({ key, label: name, kind, reading }) =>
        el("div", { title: reading }, el("dt", {}, name),
          el("dd", {}, ksparse.format(values[key], kind))))));
  }

  // ---- text

  function texts({ top, band, bands, random, strings, values }) {
    if (ksparse.lacks("stats")) return ksparse.notEvaluated();
    if (values.density === 0) {
      return ksparse.box(`This latent never fires on ${run.text}, so there is no text to show.` +
        " It may on more:", run.commands.more_text);
    }
    if (!top) {
      return ksparse.box("This run was evaluated without examples. This command adds them:",
        run.commands.examples);
    }
    const text = (tokens, acts, at, borders) =>
      ksparse.text(tokens, acts, values.max_act, at, ksparse.number, borders);
    const item = (example) => {
      const short = text(
        example.t.map((i) => strings[i]), example.a, example.at, example.borders);
      const place = el("div", {}, short);
      const button = el("button", {
        type: "button", class: "button small widen", "aria-expanded": "false",
        title: "Show the whole context", on: { click: () => widen() },
      }, "↔");
      short.addEventListener("click", () => widen());
      let wide = null;
      const limits = el("p", { class: "note" },
        "Values are stored around the marked token; elsewhere the latent may fire unseen.");
      async function widen() {
        if (getSelection().toString()) return; // the reader selects text
        if (!wide) {
          const { tokens, borders } = await ksparse.context(example.c);
          const acts = tokens.map((_, i) => example.a[i - example.from] ?? 0);
          wide = text(tokens, acts, example.from + example.at, borders);
          wide.classList.add("whole");
          wide.addEventListener("click", () => widen());
        }
        const open = button.getAttribute("aria-expanded") !== "true";
        button.setAttribute("aria-expanded", String(open));
        place.replaceChildren(...(open ? [wide, limits] : [short]));
      }
      return el("li", {},
        el("data", { value: example.v }, ksparse.number(example.v)), place, button);
    };
    const list = (examples) => {
      const rest = examples.slice(SHOWN);
      const items = el("ol", { class: "texts-list" }, examples.slice(0, SHOWN).map(item));
      if (!rest.length) return items;
      const more = el("button", {
        type: "button", class: "button small more",
        on: {
          click: () => {
            items.append(...rest.splice(0, SHOWN).map(item));
            if (!rest.length) more.remove();
          },
        },
      }, "more");
      return [items, more];
    };
    const group = (title, aside, examples) => el("section", { class: "group" },
      el("h2", {}, title, el("span", { class: "aside" }, aside)),
      examples.length
        ? list(examples)
        : el("p", { class: "none" }, "None."));
    const lines = el("button", {
      type: "button", class: "button small", id: "lines", "aria-pressed": String(ksparse.lines()),
      title: "Break lines where the text does (n)",
      on: { click: () => ksparse.lines(!ksparse.lines()) },
    }, "↵ line breaks");
    return [
      lines,
      group("Top", "its strongest, at most one per context", top),
      ...(band ? splitBands(band, bands).map((entry) => group(...entry)) : []),
      group("Random", "drawn from all tokens on which it fires", random),
    ];
  }

  function splitBands(examples, { count, each }) {
    const share = (part) => `${Math.round((100 * part) / count)} %`;
    const title = (i) => {
      if (i === 0) return `Largest ${share(1)}`;
      return i === count - 1 ? `Smallest ${share(1)}` : `From ${share(i)} to ${share(i + 1)}`;
    };
    return Array.from({ length: count }, (_, i) => [
      title(i), "drawn from this part of its activations, by size",
      examples.filter(({ place }) => Math.floor(place / each) === i),
    ]);
  }

  // ---- what evaluations found

  function panels(details, nearestList) {
    const { values, strings } = details;
    const panel = (title, aside, ...children) => el("section", { class: "panel" },
      el("h2", {}, title, aside ? el("span", { class: "aside" }, aside) : null), children);
    // The panel of an evaluation; left out where one box says that it was not run.
    const measured = (name, ...parts) => (ksparse.lacks(name) ? null : panel(...parts));
    return [
      details.histogram
        ? panel("How large", "activations by value, counts on a log axis",
          histogram(details.histogram, values.max_act))
        : null,
      details.on
        ? panel(
          "Fires on",
          details.on_mass ? "share of its activation mass" : "share of its activations",
          bars(details.on.map(([i, share]) => [strings[i], share])))
        : null,
      details.logits
        ? panel("Direct logits", "of its decoder row", logits(details.logits, strings))
        : null,
      measured("ablation", "Effect", details.effect ? "ablated where it is strongest" : "",
        details.effect
          ? effect(details.effect, strings)
          : el("p", { class: "none" }, "It was not ablated.")),
      measured("n2g", "Patterns", "that predict it",
        details.patterns
          ? patterns(details.patterns, values)
          : el("p", { class: "none" }, "No pattern was built for it.")),
      measured("probes", "Probe tasks", "for which it is among the ten best latents",
        details.tasks.length
          ? el("ul", { class: "plain-list" }, details.tasks.map(task))
          : el("p", { class: "none" }, "None.")),
      run.has.weights ? panel("Nearest", "cosine of decoder directions", nearestList) : null,
      ksparse.nearestElsewhere(number, current),
      details.together
        ? panel("Fires with", "correlation, tokens in common", el("div", { class: "list" },
          rows(details.together.map(([other, phi, both, gloss]) =>
            [other, `${phi.toFixed(2)} · ${ksparse.count(both)}`, gloss]))))
        : null,
      ksparse.lacks("stats") ? null : ksparse.notEvaluated(), // else it is in the place of the text
    ];
  }

  function task({ name, place, gain }) {
    const sign = gain > 0 ? "+" : "";
    const gained = gain == null ? "" : `, ${sign}${gain.toFixed(3)} nats on the baselines`;
    return el("li", {}, el("a", { href: ksparse.to("search", { q: name }) }, name),
      el("span", { class: "aside" }, place === 1 ? `best${gained}` : `place ${place}`));
  }

  function rows(entries) {
    if (!entries.length) return [el("p", { class: "none" }, "None.")];
    return entries.map(([other, remark, gloss]) => el("div", { class: "row" },
      el("span", { class: "said" }, remark), ksparse.link(other, gloss)));
  }

  function patterns({ count, shown }, values) {
    const scores = ["precision", "recall", "f1"].filter((key) => ksparse.known(values[key]))
      .map((key) => `${key === "f1" ? "F1" : key} ${ksparse.percent(values[key])}`);
    const item = ({ parts, value, support }) => el("li", {}, el("p", { class: "text" },
      parts.map(([text, sign]) => [
        sign ? el("b", { class: "sign" }, text) : el("bdi", {}, text), " "]),
      "→ ", ksparse.number(value ?? 0),
      el("span", { class: "aside" }, ` ${support} example${support === 1 ? "" : "s"}`)));
    return [
      scores.length ? el("p", { class: "scores" }, scores.join(" · ")) : null,
      el("ul", { class: "patterns" }, shown.map(item)),
      count > shown.length
        ? el("p", { class: "none" }, `${shown.length} of ${count}, those with the most examples`)
        : null,
    ];
  }

  // KL token by token as a heat map, and the tokens whose logits change at the chosen one.
  function effect({ t, at, kl, loss, up, down }, names) {
    const moved = el("div", { class: "moved" });
    const largest = Math.max(...kl.filter(ksparse.known), 0);
    const tokenList = (entries) => (entries.length
      ? entries.map(([i, change]) =>
        ksparse.quoted(names[i], (change > 0 ? "+" : "") + change.toFixed(2)))
      : el("span", { class: "none" }, "nothing"));
    const choose = (step) => {
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === step)));
      const after = step === 0 ? "its token" : `${step} token${step > 1 ? "s" : ""}`;
      const change = ksparse.known(loss[step])
        ? `, loss ${loss[step] > 0 ? "+" : ""}${ksparse.number(loss[step])}`
        : "";
      const directions = [["raises", up[step] ?? []], ["lowers", down[step] ?? []]];
      moved.replaceChildren(
        el("p", { class: "scores" }, `after ${after}: KL ${ksparse.format(kl[step])} nats`, change),
        ...directions.map(([word, entries]) => el("div", {}, el("span", { class: "aside" }, word),
          el("span", { class: "text" }, tokenList(entries)))));
    };
    const heat = (step) =>
      largest > 0 && ksparse.known(kl[step]) ? (kl[step] / largest).toFixed(2) : 0;
    const buttons = t.slice(at).map((i, step) => el("button", {
      type: "button", class: "token", title: `KL ${ksparse.format(kl[step])} nats`,
      on: { click: () => choose(step) }, style: { "--a": heat(step) },
    }, names[i]));
    choose(0);
    const before = t.slice(0, at).map((i) => names[i]).join("");
    return [el("p", { class: "text effect" }, before, buttons), moved];
  }

  // What the decoder row alone does to the logits: the tokens at both ends, and how all lie.
  function logits({ raises, lowers, histogram: counts, blocks_left_out: left }, strings) {
    const part = (word, entries) => [
      el("p", { class: "scores" }, word),
      el("div", { class: `logits ${word}` },
        bars(entries.map(([i, value]) => [strings[i], value]), signed))];
    const width = 320, height = 48, step = width / counts.length, most = Math.max(1, ...counts);
    const heightOf = (count) => height * Math.sqrt(count / most); // so that the tails are seen
    const edge = (i) => (i - counts.length / 2) / 2;
    return [
      part("raises", raises), part("lowers", lowers),
      el("svg", {
        class: "histogram logit-histogram", viewBox: `0 0 ${width} ${height}`, role: "img",
        preserveAspectRatio: "none",
        "aria-label": "Histogram of the direct logits of all tokens, from -8 to 8 deviations",
      }, counts.map((count, i) => el("g", { class: "bin" },
        el("title", {}, `${edge(i)} to ${edge(i + 1)} deviations: ${ksparse.count(count)} tokens`),
        el("rect", {
          class: "bar-of", x: i * step + 0.5, y: height - heightOf(count),
          width: step - 1, height: heightOf(count),
        }))), el("line", { x1: 0, y1: height, x2: width, y2: height })),
      el("div", { class: "axis" },
        el("span", {}, "−8"), el("span", {}, "standard deviations"), el("span", {}, "8")),
      left ? el("p", { class: "none" },
        `through the final norm and the unembedding, past ${left} block${left === 1 ? "" : "s"}`)
        : null,
    ];
  }

  function signed(value) {
    return `${value > 0 ? "+" : ""}${value.toFixed(2)}`;
  }

  function bars(entries, format = ksparse.percent) {
    const largest = Math.max(1e-9, ...entries.map(([, share]) => Math.abs(share)));
    return el("ul", { class: "bars" }, entries.map(([token, share]) => el("li", {},
      el("bdi", { class: "text" }, `"${token}"`),
      el("span", { class: "track" },
        el("span", { class: "fill", style: { width: `${(100 * Math.abs(share)) / largest}%` } })),
      el("span", { class: "said" }, format(share)))));
  }

  function histogram(counts, largest) {
    const width = 320, height = 84, step = width / counts.length;
    const most = Math.log(Math.max(2, ...counts));
    const heightOf = (count) => (count ? 4 + (height - 4) * (Math.log(count) / most) : 0);
    const edge = (i) => ksparse.number((i * largest) / counts.length);
    const bar = (count, i) => el("g", { class: "bin" },
      el("title", {}, `${edge(i)} to ${edge(i + 1)}: ${ksparse.count(count)} tokens`),
      el("rect", { class: "room", x: i * step, y: 0, width: step, height }),
      el("rect", {
        class: "bar-of", x: i * step + 0.5, y: height - heightOf(count),
        width: step - 1, height: heightOf(count),
      }));
    const total = ksparse.count(counts.reduce((a, b) => a + b, 0));
    return [
      el("svg", {
        class: "histogram", viewBox: `0 0 ${width} ${height}`, role: "img",
        preserveAspectRatio: "none",
        "aria-label": `Histogram of ${total} activations from 0 to ${ksparse.number(largest)}`,
      }, counts.map(bar), el("line", { x1: 0, y1: height, x2: width, y2: height })),
      el("div", { class: "axis" }, el("span", {}, "0"), el("span", {}, ksparse.number(largest))),
    ];
  }
};

// ---- what keys do too

ksparse.star = function star() {
  const button = document.getElementById("star");
  const { path } = ksparse.address();
  if (!button || path[0] !== "latent") return;
  const starred = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", String(starred));
  button.textContent = starred ? "★" : "☆";
  ksparse.saving(ksparse.labels.set(Number(path[1]), { star: starred }));
};

// Return whether texts are shown with their line breaks, after setting it if a value is given.
ksparse.lines = function lines(value) {
  if (value !== undefined) {
    document.documentElement.classList.toggle("lines", value);
    document.getElementById("lines")?.setAttribute("aria-pressed", String(value));
  }
  return document.documentElement.classList.contains("lines");
};

ksparse.saving = (promise) => promise.catch((error) => ksparse.say(`Not saved: ${error.message}`));
