"use strict";
// Many points on a canvas, for the map and the scatter: drawn, coloured by rank, found, selected.

const LEVELS = 64; // of colour
const UNMEASURED = LEVELS;

ksparse.points = {
  // The colours of the page as it is, light or dark.
  palette() {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    const [cold, hot, grey] = [of("--first"), of("--second"), of("--soft")].map(rgb);
    const ramp = Array.from({ length: LEVELS }, (_, level) =>
      cold.map((from, i) => Math.round(from + ((hot[i] - from) * level) / (LEVELS - 1))));
    return {
      ink: of("--ink"), soft: of("--soft"), line: of("--line"), grid: of("--grid"),
      card: of("--card"), first: of("--first"), hot: of("--second"), sans: of("--sans"),
      mono: of("--mono"), levels: [...ramp, grey],
    };
  },

  // Make a canvas as sharp as the screen, and empty; return its pen, in CSS pixels, and its size.
  open(canvas, colours) {
    const scale = devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    const w = Math.max(1, Math.round(width * scale)), h = Math.max(1, Math.round(height * scale));
    if (canvas.width !== w) canvas.width = w;
    if (canvas.height !== h) canvas.height = h;
    const pen = canvas.getContext("2d", { alpha: false, willReadFrequently: true });
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.fillStyle = colours.card;
    pen.fillRect(0, 0, width, height);
    return { pen, width, height, scale };
  },

  // The colour of each point by the rank of its value, and the order to draw them in: those
  // without a value first, the others by number, so that no colour hides another.
  levels(column) {
    const n = column.length, level = new Uint8Array(n).fill(UNMEASURED);
    const measured = column.filter((value) => !Number.isNaN(value)).sort();
    const borders = Array.from({ length: LEVELS - 1 },
      (_, i) => measured[Math.floor(((i + 1) * measured.length) / LEVELS)]);
    const order = new Uint32Array(n);
    let first = 0, next = n - measured.length;
    for (let i = 0; i < n; i++) {
      if (Number.isNaN(column[i])) order[first++] = i;
      else {
        level[i] = countUpTo(borders, column[i]);
        order[next++] = i;
      }
    }
    return { level, order };
  },

  // Round dots at `places`, [2 n] in CSS pixels, on what is drawn already; NaN is not drawn. With
  // `every` above 1 only some of them, while the rest would take too long.
  draw({ pen, scale }, places, { level, order }, colours, { radius, opacity, every = 1 }) {
    const { width, height } = pen.canvas, image = pen.getImageData(0, 0, width, height);
    const pixels = new Int32Array(image.data.buffer);
    // A pixel is 0xAABBGGRR.
    const inks = {
      redBlue: Int32Array.from(colours, ([red, , blue]) => (blue << 16) | red),
      green: Int32Array.from(colours, ([, green]) => green << 8),
    };
    const shape = dot(radius * scale, opacity);
    stamp(pixels, width, height, places, scale, level, order, every, inks, shape);
    pen.putImageData(image, 0, 0);
  },

  // A radius at which so many points still look like points.
  radius: (n) => (n > 60_000 ? 1.2 : n > 12_000 ? 1.7 : n > 2_000 ? 2.4 : 3.4),

  // The point at most `within` pixels from a place; -1 without one.
  nearest(places, x, y, within = 12) {
    let best = -1, closest = within ** 2;
    for (let i = 0; 2 * i < places.length; i++) {
      const distance = (places[2 * i] - x) ** 2 + (places[2 * i + 1] - y) ** 2;
      if (distance < closest) {
        closest = distance;
        best = i;
      }
    }
    return best;
  },

  // Text that can be read on top of points.
  write({ pen }, colours, text, x, y, colour = colours.ink) {
    pen.lineJoin = "round";
    pen.lineWidth = 4;
    pen.strokeStyle = colours.card;
    pen.strokeText(text, x, y);
    pen.fillStyle = colour;
    pen.fillText(text, x, y);
  },

  // Draw now, and again when the size or the colours of the page change.
  keepDrawn(canvas, draw, current) {
    const observer = new ResizeObserver(() => (current() ? draw() : observer.disconnect()));
    observer.observe(canvas);
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const redraw = () => (current() ? draw() : dark.removeEventListener("change", redraw));
    dark.addEventListener("change", redraw);
  },
};

function countUpTo(borders, value) {
  let low = 0, high = borders.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (borders[middle] <= value) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Mix dots into pixels. A function of its own, with little else in it, is compiled well. Red and
// blue are mixed at once, as two numbers in one.
function stamp(pixels, w, h, places, scale, level, order, every, inks, shape) {
  const { half, across, down, cover } = shape, { redBlue, green } = inks;
  const count = cover.length, offsets = across.map((x, i) => down[i] * w + x);
  const right = w - half, bottom = h - half;
  for (let place = 0; place < order.length; place += every) {
    const i = order[place];
    const x = Math.round(places[2 * i] * scale), y = Math.round(places[2 * i + 1] * scale);
    // Written so that NaN is left out too.
    if (!(x >= -half && y >= -half && x < w + half && y < h + half)) continue;
    const whole = x >= half && y >= half && x < right && y < bottom;
    const at = y * w + x, rb = redBlue[level[i]], g = green[level[i]];
    for (let k = 0; k < count; k++) {
      if (!whole) {
        const px = x + across[k], py = y + down[k];
        if (px < 0 || py < 0 || px >= w || py >= h) continue;
      }
      const to = at + offsets[k], share = cover[k], under = pixels[to];
      const underRb = under & 0xff00ff, underG = under & 0xff00;
      pixels[to] = -0x1000000 |
        ((underRb + (Math.imul(rb - underRb, share) >> 7)) & 0xff00ff) |
        ((underG + (Math.imul(g - underG, share) >> 7)) & 0xff00);
    }
  }
}

// The pixels that a dot covers, from its middle, and how much of each, in 128ths.
function dot(radius, opacity) {
  const half = Math.max(1, Math.ceil(radius)), across = [], down = [], cover = [];
  for (let y = -half; y <= half; y++) {
    for (let x = -half; x <= half; x++) {
      const inside = Math.min(1, radius + 0.5 - Math.hypot(x, y));
      if (inside < 0.05) continue;
      across.push(x);
      down.push(y);
      cover.push(Math.round(128 * opacity * inside));
    }
  }
  return {
    half, across: Int32Array.from(across), down: Int32Array.from(down),
    cover: Int32Array.from(cover),
  };
}

// ---- selections: a polygon on a layout, as text in the address: "pca:0.1,0.2,0.3,…"

const MOST_CORNERS = 48;

ksparse.selection = {
  write(layout, corners) {
    const step = Math.max(1, Math.ceil(corners.length / MOST_CORNERS));
    const kept = corners.filter((_, i) => i % step === 0);
    return `${layout}:${kept.flat().map((value) => Number(value.toPrecision(4))).join(",")}`;
  },
  read(text) {
    const [layout, list = ""] = text.split(":", 2), numbers = list.split(",").map(Number);
    const valid = numbers.length >= 6 && numbers.length % 2 === 0 &&
      numbers.length <= 4 * MOST_CORNERS && numbers.every(Number.isFinite);
    if (!valid || !ksparse.run.maps.includes(layout)) return null;
    return {
      layout,
      corners: numbers.flatMap((x, i) => (i % 2 ? [] : [[x, numbers[i + 1]]])),
    };
  },
  // The numbers of the latents in a selection; none in one that this run does not have.
  async latents(text) {
    const selected = ksparse.selection.read(text);
    if (!selected) return [];
    const { places } = await ksparse.map(selected.layout);
    const numbers = [];
    for (let i = 0; 2 * i < places.length; i++) {
      if (inPolygon(selected.corners, places[2 * i], places[2 * i + 1])) numbers.push(i);
    }
    return numbers;
  },
};

// By the even-odd rule; NaN is in no polygon.
function inPolygon(corners, x, y) {
  let inside = false;
  for (let i = 0, j = corners.length - 1; i < corners.length; j = i++) {
    const [ax, ay] = corners[i], [bx, by] = corners[j];
    if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) inside = !inside;
  }
  return inside;
}

// A layout: places [2 n], and what the server says of it.
const layouts = new Map();
ksparse.map = function map(name) {
  const key = `${ksparse.run.name}/${name}`;
  if (!layouts.has(key)) {
    const loading = ksparse.load(`maps/${name}`).then((resource) => {
      const bytes = Uint8Array.from(atob(resource.float32), (char) => char.charCodeAt(0));
      return { ...resource, places: new Float32Array(bytes.buffer) };
    });
    loading.catch(() => layouts.delete(key));
    layouts.set(key, loading);
  }
  return layouts.get(key);
};
