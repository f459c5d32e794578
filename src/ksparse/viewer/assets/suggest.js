"use strict";
// Suggestions below the search field while one types: latents, labels, tasks, tokens. Tokens and
// tasks are loaded when the field is first used.

// How well a token's bare text fits a search: 0 is best, 4 not at all.
ksparse.rankToken = function rankToken(text, query) {
  if (text === query) return 0;
  if (text.toLowerCase() === query.toLowerCase()) return 1;
  if (text.startsWith(query)) return 2;
  return text.includes(query) ? 3 : 4;
};
ksparse.bareToken = (string) => string.replace(/[·↵⇥]/g, " ").trim();

ksparse.suggest = function suggest(input) {
  const { el } = ksparse, MOST = 8, MOST_TOKENS = 4;
  const list = el("ul", { id: "suggestions", role: "listbox", "aria-label": "Suggestions",
    hidden: true });
  let turn = 0, active = -1, hrefs = [];
  for (const [name, value] of Object.entries({
    role: "combobox", "aria-controls": "suggestions", "aria-expanded": "false",
    "aria-autocomplete": "list",
  })) input.setAttribute(name, value);
  input.after(list);

  input.addEventListener("input", async () => {
    const ownTurn = ++turn, found = await find(input.value.trim());
    if (ownTurn === turn) show(found);
  });
  input.addEventListener("blur", close);
  input.form.addEventListener("submit", close);
  addEventListener("hashchange", close);
  input.addEventListener("keydown", (event) => {
    const steps = { ArrowDown: 1, ArrowUp: -1 };
    if (list.hidden) return;
    if (steps[event.key]) {
      event.preventDefault();
      const count = hrefs.length + 1; // one place is "none", the field itself
      choose(((active + 1 + steps[event.key] + count) % count) - 1);
    } else if (event.key === "Enter" && active >= 0) {
      event.preventDefault();
      open(active);
    }
  });

  async function find(query) {
    const { run, labels } = ksparse;
    if (!query) return [];
    const folded = query.toLowerCase(), found = [];
    const add = (href, text, kind) => found.push({ href, text, kind });
    if (/^\d+$/.test(query) && Number(query) < run.n) {
      add(`#/latent/${Number(query)}`, `Latent ${Number(query)}`, "");
    }
    for (const number of labels.numbers()) {
      const { label } = labels.of(number);
      if (label.toLowerCase().includes(folded)) {
        add(`#/latent/${number}`, ksparse.visible(label), `your label of ${number}`);
      }
    }
    for (const [number, { text }] of Object.entries(labels.explained)) {
      if (found.length >= MOST) break;
      if (text.toLowerCase().includes(folded)) {
        add(`#/latent/${number}`, ksparse.visible(text), `explanation of ${number}`);
      }
    }
    const [tasks, tokens] = await Promise.all([
      run.has.tasks ? ksparse.load("tasks") : { tasks: [] },
      run.has.tokens ? ksparse.load("tokens") : { strings: [] }].map((each) =>
      Promise.resolve(each).catch(() => ({ tasks: [], strings: [] }))));
    for (const { name } of tasks.tasks) {
      if (name.toLowerCase().includes(folded)) {
        add(ksparse.to("search", { q: name }), name, "probe task");
      }
    }
    const bare = new Map(); // a token's bare text -> its rank
    for (const string of tokens.strings) {
      const text = ksparse.bareToken(string), rank = ksparse.rankToken(text, query);
      if (text && rank < 4) bare.set(text, rank);
    }
    const best = [...bare].sort(([a, i], [b, j]) => i - j || a.length - b.length);
    for (const [text] of best.slice(0, MOST_TOKENS)) {
      add(ksparse.to("search", { q: text }), text, "token");
    }
    return found.slice(0, MOST);
  }

  function show(found) {
    hrefs = found.map(({ href }) => href);
    list.replaceChildren(...found.map(({ text, kind }, i) => el("li", {
      role: "option", id: `suggestion-${i}`, "aria-selected": "false",
      on: {
        pointerdown: (event) => event.preventDefault(), // the field keeps the focus
        click: () => open(i),
      },
    }, el("bdi", {}, text), el("span", { class: "aside" }, kind))));
    list.hidden = !found.length;
    input.setAttribute("aria-expanded", String(!list.hidden));
    choose(-1);
  }

  function choose(i) {
    active = i;
    [...list.children].forEach((each, place) =>
      each.setAttribute("aria-selected", String(place === i)));
    if (i < 0) input.removeAttribute("aria-activedescendant");
    else input.setAttribute("aria-activedescendant", `suggestion-${i}`);
  }

  function open(i) {
    const { hash } = el("a", { href: hrefs[i] }); // an address as any link has it
    close();
    input.blur();
    location.hash = hash;
  }

  function close() {
    turn++;
    show([]);
  }
};
