"use strict";
// What all views use: elements, pieces of data, numbers, tokens as text, labels. Text goes into the page through text nodes alone.

const ksparse = { views: {}, live: document.documentElement.hasAttribute("data-live") };

// The server's token comes in the address that it printed. It is kept for reloads and other tabs:
// in storage, which belongs to this port, since a cookie would go to every server of the machine.
const given = new URLSearchParams(location.search).get("token");
ksparse.token = ksparse.live && (given ?? localStorage.getItem("ksparse token"));
if (ksparse.token) {
  localStorage.setItem("ksparse token", ksparse.token);
  history.replaceState(null, "", location.pathname + location.hash);
}

// ---- elements ---------------------------------------------------------------------------------------------------

const SVG = new Set(["svg", "title", "g", "rect", "line"]);

// el("a", { class: "x", href: "#/", on: { click } }, "text", child, …); null and false are left out
ksparse.el = function el(name, given = {}, ...children) {
  const made = SVG.has(name) ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(given)) {
    if (key === "on") for (const [event, act] of Object.entries(value)) made.addEventListener(event, act);
    else if (key === "style") for (const [property, set] of Object.entries(value)) made.style.setProperty(property, set);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value != null) made.setAttribute(key, value);
  }
  made.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return made;
};

ksparse.show = function show(...children) {
  document.getElementById("main").replaceChildren(...children.flat(Infinity).filter(Boolean));
};

ksparse.missing = (adds, command) => ksparse.el("p", { class: "missing" }, `Not in this run: ${adds}. `, ksparse.el("code", {}, command), " adds it.");

// ---- pieces -----------------------------------------------------------------------------------------------------

const kept = new Map(); // name -> promise, the latest last
const awaited = new Map(); // name -> resolve, for pieces that come as scripts
const KEEP = 400;

ksparse.load = function load(name) {
  const found = kept.get(name) ?? (ksparse.live ? fetched(name) : scripted(name));
  kept.delete(name);
  kept.set(name, found);
  if (kept.size > KEEP) kept.delete(kept.keys().next().value);
  found.catch(() => kept.delete(name));
  return found;
};

async function fetched(name) {
  return answered(await fetch(`data/${name}.json`, { headers: knowing() }));
}

function scripted(name) {
  return new Promise((resolve, reject) => {
    awaited.set(name, resolve);
    const file = `${document.documentElement.dataset.home ?? ""}data/${name}.js`;
    const missing = () => reject(new Error(`${file} is missing; load the page anew`));
    const script = ksparse.el("script", { src: file, on: { error: missing } });
    script.addEventListener("load", () => script.remove());
    document.head.append(script);
  });
}

ksparse.take = (name, piece) => { awaited.get(name)?.(piece); awaited.delete(name); };

// Ask the server for something that it works out.
ksparse.ask = async (name, asked) => answered(await fetch(`api/${name}`, {
  method: "POST", headers: { "Content-Type": "application/json", ...knowing() }, body: JSON.stringify(asked) }));

const knowing = () => ({ Authorization: `Bearer ${ksparse.token}` });

async function answered(response) {
  if (response.ok) return response.json();
  const said = await response.text();
  let why = said;
  try { why = JSON.parse(said).error ?? said; } catch { /* it was plain text */ }
  throw new Error(ksparse.visible(why) || `the server answered ${response.status}`);
}

// The numbers of all latents in one column, as Float32Array.
const columns = new Map();
ksparse.column = async function column(key) {
  if (!columns.has(key)) {
    const bytes = Uint8Array.from(atob((await ksparse.load(`columns/${key}`)).float32), (char) => char.charCodeAt(0));
    columns.set(key, new Float32Array(bytes.buffer));
  }
  return columns.get(key);
};

ksparse.latent = async function latent(number) {
  const piece = await ksparse.load(`latents/${Math.floor(number / ksparse.run.block)}`);
  return { number, strings: piece.strings, ...piece.latents[number] };
};

ksparse.gloss = async function gloss(number) {
  const size = ksparse.run.gloss_block;
  return (await ksparse.load(`glosses/${Math.floor(number / size)}`)).glosses[number % size];
};

// ---- numbers ----------------------------------------------------------------------------------------------------

const digits = (value, wanted) => (value === 0 ? 0 : Math.min(8, Math.max(0, wanted - 1 - Math.floor(Math.log10(Math.abs(value))))));
const fixed = (value, wanted) => value.toLocaleString("en", { minimumFractionDigits: digits(value, wanted), maximumFractionDigits: digits(value, wanted) });
const known = (value) => value != null && !Number.isNaN(value);

ksparse.count = (value) => value.toLocaleString("en");
ksparse.percent = (share) => `${(100 * share).toFixed(Math.min(4, digits(100 * share, 2)))} %`;
ksparse.number = (value) => (value !== 0 && Math.abs(value) < 1e-4 ? value.toExponential(1) : fixed(value, 3));
ksparse.written = (value, kind) => (known(value) ? (kind === "percent" ? ksparse.percent(value) : ksparse.number(value)) : "–");
ksparse.known = known;

// ---- tokens as text ---------------------------------------------------------------------------------------------

const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u;
const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu;

// What a reader typed, with unseen characters as their codes. Strings in pieces are like this already.
ksparse.visible = (text) => String(text).replace(UNSEEN, (char) => `⟨U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

// A stretch of text: tokens, a value of each (0: quiet), the largest there is. Quiet neighbours are one text node.
ksparse.text = function text(tokens, values, largest, peak = -1, written = ksparse.number) {
  const parts = [];
  let quiet = "";
  const flush = () => { if (quiet) parts.push(quiet); quiet = ""; };
  tokens.forEach((token, i) => {
    const value = values[i] ?? 0;
    if (value > 0 || i === peak) {
      flush();
      const heat = largest > 0 ? Math.min(1, Math.max(0, value / largest)).toFixed(2) : 0;
      parts.push(ksparse.el(i === peak ? "mark" : "b", { title: written(value), style: { "--a": heat } }, token));
    } else if (RIGHT_TO_LEFT.test(token)) {
      flush();
      parts.push(ksparse.el("bdi", {}, token));
    } else {
      quiet += token;
    }
    if (token.endsWith("↵")) { flush(); parts.push(ksparse.el("br", { class: "line" })); }
  });
  flush();
  return ksparse.el("p", { class: "text" }, parts);
};

// A token in quotes, with what is said of it behind.
ksparse.quoted = (token, said) => ksparse.el("span", { class: "pair" }, ksparse.el("bdi", {}, `"${token}"`), said == null ? null : ksparse.el("span", { class: "aside" }, said));

// A latent among others: its number, its label or what it fires on.
ksparse.link = function link(number, gloss) {
  const { label, star } = ksparse.labels.of(number);
  const words = label ? [ksparse.el("bdi", { class: "own" }, ksparse.visible(label))]
    : (gloss ?? []).map(([token, share]) => ksparse.quoted(token, `${Math.round(100 * share)} %`));
  return [ksparse.el("a", { class: "to", href: `#/latent/${number}` }, String(number)), star ? ksparse.el("span", { class: "starred", title: "starred" }, "★") : null,
    ksparse.el("span", { class: "gloss" }, words)];
};

// ---- labels and stars -------------------------------------------------------------------------------------------

ksparse.labels = {
  all: {},
  async open() {
    this.all = { ...(await ksparse.load("labels")).latents, ...(ksparse.live ? {} : this.own()) };
  },
  of(number) {
    const found = this.all[number];
    return { label: typeof found?.label === "string" ? found.label : "", star: found?.star === true };
  },
  async set(number, changes) {
    const entry = { ...this.of(number), ...changes };
    if (ksparse.live) {
      this.all[number] = await ksparse.ask("label", { latent: number, ...entry });
    } else {
      this.all[number] = entry;
      localStorage.setItem(this.place(), JSON.stringify({ ...this.own(), [number]: entry }));
    }
  },
  place: () => `ksparse ${ksparse.run.name} ${ksparse.run.n} ${location.pathname}`,
  own() {
    try { return JSON.parse(localStorage.getItem(this.place()) ?? "{}"); } catch { return {}; }
  },
  numbers() {
    return Object.keys(this.all).map(Number).filter((number) => number < ksparse.run.n && this.of(number).label || this.of(number).star).sort((a, b) => a - b);
  },
  download() {
    const latents = Object.fromEntries(this.numbers().map((number) => [number, this.of(number)]));
    const blob = new Blob([JSON.stringify({ format: 1, run: ksparse.run.name, latents }, null, 1)], { type: "application/json" });
    const link = ksparse.el("a", { href: URL.createObjectURL(blob), download: "labels.json" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  },
};

// ---- addresses --------------------------------------------------------------------------------------------------

// "#/latents?sort=f1" -> { path: ["latents"], asked: URLSearchParams }
ksparse.address = function address() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?", 2);
  return { path: path.split("/").filter(Boolean), asked: new URLSearchParams(query) };
};

ksparse.to = (path, asked = {}) => {
  const query = new URLSearchParams(Object.entries(asked).filter(([, value]) => value !== "" && value != null)).toString();
  return `#/${path}${query ? `?${query}` : ""}`;
};
