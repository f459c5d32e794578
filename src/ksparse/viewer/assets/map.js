"use strict";
// All latents as points: any column against any other.

const LEVELS = 8; // of colour

ksparse.views.map = async function mapView(path, asked, current) {
  const { el, run } = ksparse;
  document.title = `${run.name} · map`;
  if (run.columns.length < 2) {
    ksparse.show(el("h1", {}, "Map"), run.lacks.map(({ adds, command }) => ksparse.missing(adds, command)));
    return;
  }
  const has = (key) => run.columns.some((column) => column.key === key);
  const pick = (name, ...otherwise) => [asked.get(name), ...otherwise, ...run.columns.map(({ key }) => key)].find(has);
  const keys = { x: pick("x", "density", "pca_1"), y: pick("y", "max_act", "pca_2"), colour: pick("colour", "cosine") };
  const canvas = el("canvas", { class: "map", tabindex: 0, role: "img", "aria-label": "All latents as points; the table has the same numbers" });
  const said = el("p", { class: "map-said", role: "status" }, "Point at a latent; click to open it. ", el("span", { class: "aside" }, "Colour by rank: ", el("span", { class: "cold" }, "low"), " to ", el("span", { class: "hot" }, "high"), "; grey was not measured."));
  const select = (name, word) => el("label", {}, `${word} `, el("select", { on: { change: (event) => { location.hash = ksparse.to("map", { ...keys, [name]: event.target.value }); } } },
    run.columns.map(({ key, label }) => el("option", { value: key, selected: keys[name] === key }, label))));
  ksparse.show(el("div", { class: "map-head" }, el("h1", {}, "Map"), select("x", "across"), select("y", "up"), select("colour", "colour")), canvas, said);
  const [xs, ys, colours] = await Promise.all([keys.x, keys.y, keys.colour].map((key) => ksparse.column(key)));
  if (!current()) return;
  const axes = { x: axis(keys.x, xs), y: axis(keys.y, ys), colour: { ...axis(keys.colour, colours), place: ranked(colours) } };
  let places = draw();
  performance.mark("map");
  const watcher = new ResizeObserver(() => { if (current()) places = draw(); else watcher.disconnect(); });
  watcher.observe(canvas);
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  scheme.addEventListener("change", () => { if (current()) places = draw(); });
  canvas.addEventListener("mousemove", async (event) => {
    const number = nearest(event.offsetX, event.offsetY);
    canvas.classList.toggle("over", number >= 0);
    if (number < 0) return;
    const gloss = await ksparse.gloss(number);
    const value = (name) => `${axes[name].label} ${ksparse.written({ x: xs, y: ys, colour: colours }[name][number], axes[name].kind)}`;
    if (current()) said.replaceChildren(...ksparse.link(number, gloss), el("span", { class: "aside" }, [value("x"), value("y"), value("colour")].join(" · ")));
  });
  canvas.addEventListener("click", (event) => {
    const number = nearest(event.offsetX, event.offsetY);
    if (number >= 0) location.hash = `#/latent/${number}`;
  });

  // An axis from the least to the largest value; on a logarithm where values span much and none but 0 is not above it.
  function axis(key, values) {
    const column = run.columns.find((each) => each.key === key);
    let least = Infinity, most = -Infinity, negative = false;
    for (const value of values) if (value !== 0 && !Number.isNaN(value)) { least = Math.min(least, value); most = Math.max(most, value); negative ||= value < 0; }
    const log = !negative && most > 30 * least;
    const at = log ? Math.log : (value) => value;
    const low = at(log ? least : Math.min(least, negative ? least : 0)), high = at(most);
    return { ...column, log, place: (value) => (value > 0 || !log ? (at(value) - low) / (high - low || 1) : NaN), ends: [log ? least : low, most] };
  }

  // The eighth of all latents that a value is in: a few extreme values do not take all the colour.
  function ranked(values) {
    const sorted = values.filter((value) => !Number.isNaN(value)).sort(), borders = Array.from({ length: LEVELS - 1 }, (_, i) => sorted[Math.floor(((i + 1) * sorted.length) / LEVELS)]);
    return (value) => (Number.isNaN(value) ? LEVELS : borders.filter((border) => value >= border).length);
  }

  function draw() {
    const scale = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight, room = 26;
    canvas.width = width * scale;
    canvas.height = height * scale;
    const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const [ink, line, cold, hot] = ["--soft", "--line", "--first", "--second"].map((name) => style.getPropertyValue(name).trim());
    pen.scale(scale, scale);
    pen.font = `12px ${style.getPropertyValue("--sans")}`;
    pen.strokeStyle = line;
    pen.strokeRect(room, 8, width - room - 8, height - room - 8);
    pen.fillStyle = ink;
    const end = (name, which) => ksparse.written(axes[name].ends[which], axes[name].kind);
    const words = (name) => `${axes[name].label}${axes[name].log ? ", log" : ""}`;
    write(pen, `${end("x", 0)}`, room, height - 8, "left");
    write(pen, `${words("x")} →`, width / 2, height - 8, "center");
    write(pen, end("x", 1), width - 8, height - 8, "right");
    pen.save();
    pen.rotate(-Math.PI / 2);
    write(pen, end("y", 0), room - height, 16, "left");
    write(pen, `${words("y")} →`, -height / 2, 16, "center");
    write(pen, end("y", 1), -8, 16, "right");
    pen.restore();
    const n = xs.length, found = new Float32Array(2 * n), size = n > 30_000 ? 1.5 : 3.2;
    const groups = Array.from({ length: LEVELS + 1 }, () => []);
    for (let i = 0; i < n; i++) {
      found[2 * i] = room + 4 + axes.x.place(xs[i]) * (width - room - 16);
      found[2 * i + 1] = height - room - 4 - axes.y.place(ys[i]) * (height - room - 16);
      groups[axes.colour.place(colours[i])].push(i);
    }
    pen.globalAlpha = n > 30_000 ? 0.5 : 0.75;
    [LEVELS, ...Array(LEVELS).keys()].forEach((level) => { // those without a value below the others
      pen.fillStyle = level === LEVELS ? ink : `color-mix(in srgb, ${hot} ${Math.round((100 * level) / (LEVELS - 1))}%, ${cold})`;
      for (const i of groups[level]) pen.fillRect(found[2 * i] - size / 2, found[2 * i + 1] - size / 2, size, size);
    });
    pen.globalAlpha = 1;
    pen.strokeStyle = hot;
    for (const i of ksparse.labels.numbers()) { pen.beginPath(); pen.arc(found[2 * i], found[2 * i + 1], 5, 0, 7); pen.stroke(); }
    return found;
  }

  function write(pen, words, x, y, align) {
    pen.textAlign = align;
    pen.fillText(words, x, y);
  }

  function nearest(x, y) {
    let best = -1, closest = 12 ** 2;
    for (let i = 0; 2 * i < places.length; i++) {
      const distance = (places[2 * i] - x) ** 2 + (places[2 * i + 1] - y) ** 2;
      if (distance < closest) { closest = distance; best = i; }
    }
    return best;
  }
};
