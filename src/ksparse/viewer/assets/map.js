"use strict";
// The map: latents by the directions of their decoder rows. Zoom, pan, point, select.

const LONGEST_NAME = 26, MOST_NAMED = 60, MOST_ZOOM = 400;
const LONGEST_FRAME = 50; // milliseconds, while the map moves
const views = new Map(); // run and layout -> the part of it that was looked at last

ksparse.views.map = async function mapView(path, query, current) {
  const { el, run, points } = ksparse;
  document.title = `${run.name} · map`;
  if (!run.maps.length) {
    ksparse.show(el("h1", {}, "Map"), el("p", { class: "missing" },
      "This run has no autoencoder yet, whose directions a map shows."));
    return;
  }
  const has = (key) => run.columns.some((column) => column.key === key);
  const selected = query.get("selection") ?? "";
  const state = {
    layout: [query.get("layout"), ksparse.selection.read(selected)?.layout, run.maps.at(-1)]
      .find((name) => run.maps.includes(name)),
    colour: [query.get("colour"), "density", run.columns[0]?.key].find(has),
    names: query.get("names") ?? "fires",
    selection: selected,
  };
  const column = run.columns.find(({ key }) => key === state.colour);
  const waiting = el("p", { class: "note", role: "status" },
    `Laying out ${ksparse.count(run.n)} latents …`);
  ksparse.show(el("h1", {}, "Map"), waiting);
  const [layout, colours] = await Promise.all([ksparse.map(state.layout),
    column ? ksparse.column(column.key) : new Float32Array(run.n).fill(NaN)]);
  if (!current()) return;

  // ---- what is shown

  const canvas = el("canvas", {
    class: "map", tabindex: 0, role: "application",
    "aria-label": "Map of latents. Arrows move it, plus and minus zoom, 0 shows all. " +
      "The regions are listed below, and the table has all latents",
  });
  const tip = el("div", { class: "map-tip", role: "status", hidden: true });
  const chosen = el("p", { class: "map-said", id: "selected" });
  const button = (text, label, click, attributes = {}) => el("button", {
    type: "button", class: "button small", "aria-label": label, title: label, ...attributes,
    on: { click },
  }, text);
  const selecting = button("Select", "Draw around latents to select them (or Shift and drag)",
    () => setTool(selecting.getAttribute("aria-pressed") !== "true"),
    { id: "select", "aria-pressed": "false" });
  const select = (name, title, options) => el("label", {}, `${title} `, el("select", {
    id: `map-${name}`,
    on: { change: (event) => { location.hash = address({ [name]: event.target.value }); } },
  }, options.map(([value, text]) =>
    el("option", { value, selected: value === state[name] }, text))));
  const named = { fires: "tokens they fire on", raises: "tokens they raise", none: "none" };
  const kinds = Object.entries(named).filter(([kind]) =>
    kind === "none" || layout.regions.some((region) => region[kind]?.length));
  if (!kinds.some(([kind]) => kind === state.names)) state.names = kinds[0][0];
  ksparse.show(
    el("div", { class: "map-head" }, el("h1", {}, "Map"),
      run.maps.length > 1
        ? select("layout", "layout", run.maps.map((name) => [name, name.toUpperCase()]))
        : null,
      column
        ? select("colour", "colour", run.columns.map(({ key, label }) => [key, label]))
        : null,
      kinds.length > 1 ? select("names", "names of regions", kinds) : null),
    el("div", { class: "map-box" }, canvas, tip,
      el("div", { class: "map-tools" },
        button("+", "Zoom in", () => zoom(1.6), { id: "zoom-in" }),
        button("−", "Zoom out", () => zoom(1 / 1.6), { id: "zoom-out" }),
        button("All", "Show all latents", showAll, { id: "zoom-all" }),
        selecting)),
    chosen,
    column ? ksparse.legend(column) : null,
    el("p", { class: "note", id: "how" }, explain()),
    listOfRegions());

  // ---- places: from the layout to the screen

  const { places } = layout, n = run.n, screen = new Float32Array(2 * n);
  const levels = points.levels(colours), box = bounds();
  const looked = `${run.name}/${state.layout}`;
  const view = views.get(looked) ?? { x: box.x, y: box.y, zoom: 1 };
  views.set(looked, view);
  let sheet, colour, names = [], lasso = null, asked = false, moving = false, resting = 0;
  let wholeTakes = 0; // milliseconds to draw all points
  const perUnit = () => view.zoom * Math.min(
    (canvas.clientWidth - 48) / box.width, (canvas.clientHeight - 48) / box.height);
  const toScreen = (x, y) => [
    canvas.clientWidth / 2 + (x - view.x) * perUnit(),
    canvas.clientHeight / 2 - (y - view.y) * perUnit(),
  ];
  const toLayout = (x, y) => [
    view.x + (x - canvas.clientWidth / 2) / perUnit(),
    view.y - (y - canvas.clientHeight / 2) / perUnit(),
  ];
  const own = ksparse.labels.numbers();
  const words = new Map(); // latent -> its gloss, of those that were named
  draw();
  performance.mark("map");
  points.keepDrawn(canvas, draw, current);
  listen();
  showSelection();

  function bounds() {
    let [left, right, bottom, top] = [Infinity, -Infinity, Infinity, -Infinity];
    for (let i = 0; i < n; i++) {
      const x = places[2 * i], y = places[2 * i + 1];
      if (Number.isNaN(x)) continue;
      left = Math.min(left, x);
      right = Math.max(right, x);
      bottom = Math.min(bottom, y);
      top = Math.max(top, y);
    }
    if (left > right) [left, right, bottom, top] = [0, 1, 0, 1];
    return {
      x: (left + right) / 2, y: (bottom + top) / 2,
      width: right - left || 1, height: top - bottom || 1,
    };
  }

  function draw() {
    if (!canvas.clientWidth) return;
    const began = performance.now();
    colour = points.palette();
    sheet = points.open(canvas, colour);
    const scale = perUnit(), middle = [sheet.width / 2, sheet.height / 2];
    let visible = 0;
    for (let i = 0; i < n; i++) {
      const x = middle[0] + (places[2 * i] - view.x) * scale;
      const y = middle[1] - (places[2 * i + 1] - view.y) * scale;
      screen[2 * i] = x;
      screen[2 * i + 1] = y;
      visible += x > 0 && y > 0 && x < sheet.width && y < sheet.height;
    }
    const radius = Math.min(4.5, points.radius(n) * Math.max(1, view.zoom) ** 0.3);
    const every = moving ? Math.max(1, Math.ceil(wholeTakes / LONGEST_FRAME)) : 1;
    points.draw(sheet, screen, levels, colour.levels,
      { radius, opacity: visible > 30_000 ? 0.5 : 0.8, every });
    ringOwn();
    drawOutline(lasso ?? shownSelection());
    drawNames(visible);
    if (every === 1) wholeTakes = performance.now() - began;
  }

  // Draw in the next frame, however often it is asked for until then.
  function redraw() {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      if (current()) draw();
    });
  }

  // Draw while the map moves: where all points take too long, only some, and all at the end.
  function redrawMoving() {
    moving = true;
    clearTimeout(resting);
    resting = setTimeout(() => {
      moving = false;
      redraw();
    }, 120);
    redraw();
  }

  function ringOwn() {
    sheet.pen.strokeStyle = colour.hot;
    sheet.pen.lineWidth = 1.5;
    for (const i of own) {
      sheet.pen.beginPath();
      sheet.pen.arc(screen[2 * i], screen[2 * i + 1], 6, 0, 7);
      sheet.pen.stroke();
    }
  }

  function shownSelection() {
    const shown = ksparse.selection.read(state.selection);
    return shown?.layout === state.layout ? shown.corners.map((at) => toScreen(...at)) : null;
  }

  function drawOutline(corners) {
    if (!corners || corners.length < 2) return;
    const { pen } = sheet;
    pen.beginPath();
    corners.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
    pen.closePath();
    pen.globalAlpha = 0.1;
    pen.fillStyle = colour.first;
    pen.fill();
    pen.globalAlpha = 1;
    pen.strokeStyle = colour.first;
    pen.lineWidth = 1.5;
    pen.stroke();
  }

  // Names, the more important first; one that would lie on another is left out.
  function drawNames(visible) {
    names = [];
    for (const number of own) {
      const { label } = ksparse.labels.of(number);
      const at = [screen[2 * number], screen[2 * number + 1] - 12];
      if (label) name(ksparse.visible(label), at, 13, colour.hot, { number });
    }
    const few = visible <= MOST_NAMED;
    for (const region of few || state.names === "none" ? [] : layout.regions) {
      const first = region[state.names]?.[0];
      const size = Math.round(12 + 6 * Math.sqrt(region.count / layout.regions[0].count));
      // In the middle of a wide region, above one that it would hide.
      const [x, y] = toScreen(...region.at), wide = region.radius * perUnit();
      const above = wide < 24 ? wide + 6 + size * 0.75 : 0;
      if (first) name(first[0], [x, y - above], size, colour.ink, { region });
    }
    if (few && visible) nameLatents();
  }

  function name(text, [x, y], size, ink, what) {
    const { pen } = sheet;
    const shown = text.length > LONGEST_NAME ? `${text.slice(0, LONGEST_NAME - 1)}…` : text;
    pen.font = `600 ${size}px ${what.number == null ? colour.mono : colour.sans}`;
    const wide = pen.measureText(shown).width / 2 + 5, high = size * 0.75;
    const place = { left: x - wide, right: x + wide, top: y - high, bottom: y + high, ...what };
    const free = names.every((other) => place.right < other.left || place.left > other.right ||
      place.bottom < other.top || place.top > other.bottom);
    if (!free || place.left < 0 || place.right > sheet.width || y < 8 || y > sheet.height) return;
    names.push(place);
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    points.write(sheet, colour, shown, x, y, ink);
  }

  // Few latents are in view: each has its first token, or its explanation, beside it.
  function nameLatents() {
    for (let i = 0; i < n; i++) {
      const x = screen[2 * i], y = screen[2 * i + 1];
      if (!(x > 0 && y > 0 && x < sheet.width && y < sheet.height)) continue;
      if (ksparse.labels.of(i).label) continue;
      const explained = ksparse.labels.explained[i]?.text;
      if (explained) name(ksparse.visible(explained), [x, y - 13], 12, colour.soft, { number: i });
      else if (words.has(i)) name(words.get(i), [x, y - 13], 12, colour.soft, { number: i });
      else {
        words.set(i, "");
        ksparse.gloss(i).then((gloss) => {
          words.set(i, gloss[0]?.[0] ?? "");
          redraw();
        }, () => words.delete(i));
      }
    }
  }

  // ---- words

  function explain() {
    const made = layout.made, parts = [];
    if (state.layout === "umap") {
      parts.push(`Every point is a latent, placed by UMAP of the decoder’s directions (cosine, ` +
        `${made.n_neighbors} neighbours, min_dist ${made.min_dist}): near latents write similar ` +
        "directions; the distance between groups, and how wide they are, mean little.");
    } else {
      const shares = made.shares ?? [0, 0], both = shares.reduce((sum, each) => sum + each, 0);
      parts.push("Every point is a latent, placed by the first two principal components of the " +
        `decoder’s directions, scaled to norm 1. They hold ${ksparse.percent(both)} of the ` +
        "variance, so latents that are near each other here may be far apart in other directions.");
    }
    if (layout.left_out) {
      parts.push(` ${ksparse.count(layout.left_out)} of ${ksparse.count(run.n)} latents are ` +
        "left out: they never fire" + (run.text ? ` on ${run.text}.` : ", or write nothing."));
    }
    if (state.names !== "none") {
      const share = state.names === "fires"
        ? "with the largest share of its latents’ activation mass, compared with all latents"
        : "that most of its latents’ decoder rows raise, compared with all latents";
      parts.push(` A name stands at a dense region. It is the token ${share}: at least twice the ` +
        "share among all, and in three latents or more. Other latents there may be about " +
        "something else.");
    }
    if (!run.maps.includes("umap")) {
      parts.push(" ", el("code", {}, `${run.serve} --map umap`), " adds a layout by UMAP.");
    }
    return parts;
  }

  function describe(region) {
    const list = region[state.names] ?? [];
    const both = ([token, share, all]) => ksparse.quoted(token,
      `${ksparse.percent(share)}, of all ${ksparse.percent(all)}`);
    return [el("span", {}, `${ksparse.count(region.count)} latents `),
      el("span", { class: "gloss" }, list.map(both))];
  }

  function listOfRegions() {
    const listed = layout.regions.filter((region) => region[state.names]?.length);
    if (!listed.length) return null;
    return el("details", { class: "map-regions" },
      el("summary", {}, `Named regions (${listed.length})`),
      el("ol", { class: "plain-list" }, listed.map((region) => el("li", {},
        button("show", "Show the region on the map", () => goTo(region)), " ",
        describe(region)))));
  }

  // ---- moving

  function address(changes = {}) {
    const { layout: shown, colour: by, names: kind, selection } = { ...state, ...changes };
    return ksparse.to("map", { layout: shown, colour: by, names: kind, selection });
  }

  function zoom(by, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
    const before = toLayout(x, y);
    view.zoom = Math.min(MOST_ZOOM, Math.max(0.5, view.zoom * by));
    const after = toLayout(x, y);
    view.x += before[0] - after[0];
    view.y += before[1] - after[1];
    tip.hidden = true;
    redrawMoving();
  }

  function pan(x, y) {
    view.x -= x / perUnit();
    view.y += y / perUnit();
    tip.hidden = true;
    redrawMoving();
  }

  function showAll() {
    Object.assign(view, { x: box.x, y: box.y, zoom: 1 });
    redraw();
  }

  function goTo({ at, radius }) {
    const room = Math.min(box.width, box.height) / Math.max(radius * 6, 1e-9);
    Object.assign(view, { x: at[0], y: at[1], zoom: Math.min(MOST_ZOOM, Math.max(1, room)) });
    canvas.focus({ preventScroll: true });
    canvas.scrollIntoView({ block: "nearest" });
    redraw();
  }

  function setTool(on) {
    selecting.setAttribute("aria-pressed", String(on));
    canvas.classList.toggle("selecting", on);
  }

  // ---- selecting

  async function setSelection(text) {
    state.selection = text;
    // The address of the selection, without showing this page anew.
    history.replaceState(null, "", ksparse.inRun(address()));
    redraw();
    await showSelection();
  }

  async function showSelection() {
    if (!state.selection) {
      chosen.replaceChildren(
        el("button", {
          type: "button", class: "button small", id: "in-view", on: { click: selectView },
        }, "Select what is in view"),
        el("span", { class: "aside" }, "or draw around latents, then see them in the table"));
      return;
    }
    const numbers = await ksparse.selection.latents(state.selection);
    if (!current()) return;
    chosen.replaceChildren(
      el("strong", {}, `${ksparse.count(numbers.length)} latents selected `),
      el("a", { class: "button small", id: "to-table",
        href: ksparse.to("latents", { selection: state.selection }) }, "Show them in the table"),
      " ", button("Clear", "Clear the selection", () => setSelection(""), { id: "clear" }));
  }

  function selectView() {
    const [w, h] = [canvas.clientWidth, canvas.clientHeight];
    setSelection(ksparse.selection.write(state.layout,
      [[0, 0], [w, 0], [w, h], [0, h]].map((at) => toLayout(...at))));
  }

  // ---- pointers and keys

  function listen() {
    const down = new Map(); // pointer -> its place
    let moved = 0;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      down.set(event.pointerId, [event.offsetX, event.offsetY]);
      moved = 0;
      const selects = event.shiftKey || selecting.getAttribute("aria-pressed") === "true";
      lasso = down.size === 1 && selects ? [[event.offsetX, event.offsetY]] : null;
    });
    canvas.addEventListener("pointermove", (event) => {
      const at = [event.offsetX, event.offsetY], before = down.get(event.pointerId);
      if (!before) {
        if (event.pointerType !== "touch") pointAt(at);
        return;
      }
      moved += Math.hypot(at[0] - before[0], at[1] - before[1]);
      if (lasso) {
        lasso.push(at);
        redraw();
      } else if (down.size === 2) {
        const other = [...down].find(([id]) => id !== event.pointerId)[1];
        const length = (from) => Math.max(1, Math.hypot(from[0] - other[0], from[1] - other[1]));
        zoom(length(at) / length(before), (at[0] + other[0]) / 2, (at[1] + other[1]) / 2);
      } else {
        pan(at[0] - before[0], at[1] - before[1]);
      }
      down.set(event.pointerId, at);
    });
    const up = (event) => {
      const clicked = event.type === "pointerup" && down.size === 1 && moved < 5;
      down.delete(event.pointerId);
      const corners = lasso;
      lasso = null;
      if (clicked) click([event.offsetX, event.offsetY], event.pointerType === "touch");
      else if (corners?.length > 2 && event.type === "pointerup") {
        setTool(false);
        setSelection(ksparse.selection.write(
          state.layout, corners.map((corner) => toLayout(...corner))));
      } else if (corners) redraw();
    };
    canvas.addEventListener("pointerup", up);
    canvas.addEventListener("pointercancel", up);
    canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const lines = event.deltaMode === 1 ? 20 : 1;
      zoom(Math.exp(-event.deltaY * lines * 0.0018), event.offsetX, event.offsetY);
    }, { passive: false });
    const keys = {
      "+": () => zoom(1.4), "=": () => zoom(1.4), "-": () => zoom(1 / 1.4), 0: showAll,
      ArrowLeft: () => pan(60, 0), ArrowRight: () => pan(-60, 0),
      ArrowUp: () => pan(0, 60), ArrowDown: () => pan(0, -60),
    };
    canvas.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    });
  }

  function nameAt([x, y]) {
    return names.find((each) => x > each.left && x < each.right && y > each.top && y < each.bottom);
  }

  function click(at, touched) {
    const hit = nameAt(at), number = hit?.number ?? (hit ? -1 : points.nearest(screen, ...at));
    if (hit?.region) goTo(hit.region);
    else if (touched && number >= 0) pointAt(at); // it has a link to open the latent
    else if (number >= 0) location.hash = `#/latent/${number}`;
    else tip.hidden = true;
  }

  async function pointAt(at) {
    const hit = nameAt(at), number = hit?.number ?? (hit ? -1 : points.nearest(screen, ...at, 9));
    canvas.classList.toggle("over", Boolean(hit) || number >= 0);
    if (hit?.region) showTip(at, describe(hit.region));
    else if (number < 0) tip.hidden = true;
    else {
      const gloss = await ksparse.gloss(number);
      if (!current() || !canvas.classList.contains("over")) return;
      const value = column
        ? el("p", { class: "said" },
          `${column.label} ${ksparse.format(colours[number], column.kind)}`)
        : null;
      showTip(at, [...ksparse.link(number, gloss), value]);
    }
  }

  function showTip([x, y], content) {
    tip.replaceChildren(...content.filter(Boolean));
    tip.hidden = false;
    const left = Math.min(x + 14, canvas.clientWidth - tip.offsetWidth - 6);
    const under = y + 14 + tip.offsetHeight < canvas.clientHeight;
    tip.style.left = `${Math.max(6, left)}px`;
    tip.style.top = `${under ? y + 14 : Math.max(6, y - tip.offsetHeight - 12)}px`;
  }
};
