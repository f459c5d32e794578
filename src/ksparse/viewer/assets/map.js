"use strict";
// All latents as points: any column against any other.

const LEVELS = 8; // of colour

ksparse.views.map = async function mapView(path, query, current) {
  const { el, run } = ksparse;
  document.title = `${run.name} · map`;
  if (run.columns.length < 2) {
    ksparse.show(el("h1", {}, "Map"),
      run.lacks.map(({ adds, command }) => ksparse.missing(adds, command)));
    return;
  }
  const has = (key) => run.columns.some((column) => column.key === key);
  const pick = (name, ...defaults) =>
    [query.get(name), ...defaults, ...run.columns.map(({ key }) => key)].find(has);
  const keys = {
    x: pick("x", "density", "pca_1"), y: pick("y", "max_act", "pca_2"),
    colour: pick("colour", "cosine"),
  };
  const canvas = el("canvas", {
    class: "map", tabindex: 0, role: "img",
    "aria-label": "All latents as points; the table has the same numbers",
  });
  const caption = el("p", { class: "map-said", role: "status" },
    "Point at a latent; click to open it. ",
    el("span", { class: "aside" }, "Colour by rank: ", el("span", { class: "cold" }, "low"),
      " to ", el("span", { class: "hot" }, "high"), "; grey was not measured."));
  const select = (name, title) => {
    const change = (event) => {
      location.hash = ksparse.to("map", { ...keys, [name]: event.target.value });
    };
    return el("label", {}, `${title} `, el("select", { on: { change } },
      run.columns.map(({ key, label }) =>
        el("option", { value: key, selected: keys[name] === key }, label))));
  };
  ksparse.show(
    el("div", { class: "map-head" }, el("h1", {}, "Map"), select("x", "across"),
      select("y", "up"), select("colour", "colour")),
    canvas, caption);
  const [xs, ys, colours] = await Promise.all(
    [keys.x, keys.y, keys.colour].map((key) => ksparse.column(key)));
  if (!current()) return;
  const values = { x: xs, y: ys, colour: colours };
  const axes = {
    x: axis(keys.x, xs), y: axis(keys.y, ys),
    colour: { ...axis(keys.colour, colours), place: rank(colours) },
  };
  let places = draw();
  performance.mark("map");
  const observer = new ResizeObserver(() => {
    if (current()) places = draw();
    else observer.disconnect();
  });
  observer.observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    if (current()) places = draw();
  });
  canvas.addEventListener("mousemove", async (event) => {
    const number = nearest(event.offsetX, event.offsetY);
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
    const number = nearest(event.offsetX, event.offsetY);
    if (number >= 0) location.hash = `#/latent/${number}`;
  });

  // An axis from the least to the largest value. It is logarithmic if no value is negative and the
  // values other than 0 span more than a factor of 30.
  function axis(key, column) {
    let least = Infinity, most = -Infinity, negative = false;
    for (const value of column) {
      if (value === 0 || Number.isNaN(value)) continue;
      least = Math.min(least, value);
      most = Math.max(most, value);
      negative ||= value < 0;
    }
    const log = !negative && most > 30 * least;
    const scale = log ? Math.log : (value) => value;
    const low = scale(log ? least : Math.min(least, negative ? least : 0)), high = scale(most);
    const place = (value) =>
      value > 0 || !log ? (scale(value) - low) / (high - low || 1) : NaN;
    const description = run.columns.find((entry) => entry.key === key);
    return { ...description, log, place, ends: [log ? least : low, most] };
  }

  // The eighth of all latents that a value is in, so that a few extreme values do not take all the
  // colour; LEVELS for those not measured.
  function rank(column) {
    const sorted = column.filter((value) => !Number.isNaN(value)).sort();
    const borders = Array.from({ length: LEVELS - 1 },
      (_, i) => sorted[Math.floor(((i + 1) * sorted.length) / LEVELS)]);
    return (value) =>
      Number.isNaN(value) ? LEVELS : borders.filter((border) => value >= border).length;
  }

  // Draw all points; return their places, [2 n].
  function draw() {
    const scale = devicePixelRatio || 1, margin = 26;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = width * scale;
    canvas.height = height * scale;
    const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const [ink, line, cold, hot] = ["--soft", "--line", "--first", "--second"]
      .map((name) => style.getPropertyValue(name).trim());
    pen.scale(scale, scale);
    pen.font = `12px ${style.getPropertyValue("--sans")}`;
    pen.strokeStyle = line;
    pen.strokeRect(margin, 8, width - margin - 8, height - margin - 8);
    pen.fillStyle = ink;
    drawAxes(pen, width, height, margin);
    const n = xs.length, points = new Float32Array(2 * n), size = n > 30_000 ? 1.5 : 3.2;
    const levels = Array.from({ length: LEVELS + 1 }, () => []);
    for (let i = 0; i < n; i++) {
      points[2 * i] = margin + 4 + axes.x.place(xs[i]) * (width - margin - 16);
      points[2 * i + 1] = height - margin - 4 - axes.y.place(ys[i]) * (height - margin - 16);
      levels[axes.colour.place(colours[i])].push(i);
    }
    pen.globalAlpha = n > 30_000 ? 0.5 : 0.75;
    // Points that were not measured come first, below the others.
    for (const level of [LEVELS, ...Array(LEVELS).keys()]) {
      const share = Math.round((100 * level) / (LEVELS - 1));
      pen.fillStyle = level === LEVELS ? ink : `color-mix(in srgb, ${hot} ${share}%, ${cold})`;
      for (const i of levels[level]) {
        pen.fillRect(points[2 * i] - size / 2, points[2 * i + 1] - size / 2, size, size);
      }
    }
    pen.globalAlpha = 1;
    pen.strokeStyle = hot;
    for (const i of ksparse.labels.numbers()) {
      pen.beginPath();
      pen.arc(points[2 * i], points[2 * i + 1], 5, 0, 7);
      pen.stroke();
    }
    return points;
  }

  function drawAxes(pen, width, height, margin) {
    const end = (name, i) => ksparse.format(axes[name].ends[i], axes[name].kind);
    const title = (name) => `${axes[name].label}${axes[name].log ? ", log" : ""} →`;
    write(pen, end("x", 0), margin, height - 8, "left");
    write(pen, title("x"), width / 2, height - 8, "center");
    write(pen, end("x", 1), width - 8, height - 8, "right");
    pen.save();
    pen.rotate(-Math.PI / 2);
    write(pen, end("y", 0), margin - height, 16, "left");
    write(pen, title("y"), -height / 2, 16, "center");
    write(pen, end("y", 1), -8, 16, "right");
    pen.restore();
  }

  function write(pen, text, x, y, align) {
    pen.textAlign = align;
    pen.fillText(text, x, y);
  }

  // The latent at most 12 pixels from a place; -1 without one.
  function nearest(x, y) {
    let best = -1, closest = 12 ** 2;
    for (let i = 0; 2 * i < places.length; i++) {
      const distance = (places[2 * i] - x) ** 2 + (places[2 * i + 1] - y) ** 2;
      if (distance < closest) {
        closest = distance;
        best = i;
      }
    }
    return best;
  }
};
