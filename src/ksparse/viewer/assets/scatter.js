"use strict";
// All latents as points: any number of a latent against any other.

ksparse.views.scatter = async function scatterView(path, query, current) {
  const { el, run, points } = ksparse;
  document.title = `${run.name} · scatter`;
  if (run.columns.length < 2) {
    ksparse.show(el("h1", {}, "Scatter"),
      run.lacks.map(({ adds, command }) => ksparse.missing(adds, command)));
    return;
  }
  const has = (key) => run.columns.some((column) => column.key === key);
  const pick = (name, ...defaults) =>
    [query.get(name), ...defaults, ...run.columns.map(({ key }) => key)].find(has);
  const keys = {
    x: pick("x", "density"), y: pick("y", "max_act"), colour: pick("colour", "cosine"),
  };
  const canvas = el("canvas", {
    class: "map", tabindex: 0, role: "img",
    "aria-label": "All latents as points; the table has the same numbers",
  });
  const caption = el("p", { class: "map-said", role: "status" },
    "Point at a latent; click to open it.");
  const legend = ksparse.legend(run.columns.find(({ key }) => key === keys.colour));
  const select = (name, title) => {
    const change = (event) => {
      location.hash = ksparse.to("scatter", { ...keys, [name]: event.target.value });
    };
    return el("label", {}, `${title} `, el("select", { on: { change } },
      run.columns.map(({ key, label }) =>
        el("option", { value: key, selected: keys[name] === key }, label))));
  };
  ksparse.show(
    el("div", { class: "map-head" }, el("h1", {}, "Scatter"), select("x", "across"),
      select("y", "up"), select("colour", "colour")),
    canvas, caption, legend);
  const [xs, ys, colours] = await Promise.all(
    [keys.x, keys.y, keys.colour].map((key) => ksparse.column(key)));
  if (!current()) return;
  const values = { x: xs, y: ys, colour: colours }, levels = points.levels(colours);
  const axes = { x: axis(keys.x, xs), y: axis(keys.y, ys), colour: axis(keys.colour, colours) };
  let places = new Float32Array(0);
  draw();
  performance.mark("scatter");
  points.keepDrawn(canvas, draw, current);
  canvas.addEventListener("pointermove", async (event) => {
    const number = points.nearest(places, event.offsetX, event.offsetY);
    canvas.classList.toggle("over", number >= 0);
    if (number < 0) return;
    const gloss = await ksparse.gloss(number);
    const value = (name) =>
      `${axes[name].label} ${ksparse.format(values[name][number], axes[name].kind)}`;
    if (current()) {
      caption.replaceChildren(...ksparse.link(number, gloss).filter(Boolean),
        el("span", { class: "aside" }, ["x", "y", "colour"].map(value).join(" · ")));
    }
  });
  canvas.addEventListener("click", (event) => {
    const number = points.nearest(places, event.offsetX, event.offsetY);
    if (number >= 0) location.hash = `#/latent/${number}`;
  });

  // An axis from the least to the largest value. It is logarithmic if no value is negative and the
  // values other than 0 span more than a factor of 30; then zeros stand before its start.
  function axis(key, column) {
    let least = Infinity, most = -Infinity, negative = false, zero = false;
    for (const value of column) {
      zero ||= value === 0;
      if (value === 0 || Number.isNaN(value)) continue;
      least = Math.min(least, value);
      most = Math.max(most, value);
      negative ||= value < 0;
    }
    if (least > most) [least, most] = [0, 1];
    const log = !negative && most > 30 * least;
    if (!log && zero) [least, most] = [Math.min(0, least), Math.max(0, most)];
    const of = log ? Math.log10 : (value) => value;
    const from = of(least), span = of(most) - from || 1;
    // A logarithmic axis has room for zeros before its start. A value that is NaN has no place.
    const room = log && zero ? 0.05 : 0;
    const place = (value) =>
      log && value === 0 ? 0 : room + ((1 - room) * (of(value) - from)) / span;
    const named = run.columns.find((each) => each.key === key);
    return { ...named, log, place, ticks: [...(room ? [0] : []), ...ticks(least, most, log)] };
  }

  // Round values between two ends: powers of ten, or 1, 2 and 5 times one.
  function ticks(least, most, log) {
    if (log) {
      const first = Math.ceil(Math.log10(least) - 1e-9), last = Math.log10(most) + 1e-9;
      const all = Array.from({ length: Math.max(0, Math.floor(last) - first + 1) },
        (_, i) => 10 ** (first + i));
      if (all.length > 2) return all.filter((_, i) => i % Math.ceil(all.length / 7) === 0);
      return all.concat([2, 5].flatMap((by) => [-1, 0, 1, 2].map((i) => by * 10 ** (first + i))))
        .filter((value) => value >= least && value <= most);
    }
    const rough = (most - least) / 6, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((by) => by * power >= rough);
    const first = Math.ceil(least / step - 1e-9);
    return Array.from({ length: Math.floor(most / step + 1e-9) - first + 1 },
      (_, i) => Number(((first + i) * step).toPrecision(12)));
  }

  function draw() {
    const colour = points.palette(), sheet = points.open(canvas, colour), n = xs.length;
    const { pen, width, height } = sheet;
    const frame = { left: 62, right: width - 14, top: 12, bottom: height - 46 };
    const x = (share) => frame.left + 8 + share * (frame.right - frame.left - 16);
    const y = (share) => frame.bottom - 8 - share * (frame.bottom - frame.top - 16);
    drawAxes(pen, colour, frame, x, y);
    places = new Float32Array(2 * n);
    for (let i = 0; i < n; i++) {
      places[2 * i] = x(axes.x.place(xs[i]));
      places[2 * i + 1] = y(axes.y.place(ys[i]));
    }
    points.draw(sheet, places, levels, colour.levels,
      { radius: points.radius(n), opacity: n > 30_000 ? 0.5 : 0.8 });
    pen.strokeStyle = colour.hot;
    pen.lineWidth = 1.5;
    for (const i of ksparse.labels.numbers()) {
      pen.beginPath();
      pen.arc(places[2 * i], places[2 * i + 1], 6, 0, 7);
      pen.stroke();
    }
  }

  function drawAxes(pen, colour, frame, x, y) {
    const text = (value, { kind }) =>
      kind === "percent"
        ? `${Number((100 * value).toPrecision(4))} %`
        : value !== 0 && Math.abs(value) < 1e-3
          ? value.toExponential(0)
          : Number(value.toPrecision(4)).toLocaleString("en");
    const title = ({ label, unit, log }) =>
      `${label}${unit ? ` (${unit})` : ""}${log ? ", log scale" : ""}`;
    pen.font = `12px ${colour.sans}`;
    pen.lineWidth = 1;
    pen.fillStyle = colour.soft;
    pen.strokeStyle = colour.grid;
    const line = (...ends) => {
      pen.beginPath();
      pen.moveTo(ends[0], ends[1]);
      pen.lineTo(ends[2], ends[3]);
      pen.stroke();
    };
    // Each tick has a line, and its value where there is room.
    pen.textAlign = "center";
    let last = -Infinity;
    for (const value of axes.x.ticks) {
      const at = Math.round(x(axes.x.place(value))) + 0.5;
      line(at, frame.top, at, frame.bottom);
      if (at - last < 62) continue;
      last = at;
      pen.fillText(text(value, axes.x), at, frame.bottom + 17);
    }
    pen.textAlign = "right";
    last = Infinity;
    for (const value of axes.y.ticks) {
      const at = Math.round(y(axes.y.place(value))) + 0.5;
      line(frame.left, at, frame.right, at);
      if (last - at < 18) continue;
      last = at;
      pen.fillText(text(value, axes.y), frame.left - 7, at + 4);
    }
    pen.strokeStyle = colour.line;
    pen.strokeRect(frame.left + 0.5, frame.top + 0.5, frame.right - frame.left,
      frame.bottom - frame.top);
    pen.textAlign = "center";
    pen.fillStyle = colour.ink;
    pen.fillText(title(axes.x), (frame.left + frame.right) / 2, frame.bottom + 37);
    pen.save();
    pen.translate(13, (frame.top + frame.bottom) / 2);
    pen.rotate(-Math.PI / 2);
    pen.fillText(title(axes.y), 0, 0);
    pen.restore();
  }
};

// What the colours of points mean.
ksparse.legend = (column) => ksparse.el("p", { class: "legend" },
  `Colour: ${column.label}, by rank, `, "low ", ksparse.el("span", { class: "ramp" }), " high; ",
  ksparse.el("span", { class: "grey" }, "grey"), " was not measured.");
