"use strict";
// All latents: a table that can be sorted and filtered by any column, a page at a time.

const ROWS = 50;

ksparse.views.latents = async function latentsView(path, query, current) {
  const { el, run } = ksparse;
  const { columns } = run;
  const ranges = columns.map(({ key }) => [key, query.get(key) ?? ""]).filter(([, range]) => range);
  const usual = run.first.sort ?? "number";
  const state = {
    sort: [query.get("sort"), usual]
      .find((name) => name === "number" || columns.some(({ key }) => key === name)) ?? "number",
    up: query.get("up") === "1",
    page: Math.max(1, Number(query.get("page")) || 1),
    own: query.get("own") === "1",
    selection: query.get("selection") ?? "", // on the map
    ranges: Object.fromEntries(ranges),
  };
  document.title = `${run.name} · latents`;

  const filtered = Object.keys(state.ranges).length > 0 || state.own || state.selection !== "";
  const isFirst = !filtered && !state.up && state.page === 1 && state.sort === usual;
  const rows = isFirst ? firstRows() : await selectRows();
  if (!current()) return;
  const isStart = path.length === 0 && isFirst && !ksparse.address().path.length;
  const place = el("div", { class: "rows" });
  ksparse.show(isStart ? ksparse.start() : titleOfTable(),
    run.missing && !run.missing.evaluated && !filtered ? untouched() : [controls(), place],
    footnote());
  await draw();

  // Draw the rows with the columns that are shown now.
  async function draw() {
    const shown = ksparse.columns.shown([state.sort, ...Object.keys(state.ranges)]);
    await rows.prepare(shown.filter(({ kind }) => kind).map(({ key }) => key));
    if (!current()) return;
    place.replaceChildren(...(rows.numbers.length
      ? [table(shown), ksparse.columns.legend(shown), pages()].filter(Boolean)
      : [nothing()]));
    performance.mark("table");
  }

  // ---- the rows

  function firstRows() {
    const { latents, values, glosses, raises, examples } = run.first;
    return {
      numbers: latents, total: run.n, prepare: async () => {},
      value: (key, i) => values[key]?.[i], gloss: async (i) => glosses[i],
      raises: async (i) => raises[i], example: async (i) => examples[i],
      largest: async (i) => values.max_act?.[i],
    };
  }

  // Sort and filter the numbers of all latents, and read what one page of them needs.
  async function selectRows() {
    const keys = new Set(Object.keys(state.ranges));
    if (state.sort !== "number") keys.add(state.sort);
    const read = async (key) => [key, await ksparse.column(key)];
    const values = Object.fromEntries(await Promise.all([...keys].map(read)));
    const tests = Object.entries(state.ranges)
      .map(([key, range]) => [values[key], ...parseRange(key, range)]);
    const selected = state.selection
      ? await ksparse.selection.latents(state.selection)
      : Array.from({ length: run.n }, (_, i) => i);
    const own = state.own ? new Set(ksparse.labels.numbers()) : null;
    const numbers = selected.filter((i) => (own?.has(i) ?? true) &&
      tests.every(([column, least, most]) => column[i] >= least && column[i] <= most));
    const by = values[state.sort];
    if (by) {
      const sign = state.up ? 1 : -1; // latents that were not measured come last either way
      numbers.sort((a, b) =>
        Number.isNaN(by[a]) - Number.isNaN(by[b]) || sign * (by[a] - by[b]) || a - b);
    } else if (!state.up) {
      numbers.reverse();
    }
    const total = numbers.length;
    state.page = Math.min(state.page, Math.max(1, Math.ceil(total / ROWS)));
    const page = numbers.slice((state.page - 1) * ROWS, state.page * ROWS);
    return {
      numbers: page, total,
      async prepare(needed) {
        const missing = needed.filter((key) => !values[key]);
        Object.assign(values, Object.fromEntries(await Promise.all(missing.map(read))));
      },
      value: (key, i) => values[key][page[i]], gloss: (i) => ksparse.gloss(page[i]),
      raises: (i) => ksparse.raises(page[i]), example: (i) => ksparse.example(page[i]),
      largest: async (i) => (await ksparse.largestValues())?.[page[i]],
    };
  }

  // "1..2.5" in a column's own unit -> [least, most], as precise as the columns.
  function parseRange(key, range) {
    const unit = columns.find((column) => column.key === key).kind === "percent" ? 0.01 : 1;
    const [least, most] = range.split("..").map((text) => Math.fround(parseFloat(text) * unit));
    const orElse = (value, otherwise) => (ksparse.known(value) ? value : otherwise);
    return [orElse(least, -Infinity), orElse(most, Infinity)];
  }

  // ---- what is shown

  function table(shown) {
    const headings = shown.map(({ key, label, kind, reading }) => (kind
      ? heading(key, label, reading)
      : el("th", { scope: "col", title: reading }, label)));
    return el("div", {
      class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of latents",
    }, el("table", { class: "latents" },
      el("thead", {}, el("tr", {}, heading("number", "Latent", "Number of the latent"), headings)),
      el("tbody", {}, rows.numbers.map((number, i) => el("tr", {},
        el("th", { scope: "row" }, ksparse.link(number).slice(0, 2)),
        shown.map((column) => cell(column, number, i)))))));
  }

  function cell({ key, kind, label }, number, i) {
    if (kind) {
      return el("td", { class: "num", "data-label": label },
        ksparse.format(rows.value(key, i), kind));
    }
    const td = el("td", { class: `words ${key}` });
    fill(key, number, i).then((content) => td.append(...content))
      .catch((error) => ksparse.say(error.message));
    return td;
  }

  // The content of a cell of words, which may have to be loaded.
  async function fill(key, number, i) {
    if (key === "example") {
      const [example, largest] = await Promise.all([rows.example(i), rows.largest(i)]);
      return [ksparse.snippet(example, largest)];
    }
    const [gloss, raises] = await Promise.all([rows.gloss(i), rows.raises(i)]);
    if (key === "words") return ksparse.words(number, raises, gloss);
    const tokens = key === "raises"
      ? raises.map((token) => ksparse.quoted(token))
      : gloss.map(([token, share]) => ksparse.quoted(token, `${Math.round(100 * share)} %`));
    return [el("span", { class: "gloss" }, tokens)];
  }

  function nothing() {
    return el("p", { class: "missing" }, "No latent matches the filter.");
  }

  function titleOfTable() {
    return [el("h1", {}, "Latents"),
      run.missing && !run.missing.evaluated ? ksparse.notEvaluated() : null];
  }

  // What can be seen of a run that was not evaluated: a table would be bare numbers.
  function untouched() {
    const ways = [
      run.has.weights ? ["#/latent/0", "each latent’s nearest ones"] : null,
      run.has.weights ? ["#/map", "the map"] : null,
      ksparse.live ? ["#/try", "the latents of a text"] : null,
    ].filter(Boolean);
    if (!ways.length) return null;
    return el("p", { class: "note" }, "Already here: ", ways.map(([href, text], i) =>
      [i ? " · " : null, el("a", { href }, text)]));
  }

  function footnote() {
    return ksparse.live ? null : el("p", { class: "note" },
      "These pages work without a server. This command starts one, which can also search by any " +
      "text and change what a latent does: ", ksparse.command(run.serve));
  }

  function heading(key, label, title) {
    const sorted = state.sort === key;
    const arrow = sorted ? (state.up ? " ↑" : " ↓") : "";
    const click = () => go({ sort: key, up: sorted ? !state.up : key === "number", page: 1 });
    return el("th", {
      scope: "col", class: key === "number" ? "" : "num", title,
      "aria-sort": sorted ? (state.up ? "ascending" : "descending") : null,
    }, el("button", { type: "button", on: { click } }, label, arrow));
  }

  function controls() {
    const own = ksparse.labels.numbers().length;
    const all = `${ksparse.count(run.n)} latents`;
    return el("div", { class: "controls" },
      el("p", { class: "tally" }, filtered ? `${ksparse.count(rows.total)} of ${all}` : all),
      state.selection ? selectionOnMap() : null,
      el("label", {}, el("input", {
        type: "checkbox", id: "own", checked: state.own,
        on: { change: (event) => go({ own: event.target.checked, page: 1 }) },
      }), ` labelled or starred (${own})`),
      own
        ? el("button", {
          type: "button", class: "button small", id: "export",
          on: { click: () => ksparse.labels.download() },
        }, "Export labels")
        : null,
      columns.length ? filterForm() : null, ksparse.columns.menu(draw));
  }

  function selectionOnMap() {
    const to = ksparse.to("map", { selection: state.selection });
    return el("span", { class: "chip", id: "selection" },
      el("a", { href: to }, "selection on the map"),
      el("button", {
        type: "button", class: "button small", "aria-label": "Clear the selection",
        on: { click: () => go({ selection: "", page: 1 }) },
      }, "×"));
  }

  function filterForm() {
    const field = ({ key, label, kind, reading }) => {
      const [least, most] = (state.ranges[key] ?? "").split("..");
      const box = (value, word) => el("input", {
        name: `${key} ${word}`, value: value ?? "", inputmode: "text", size: 7,
        placeholder: `at ${word}`, "aria-label": `${label}: at ${word}`,
      });
      return el("fieldset", { title: reading },
        el("legend", {}, label + (kind === "percent" ? ", %" : "")),
        box(least, "least"), box(most, "most"));
    };
    return el("details", { open: Object.keys(state.ranges).length > 0 },
      el("summary", {}, "Filter"),
      el("form", { class: "filters", on: { submit: filter } }, columns.map(field),
        el("div", { class: "actions" }, el("button", { class: "button" }, "Show"),
          el("a", { href: "#/latents" }, "Show all"))));
  }

  function filter(event) {
    event.preventDefault();
    const form = new FormData(event.target);
    const entries = columns.map(({ key }) =>
      [key, form.get(`${key} least`).trim(), form.get(`${key} most`).trim()]);
    state.ranges = Object.fromEntries(entries.filter(([, least, most]) => least || most)
      .map(([key, least, most]) => [key, `${least}..${most}`]));
    go({ page: 1 });
  }

  function pages() {
    const last = Math.max(1, Math.ceil(rows.total / ROWS));
    if (last === 1) return null;
    const link = (page, text, rel) =>
      page < 1 || page > last
        ? el("span", { class: "none" }, text)
        : el("a", { href: address({ page }), rel }, text);
    return el("nav", { class: "pages", "aria-label": "Pages of the table" },
      link(state.page - 1, "‹ previous", "prev"),
      el("span", {}, `${ksparse.count(state.page)} of ${ksparse.count(last)}`),
      link(state.page + 1, "next ›", "next"));
  }

  function address(changes) {
    const { sort, up, page, own, selection, ranges: selected } = { ...state, ...changes };
    return ksparse.to("latents", {
      sort: sort === usual && !up ? "" : sort, up: up ? 1 : "",
      page: page > 1 ? page : "", own: own ? 1 : "", selection, ...selected,
    });
  }

  function go(changes) {
    location.hash = address(changes);
  }
};
