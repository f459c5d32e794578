"use strict";
// Several runs: the one that is shown, the switch in the header, and a latent of one run beside its
// nearest in another.

const opened = new Map(); // name -> promise of { name, run, all, explained }
const BESIDE = 5; // examples of each latent

// Read which runs there are. Each is opened when it is first shown or compared.
ksparse.openRuns = async function openRuns() {
  if (!ksparse.live) return;
  ksparse.runs = (await ksparse.load("runs", null)).runs;
  if (ksparse.runs.length < 2) return;
  const options = ksparse.runs.map(({ name }) => ksparse.el("option", { value: name }, name));
  const change = (event) => switchTo(event.target.value);
  const choose = ksparse.el("select", { id: "run", "aria-label": "Run", on: { change } }, options);
  document.getElementById("brand").after(choose);
};

// Show the same page of another run. What an address says of latents is not true of another run's.
function switchTo(name) {
  const { path, query } = ksparse.address();
  const page = ["latents", "map", "scatter", "search", "try"].includes(path[0]) ? path[0] : "";
  const kept = { search: { q: query.get("q") }, try: { text: query.get("text") } }[page];
  location.hash = ksparse.inRun(ksparse.to(page, kept), name);
}

// What is shown of a run: its overview and its labels.
ksparse.open = function open(name) {
  if (!opened.has(name)) {
    const reading = readRun(name);
    opened.set(name, reading);
    reading.catch(() => opened.delete(name));
  }
  return opened.get(name);
};

async function readRun(name) {
  const run = await ksparse.load("overview", name);
  ksparse.run ??= run; // for the labels of pages without a server
  return { name, run, ...(await ksparse.labels.read(name)) };
}

// Show a run: the one that the address names, or else the same as before. Return whether this is
// still what the reader wants.
ksparse.enter = async function enter(wanted, current) {
  const name = !ksparse.live ? null : wanted ?? ksparse.name ?? ksparse.runs[0].name;
  if (ksparse.live && !ksparse.runs.some((run) => run.name === name)) throw noSuchRun(name);
  const shown = await ksparse.open(name);
  if (!current()) return false;
  if (!ksparse.live && wanted != null && wanted !== shown.run.name) throw noSuchRun(wanted);
  ksparse.name = name;
  ksparse.run = shown.run;
  Object.assign(ksparse.labels, { all: shown.all, explained: shown.explained });
  showHeader();
  // So that reloads, links and the way back lead to this run.
  const named = ksparse.inRun(location.hash || "#/");
  if (ksparse.runs.length > 1 && named !== location.hash) history.replaceState(null, "", named);
  return true;
};

function noSuchRun(name) {
  const names = ksparse.live ? ksparse.runs.map((run) => run.name) : [ksparse.run.name];
  return new Error(`There is no run ${ksparse.visible(name)} here; there is ${names.join(", ")}.`);
}

function showHeader() {
  const brand = document.getElementById("brand"), report = document.getElementById("report");
  const several = ksparse.runs.length > 1;
  brand.textContent = several ? "ksparse" : ksparse.run.name;
  brand.setAttribute("href", ksparse.inRun("#/"));
  if (several) document.getElementById("run").value = ksparse.name;
  report.hidden = !ksparse.run.has.report;
  if (ksparse.live) {
    report.search = new URLSearchParams({ token: ksparse.token, run: ksparse.name });
  }
  for (const link of document.querySelectorAll("header nav a:not(#report)")) {
    link.dataset.page ??= link.hash.slice(2);
    link.setAttribute("href", ksparse.inRun(`#/${link.dataset.page}`));
  }
}

// ---- the nearest latents in other runs

// One panel for each other run, which fills itself when the answer is there.
ksparse.nearestElsewhere = function nearestElsewhere(number, current) {
  const { el } = ksparse, own = ksparse.name;
  return ksparse.runs.filter(({ name }) => name !== own).map(({ name }) => {
    const list = el("div", { class: "list elsewhere" }, el("p", { class: "none" }, "…"));
    fill(name, list).catch((error) =>
      list.replaceChildren(el("p", { class: "none" }, error.message)));
    return el("section", { class: "panel" },
      el("h2", {}, `Nearest in ${name}`, el("span", { class: "aside" }, "cosine")), list);
  });

  async function fill(name, list) {
    const [{ near, why }, other] = await Promise.all([
      ksparse.load(`nearest/${number}/${encodeURIComponent(name)}`, own), ksparse.open(name)]);
    if (!current()) return;
    const row = ([latent, cosine, gloss]) => el("div", { class: "row" },
      el("a", {
        class: "said", title: "Side by side",
        href: `#/beside/${number}/${encodeURIComponent(name)}/${latent}`,
      }, `${cosine.toFixed(2)} ⇄`),
      ksparse.link(latent, gloss, other));
    const nothing = why ? `${why}.` : "None.";
    list.replaceChildren(
      ...(near?.length ? near.map(row) : [el("p", { class: "none" }, nothing)]));
  }
};

// ---- two latents side by side: #/beside/NUMBER/RUN/NUMBER

ksparse.views.beside = async function besideView(path, query, current) {
  const { el } = ksparse, own = ksparse.name;
  const name = decode(path[1] ?? "");
  if (!ksparse.runs.some((run) => run.name === name)) throw noSuchRun(name);
  const sides = await Promise.all([[own, path[0]], [name, path[2]]].map(readSide));
  const missing = sides.find(({ number, run }) => !(number < run.n));
  if (missing) {
    throw new Error(`There is no latent ${ksparse.visible(missing.said)}; ${missing.name} has 0 ` +
      `to ${ksparse.count(missing.run.n - 1)}.`);
  }
  const [from, to] = sides;
  const { near } = await ksparse.load(`nearest/${from.number}/${encodeURIComponent(name)}`, own);
  if (!current()) return;
  const cosine = near?.find(([latent]) => latent === to.number)?.[1];
  document.title = `${from.number} · ${to.number} · side by side`;
  ksparse.show(
    el("h1", {}, "Side by side", cosine == null
      ? null : el("span", { class: "aside" }, `cosine of decoder directions ${cosine.toFixed(3)}`)),
    part("", (side) => el("h2", {}, title(side))),
    part("Numbers", numbers), part("Direct logits", logits),
    part("Top examples", examples));

  async function readSide([run, said]) {
    const side = await ksparse.open(run), number = /^\d+$/.test(said ?? "") ? Number(said) : NaN;
    if (!(number < side.run.n)) return { ...side, number, said: said ?? "" };
    const { strings, latents } =
      await ksparse.load(`latents/${Math.floor(number / side.run.block)}`, run);
    return { ...side, number, strings, ...latents[number] };
  }

  function part(heading, make) {
    return el("section", { class: "beside-part" },
      heading ? el("h3", {}, heading) : null,
      el("div", { class: "sides" }, sides.map((side) => el("div", { class: "half" },
        heading ? el("p", { class: "whose" }, `${side.name} · ${side.number}`) : null,
        make(side)))));
  }

  function title(side) {
    return [`${side.name} · `, ksparse.link(side.number, side.gloss, side)];
  }

  // Those that are known of either, at the same places.
  function numbers({ values }) {
    const columns = new Map(
      sides.flatMap(({ run }) => run.columns.map((column) => [column.key, column])));
    const measured = [...columns.values()]
      .filter(({ key }) => sides.some((side) => ksparse.known(side.values[key])));
    return el("dl", { class: "values" }, measured.map(({ key, label, kind, reading }) =>
      el("div", { title: reading }, el("dt", {}, label),
        el("dd", {}, ksparse.format(values[key], kind)))));
  }

  function logits({ logits: found, strings }) {
    if (!found) return el("p", { class: "none" }, "`ksparse eval RUN stats` adds them.");
    const list = (word, entries) => [
      el("p", { class: "scores" }, word),
      el("p", { class: "text" }, entries.map(([i, value]) =>
        [ksparse.quoted(strings[i], value.toFixed(2)), " "]))];
    return [list("raises", found.raises), list("lowers", found.lowers)];
  }

  function examples({ top, strings, values }) {
    if (!top?.length) return el("p", { class: "none" }, "None.");
    return el("ol", { class: "texts-list plain-texts" }, top.slice(0, BESIDE).map((example) =>
      el("li", {}, el("data", { value: example.v }, ksparse.number(example.v)),
        ksparse.text(example.t.map((i) => strings[i]), example.a, values.max_act, example.at,
          ksparse.number, example.borders))));
  }
};
