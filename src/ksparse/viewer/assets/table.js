"use strict";
// All latents: a table that is sorted and filtered by any column, a page at a time.

const ROWS = 50;

ksparse.views.latents = async function latentsView(path, asked, current) {
  const { el, run } = ksparse;
  const shown = run.columns.filter(({ key }) => !key.startsWith("pca_"));
  const state = { sort: asked.get("sort") ?? run.first.sort ?? "number", up: asked.get("up") === "1", page: Math.max(1, Number(asked.get("page")) || 1),
    own: asked.get("own") === "1", ranges: Object.fromEntries(shown.map(({ key }) => [key, asked.get(key) ?? ""]).filter(([, range]) => range)) };
  document.title = `${run.name} · latents`;

  const filtered = Object.keys(state.ranges).length > 0 || state.own;
  const first = !filtered && !state.up && state.page === 1 && state.sort === run.first.sort;
  const found = first ? { numbers: run.first.latents, total: run.n, value: (key, i) => run.first.values[key]?.[i], gloss: async (i) => run.first.glosses[i] } : await chosen();
  if (!current()) return;
  const body = el("tbody", {}, found.numbers.map((number, i) => el("tr", {}, el("th", { scope: "row" }, ksparse.link(number).slice(0, 2)),
    shown.map(({ key, kind }) => el("td", { class: "num" }, ksparse.written(found.value(key, i), kind))), el("td", { class: "words" }))));
  ksparse.show(intro(), controls(), found.numbers.length ? el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of latents" },
    el("table", { class: "latents" }, el("thead", {}, el("tr", {}, heading("number", "Latent", "Number of the latent"), shown.map(({ key, label, reading }) => heading(key, label, reading)),
      el("th", { scope: "col" }, "Fires on"))), body)) : el("p", { class: "missing" }, "No latent is like that."), pages());
  performance.mark("table");
  await Promise.all(found.numbers.map(async (number, i) => {
    const gloss = await found.gloss(i);
    if (current()) body.rows[i].lastChild.append(...ksparse.link(number, gloss).slice(2));
  }));

  // ---- what is shown

  // Sort and filter the numbers of all latents; read what one page needs.
  async function chosen() {
    const keys = new Set([...Object.keys(state.ranges), ...(state.sort === "number" ? [] : [state.sort])]);
    const columns = Object.fromEntries(await Promise.all([...keys].map(async (key) => [key, await ksparse.column(key)])));
    const tests = Object.entries(state.ranges).map(([key, range]) => [columns[key], ...borders(key, range)]);
    let numbers = state.own ? ksparse.labels.numbers() : Array.from({ length: run.n }, (_, i) => i);
    numbers = numbers.filter((i) => tests.every(([values, least, most]) => values[i] >= least && values[i] <= most));
    const values = columns[state.sort];
    if (values) {
      const sign = state.up ? 1 : -1; // what was not measured comes last
      numbers.sort((a, b) => (Number.isNaN(values[a]) - Number.isNaN(values[b])) || sign * (values[a] - values[b]) || a - b);
    } else if (!state.up) {
      numbers.reverse();
    }
    const total = numbers.length;
    state.page = Math.min(state.page, Math.max(1, Math.ceil(total / ROWS)));
    const page = numbers.slice((state.page - 1) * ROWS, state.page * ROWS);
    const all = Object.fromEntries(await Promise.all(shown.map(async ({ key }) => [key, await ksparse.column(key)])));
    return { numbers: page, total, value: (key, i) => all[key][page[i]], gloss: (i) => ksparse.gloss(page[i]) };
  }

  function intro() {
    return el("div", { class: "intro" }, el("h1", {}, run.name), el("p", { class: "summary" }, run.summary),
      run.lacks.map(({ adds, command }) => ksparse.missing(adds, command)),
      ksparse.live ? null : el("p", { class: "note" }, "These are pages without a server. ", el("code", {}, run.serve), " also searches by any text, and tries what a latent does."));
  }

  function heading(key, label, reading) {
    const sorted = state.sort === key;
    return el("th", { scope: "col", class: key === "number" ? "" : "num", title: reading, "aria-sort": sorted ? (state.up ? "ascending" : "descending") : null },
      el("button", { type: "button", on: { click: () => go({ sort: key, up: sorted ? !state.up : key === "number", page: 1 }) } }, label, sorted ? (state.up ? " ↑" : " ↓") : ""));
  }

  function controls() {
    const own = ksparse.labels.numbers().length;
    return el("div", { class: "controls" }, el("p", { class: "tally" }, filtered ? `${ksparse.count(found.total)} of ${ksparse.count(run.n)} latents` : `${ksparse.count(run.n)} latents`),
      el("label", {}, el("input", { type: "checkbox", id: "own", checked: state.own, on: { change: (event) => go({ own: event.target.checked, page: 1 }) } }), ` labelled or starred (${own})`),
      own ? el("button", { type: "button", class: "button small", id: "export", on: { click: () => ksparse.labels.download() } }, "Export labels") : null,
      shown.length ? el("details", { open: Object.keys(state.ranges).length > 0 }, el("summary", {}, "Filter"), el("form", { class: "filters", on: { submit: filter } },
        shown.map(({ key, label, kind, reading }) => {
          const [least, most] = (state.ranges[key] ?? "").split("..");
          const box = (name, value, word) => el("input", { name, value: value ?? "", inputmode: "text", placeholder: word, "aria-label": `${label}: ${word}`, size: 7 });
          return el("fieldset", { title: reading }, el("legend", {}, label + (kind === "percent" ? ", %" : "")), box(`${key} least`, least, "at least"), box(`${key} most`, most, "at most"));
        }), el("div", { class: "actions" }, el("button", { class: "button" }, "Show"), el("a", { href: "#/latents" }, "Show all")))) : null);
  }

  function filter(event) {
    event.preventDefault();
    const given = new FormData(event.target);
    state.ranges = Object.fromEntries(shown.map(({ key }) => [key, [given.get(`${key} least`).trim(), given.get(`${key} most`).trim()]])
      .filter(([, [least, most]]) => least || most).map(([key, [least, most]]) => [key, `${least}..${most}`]));
    go({ page: 1 });
  }

  // "1..2.5" of a column in its own unit -> its borders
  function borders(key, range) {
    const [least, most] = range.split("..");
    const unit = shown.find((column) => column.key === key).kind === "percent" ? 0.01 : 1;
    const number = (text, otherwise) => (text === undefined || text.trim() === "" || Number.isNaN(parseFloat(text)) ? otherwise : Math.fround(parseFloat(text) * unit)); // as precise as the columns
    return [number(least, -Infinity), number(most, Infinity)];
  }

  function pages() {
    const last = Math.max(1, Math.ceil(found.total / ROWS));
    const link = (page, word) => (page < 1 || page > last ? el("span", { class: "none" }, word) : el("a", { href: address({ page }), rel: word.includes("next") ? "next" : "prev" }, word));
    return last > 1 ? el("nav", { class: "pages", "aria-label": "Pages of the table" }, link(state.page - 1, "‹ previous"), el("span", {}, `${ksparse.count(state.page)} of ${ksparse.count(last)}`), link(state.page + 1, "next ›")) : null;
  }

  function address(changes) {
    const { sort, up, page, own, ranges } = { ...state, ...changes };
    return ksparse.to("latents", { sort: sort === run.first.sort && !up ? "" : sort, up: up ? 1 : "", page: page > 1 ? page : "", own: own ? 1 : "", ...ranges });
  }

  function go(changes) {
    location.hash = address(changes);
  }
};
