"use strict";
// Latents to steer with, each with a slider; how the text is continued; and both texts, without and
// with steering.

const REACH = 3; // the slider's ends, in multiples of a latent's largest activation
const FIRST = 2; // the multiple that a latent begins with
const FIRST_TOKENS = 10; // next tokens that are listed at first
const SAMPLING = { tokens: 24, temperature: 0, seed: 0 };

// ksparse.steering({ query, largest, result, current, text }) -> the form and what others do to it.
//   query    of the address: steer=12:2,40:-1&tokens=24&temperature=0&seed=0&at=3, or latent=12 for
//            a latent that is set but not run yet
//   largest  the largest activation of every latent, or null
//   result   the element that takes the texts
//   text     returns the text as it is now
ksparse.steering = function steering({ query, largest, result, current, text }) {
  const { el, run } = ksparse;
  const chosen = new Map(); // latent -> its row's input
  const rows = el("div", { id: "steered" });
  const add = el("input", {
    id: "add", inputmode: "numeric", size: 8, placeholder: "latent", "aria-label": "Latent to add",
  });
  const option = (name, least, most, step) => el("input", {
    id: name, type: "number", min: least, max: most, step, required: true,
    value: query.get(name) ?? SAMPLING[name],
  });
  const options = {
    tokens: option("tokens", 1, 256, 1),
    temperature: option("temperature", 0, 100, "any"),
    seed: option("seed", 0, 2 ** 32 - 1, 1),
  };
  const only = el("option", { value: query.get("at") ?? "" }, "only at one token");
  const where = el("select", { id: "where", "aria-label": "Where it is steered" },
    el("option", { value: "" }, "at every token"), only);
  if (query.get("at")) where.value = query.get("at");
  const go = el("button", { class: "button primary", id: "steer" }, "Steer");
  const halt = el("button", {
    type: "button", class: "button", id: "stop", hidden: true, on: { click: () => stop() },
  }, "Stop");
  const form = el("form", {
    class: "steering", on: {
      submit: (event) => {
        event.preventDefault();
        start();
      },
    },
  },
  el("h2", {}, "Steer with", el("span", { class: "aside" },
    largest ? `× its largest activation on ${run.text}` : "× its largest activation")),
  rows,
  el("div", { class: "add" }, add, el("button", {
    type: "button", class: "button small", id: "add-latent", on: { click: () => addTyped() },
  }, "Add a latent")),
  el("div", { class: "options" },
    el("label", {}, "length ", options.tokens),
    el("label", { title: "0: always the likeliest token" }, "temperature ", options.temperature),
    el("label", {}, "seed ", options.seed), where),
  el("div", { class: "actions" }, go, halt, el("span", { class: "aside" }, "Ctrl + Enter")));
  add.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    addTyped();
  });
  options.temperature.addEventListener("input", showSeed);
  showSeed();

  const made = {
    form, onChoice: null, wanted: false, stop, run: start, add: addLatent,
    latents: () => [...chosen.keys()],
    // The token that "only at one token" means.
    place(at, token) {
      only.value = at;
      only.textContent = `only at “${token}”`;
    },
  };
  const steer = (query.get("steer") ?? "").split(",").map((part) => part.split(":"))
    .filter(([latent]) => exists(latent));
  for (const [latent, times] of steer) addLatent(Number(latent), times);
  made.wanted = steer.length > 0;
  if (!steer.length && exists(query.get("latent"))) addLatent(Number(query.get("latent")));
  showEmpty();
  result.replaceChildren(el("p", { class: "none" },
    "Here the text goes on twice: without steering, and with it."));
  return made;

  function exists(latent) {
    return /^\s*\d+\s*$/.test(latent ?? "") && Number(latent) < run.n;
  }

  function showSeed() { // which the likeliest tokens need not
    options.seed.disabled = Number(options.temperature.value) === 0;
  }

  function showEmpty() {
    go.disabled = chosen.size === 0;
    if (chosen.size) return;
    rows.replaceChildren(el("p", { class: "none" },
      "No latent yet. Add one by its number, or from the latents on the text below."));
  }

  function addTyped() {
    if (exists(add.value)) {
      addLatent(Number(add.value));
      add.value = "";
    } else {
      ksparse.say(`There is no latent ${ksparse.visible(add.value)}; the run has 0 to ` +
        `${ksparse.count(run.n - 1)}.`);
    }
  }

  function addLatent(latent, times = FIRST) {
    if (chosen.has(latent)) {
      chosen.get(latent).focus();
      return;
    }
    if (!chosen.size) rows.replaceChildren();
    const slider = el("input", {
      type: "range", min: -REACH, max: REACH, step: 0.1, class: "slider",
      "aria-label": `Latent ${latent}, in multiples of its largest activation`,
    });
    const value = el("input", {
      type: "number", step: "any", required: true, class: "times", min: -1e6, max: 1e6,
      "aria-label": `Multiple of latent ${latent}`,
    });
    const said = el("span", { class: "said" }), beyond = el("p", { class: "beyond", hidden: true });
    const name = el("span", { class: "named" }, ksparse.link(latent));
    ksparse.gloss(latent).then((gloss) => name.replaceChildren(
      ...ksparse.link(latent, gloss).filter(Boolean))).catch(() => {});
    const set = (number) => {
      const most = largest?.[latent];
      const known = most > 0 && Number.isFinite(number); // not so while "-" is typed
      said.textContent = known
        ? `× ${ksparse.number(most)} = ${ksparse.number(number * most)}`
        : "×";
      // The track is filled from 0 to the value.
      const place = (end) => `${50 + (50 * (end || 0)) / REACH}%`;
      slider.style.setProperty("--low", place(Math.max(-REACH, Math.min(0, number))));
      slider.style.setProperty("--high", place(Math.min(REACH, Math.max(0, number))));
      beyond.hidden = !(Math.abs(number) > REACH);
      beyond.textContent = `More than ${REACH} times its largest activation: what the LM does ` +
        "there says little about the latent.";
    };
    slider.addEventListener("input", () => {
      value.value = slider.value;
      set(slider.valueAsNumber);
    });
    value.addEventListener("input", () => {
      slider.value = value.value;
      set(value.valueAsNumber);
    });
    const row = el("div", { class: "steered", "data-latent": latent },
      el("div", { class: "of" }, name, el("button", {
        type: "button", class: "remove", title: "Remove", "aria-label": `Remove latent ${latent}`,
        on: {
          click: () => {
            chosen.delete(latent);
            row.remove();
            showEmpty();
          },
        },
      }, "×")),
      el("div", { class: "by" },
        el("div", { class: "knob" }, slider, el("div", { class: "axis" },
          el("span", {}, `−${REACH}`), el("span", {}, "0"), el("span", {}, String(REACH)))),
        value, said),
      beyond);
    value.value = slider.value = Number.isFinite(Number(times)) ? Number(times) : FIRST;
    slider.value = value.value;
    set(value.valueAsNumber);
    chosen.set(latent, value);
    rows.append(row);
    go.disabled = false;
    made.onChoice?.(latent);
  }

  function stop() {
    made.running?.abort();
  }

  async function start() {
    if (!chosen.size || !form.reportValidity()) return;
    stop();
    const running = made.running = new AbortController();
    const latents = [...chosen].map(([latent, value]) => [latent, value.valueAsNumber]);
    const sampling = Object.fromEntries(
      Object.entries(options).map(([name, field]) => [name, Number(field.value)]));
    const at = where.value === "" ? null : Number(where.value);
    const body = { text: text(), latents, at, ...sampling };
    history.replaceState(null, "", ksparse.inRun(ksparse.to("try", {
      text: body.text, steer: latents.map((pair) => pair.join(":")).join(","), at,
      ...Object.fromEntries(Object.entries(sampling)
        .filter(([name, value]) => value !== SAMPLING[name])),
    })));
    halt.hidden = false;
    result.replaceChildren(
      el("p", { class: "note" }, "Running the LM, without and with steering …"));
    try {
      const change = await ksparse.request("steer", body, { signal: running.signal });
      if (current() && made.running === running) show(change, body.text);
    } catch (error) {
      if (made.running !== running || !current()) return;
      const aborted = error.name === "AbortError";
      result.replaceChildren(el("p", { class: "missing", role: "alert" },
        aborted ? "Stopped." : error.message));
    } finally {
      if (made.running === running) halt.hidden = true;
    }
  }

  function show(change, prompt) {
    result.replaceChildren(...texts(change, prompt), ...predictions(change));
    const { bottom, top } = result.firstChild.getBoundingClientRect();
    if (top < 0 || bottom > innerHeight) result.scrollIntoView({ block: "start" });
  }

  function texts({ latents, plain, changed, kl, warnings }, prompt) {
    const shown = ksparse.visible(prompt.slice(-60)).replaceAll("⟨U+000A⟩", "↵");
    const side = (title, pieces, kind) => el("div", { class: `side ${kind}` },
      el("h3", {}, title), el("p", { class: "text" },
        el("span", { class: "prompt" }, prompt.length > 60 ? `…${shown}` : shown),
        el("span", { class: "written" }, pieces.map(([piece, differs]) =>
          (differs ? el("mark", { class: "differs" }, piece) : piece)))));
    const same = !plain.concat(changed).some(([, differs]) => differs);
    const unknown = latents.filter(({ largest_of: of, times }) => of !== "stats" && times)
      .map(({ latent, largest: most, largest_of: of }) =>
        `Of latent ${latent} no larger value is known than ${ksparse.number(most)}, its largest ` +
        `on ${of === "text" ? "this text" : "any input of typical norm"}.`);
    return [
      el("div", { class: "sides", id: "continuations" },
        side("Without steering", plain, "was"), side("With steering", changed, "held")),
      el("p", { class: "note", id: "difference" },
        same ? "Both texts are the same. " : "Where they differ is marked. ",
        `KL of the next prediction ${ksparse.format(kl)} nats.`),
      ...[...unknown, ...warnings].map((words) => el("p", { class: "beyond" }, sentence(words))),
    ];
  }

  function sentence(words) {
    return words[0].toUpperCase() + words.slice(1) + (words.endsWith(".") ? "" : ".");
  }

  function predictions({ predictions: listed }) {
    const most = Math.max(...listed.flatMap((row) => [row.plain, row.changed]));
    const bar = (probability, side) => el("td", {},
      el("span", { class: "track" }, el("span", {
        class: `fill ${side}`, style: { width: `${(100 * probability) / most}%` },
      })),
      el("span", { class: "said" }, ksparse.percent(probability)));
    const row = ({ token, plain, changed }) => el("tr", {},
      el("th", { scope: "row" }, el("bdi", { class: "text" }, `"${token}"`)),
      bar(plain, "was"), bar(changed, "held"));
    const body = el("tbody", {}, listed.slice(0, FIRST_TOKENS).map(row));
    const rest = listed.slice(FIRST_TOKENS);
    const more = el("button", {
      type: "button", class: "button small more",
      on: {
        click: () => {
          body.append(...rest.map(row));
          more.remove();
        },
      },
    }, `all ${listed.length}`);
    return [
      el("table", { class: "predictions", id: "predictions" },
        el("thead", {}, el("tr", {}, ["Next token", "Without", "With"].map((title) =>
          el("th", { scope: "col" }, title)))), body),
      ...(rest.length ? [more] : [])];
  }
};
