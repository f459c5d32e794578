"use strict";
// What all views use: elements, resources, numbers, tokens as text, labels, addresses.
// Text from data reaches the page only through text nodes and attributes, never as markup.

const ksparse = {
  views: {},
  live: document.documentElement.hasAttribute("data-live"),
  runs: [], // that the server shows
  name: null, // of the run that is shown; null for pages without a server
};

// The server's token comes in the address that it printed. It is kept for reloads and other tabs,
// in storage, which belongs to this port; a cookie would go to every server of the machine.
const tokenInAddress = new URLSearchParams(location.search).get("token");
ksparse.token = ksparse.live && (tokenInAddress ?? localStorage.getItem("ksparse token"));
if (ksparse.token) {
  localStorage.setItem("ksparse token", ksparse.token);
  history.replaceState(null, "", location.pathname + location.hash);
}

// ---- elements

const SVG = new Set(["svg", "title", "g", "rect", "line"]);

// el("a", { class: "x", href: "#/", on: { click } }, "text", child, …)
// Children and attributes that are null or false are left out.
ksparse.el = function el(name, attributes = {}, ...children) {
  const element = SVG.has(name)
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "on") {
      for (const [event, listener] of Object.entries(value)) {
        element.addEventListener(event, listener);
      }
    } else if (key === "style") {
      for (const [property, set] of Object.entries(value)) element.style.setProperty(property, set);
    } else if (value === true) {
      element.setAttribute(key, "");
    } else if (value !== false && value != null) {
      element.setAttribute(key, key === "href" ? ksparse.inRun(value) : value);
    }
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
};

ksparse.show = function show(...children) {
  document.getElementById("main").replaceChildren(...children.flat(Infinity).filter(Boolean));
};

// ---- resources

const cached = new Map(); // name -> promise, the most recent last
const awaited = new Map(); // name -> resolve, for resources that come as scripts
const CACHE_SIZE = 400;

// A resource of a run, or, without a run, of what the server shows.
ksparse.load = function load(name, run = ksparse.name) {
  const path = run == null ? name : `run/${encodeURIComponent(run)}/${name}`;
  const promise = cached.get(path) ?? (ksparse.live ? fetchResource(path) : loadScript(name));
  cached.delete(path);
  cached.set(path, promise);
  if (cached.size > CACHE_SIZE) cached.delete(cached.keys().next().value);
  promise.catch(() => cached.delete(path));
  return promise;
};

async function fetchResource(path) {
  return readResponse(await ask(`data/${path}.json`, { headers: authorization() }));
}

async function ask(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server of these pages does not answer. Is `ksparse view` still running?");
  }
}

function loadScript(name) {
  return new Promise((resolve, reject) => {
    awaited.set(name, resolve);
    const file = `${document.documentElement.dataset.home ?? ""}data/${name}.js`;
    const fail = () => reject(new Error(`${file} is missing; reload the page`));
    const script = ksparse.el("script", { src: file, on: { error: fail } });
    script.addEventListener("load", () => script.remove());
    document.head.append(script);
  });
}

ksparse.take = (name, resource) => {
  awaited.get(name)?.(resource);
  awaited.delete(name);
};

// Send a request about a run that the server computes an answer to; `signal` may abort it.
ksparse.request = async (name, body, { run = ksparse.name, signal } = {}) =>
  readResponse(await ask(`api/${name}`, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...authorization() },
    body: JSON.stringify({ run, ...body }),
    signal,
  }));

const authorization = () => ({ Authorization: `Bearer ${ksparse.token}` });

async function readResponse(response) {
  if (response.ok) return response.json();
  const text = await response.text();
  let message = text;
  try {
    message = JSON.parse(text).error ?? text;
  } catch { /* it was plain text */ }
  const unforeseen = response.status === 500 || !message;
  throw new Error(unforeseen
    ? `The server met an error of its own (${response.status}); its terminal says more.`
    : ksparse.visible(message));
}

// A number of every latent, as Float32Array.
const columns = new Map();
ksparse.column = async function column(key) {
  const place = `${ksparse.name}/${key}`;
  if (!columns.has(place)) {
    const { float32 } = await ksparse.load(`columns/${key}`);
    const bytes = Uint8Array.from(atob(float32), (char) => char.charCodeAt(0));
    columns.set(place, new Float32Array(bytes.buffer));
  }
  return columns.get(place);
};

// The largest value of every latent, or null without `stats`.
ksparse.largestValues = async () =>
  ksparse.run.columns.some(({ key }) => key === "max_act") ? ksparse.column("max_act") : null;

ksparse.latent = async function latent(number) {
  const resource = await ksparse.load(`latents/${Math.floor(number / ksparse.run.block)}`);
  return { number, strings: resource.strings, ...resource.latents[number] };
};

// The tokens that a latent's decoder row raises most.
ksparse.raises = async function raises(number) {
  const size = ksparse.run.gloss_block;
  return (await ksparse.load(`glosses/${Math.floor(number / size)}`)).raises[number % size];
};

// The whole text of a context: its tokens, and which of them stand between documents.
ksparse.context = async function context(number) {
  const size = ksparse.run.context_block;
  const { strings, contexts } = await ksparse.load(`contexts/${Math.floor(number / size)}`);
  const { t, borders } = contexts[number % size];
  return { tokens: t.map((i) => strings[i]), borders };
};

// A short example of a latent, or null.
ksparse.example = async function example(number) {
  const size = ksparse.run.example_block;
  return (await ksparse.load(`examples/${Math.floor(number / size)}`)).examples[number % size];
};

ksparse.gloss = async function gloss(number) {
  const size = ksparse.run.gloss_block;
  return (await ksparse.load(`glosses/${Math.floor(number / size)}`)).glosses[number % size];
};

// ---- numbers

const decimals = (value, digits) =>
  value === 0 ? 0 : Math.min(8, Math.max(0, digits - 1 - Math.floor(Math.log10(Math.abs(value)))));
const significant = (value, digits) => value.toLocaleString("en", {
  minimumFractionDigits: decimals(value, digits),
  maximumFractionDigits: decimals(value, digits),
});
const known = (value) => value != null && !Number.isNaN(value);

ksparse.known = known;
ksparse.count = (value) => value.toLocaleString("en");
ksparse.percent = (share) => `${(100 * share).toFixed(Math.min(4, decimals(100 * share, 2)))} %`;
ksparse.number = (value) =>
  value !== 0 && Math.abs(value) < 1e-4 ? value.toExponential(1) : significant(value, 3);
ksparse.format = function format(value, kind) {
  if (!known(value)) return "–";
  return kind === "percent" ? ksparse.percent(value) : ksparse.number(value);
};

// ---- tokens as text

const RIGHT_TO_LEFT =
  /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u;
const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu;

// Text that a reader typed, with unseen characters as their codes. Strings of resources have that
// form already.
ksparse.visible = (text) => String(text).replace(UNSEEN,
  (char) => `⟨U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

// A stretch of text as a heat map: tokens, a latent's value on each (0: not active), and its
// largest value. Neighbours on which it is not active are one text node. A token at one of the
// `borders` is drawn as the end of a document.
ksparse.text = function text(
  tokens, values, largest, peak = -1, format = ksparse.number, borders = [],
) {
  const parts = [];
  let quiet = "";
  const flush = () => {
    if (quiet) parts.push(quiet);
    quiet = "";
  };
  tokens.forEach((token, i) => {
    const value = values[i] ?? 0;
    if (borders.includes(i) && i !== peak) {
      flush();
      parts.push(ksparse.el("span", { class: "border", title: `document border: ${token}` }, "¶"));
      return;
    }
    if (value > 0 || i === peak) {
      flush();
      const heat = largest > 0 ? Math.min(1, Math.max(0, value / largest)).toFixed(2) : 0;
      const attributes = { title: format(value), style: { "--a": heat } };
      parts.push(ksparse.el(i === peak ? "mark" : "b", attributes, token));
    } else if (RIGHT_TO_LEFT.test(token)) {
      flush();
      parts.push(ksparse.el("bdi", {}, token));
    } else {
      quiet += token;
    }
    if (token.endsWith("↵")) {
      flush();
      parts.push(ksparse.el("br", { class: "line" }));
    }
  });
  flush();
  return ksparse.el("p", { class: "text" }, parts);
};

// A token in quotes, and a remark behind it.
ksparse.quoted = (token, remark) =>
  ksparse.el("span", { class: "pair" }, ksparse.el("bdi", {}, `"${token}"`),
    remark == null ? null : ksparse.el("span", { class: "aside" }, remark));

// A link to a latent: its number, its star, and its label or the tokens that it fires on; of the run
// that is shown, or of another that was opened.
ksparse.link = function link(number, gloss, { name, all, explained: by } = ksparse.labels) {
  const { label, star } = ksparse.labels.of(number, all);
  const explained = by[number]?.text, href = ksparse.inRun(`#/latent/${number}`, name);
  const words = label
    ? [ksparse.el("bdi", { class: "own" }, ksparse.visible(label))]
    : explained
      ? [ksparse.el("bdi", { class: "explained", title: "by a model" },
        ksparse.visible(explained))]
      : (gloss ?? []).map(([token, share]) => ksparse.quoted(token, `${Math.round(100 * share)} %`));
  return [
    ksparse.el("a", { class: "to", href }, String(number)),
    star ? ksparse.el("span", { class: "starred", title: "starred" }, "★") : null,
    ksparse.el("span", { class: "gloss" }, words),
  ];
};

// ---- labels and stars

ksparse.labels = {
  all: {},
  explained: {}, // by a model, apart from one's own
  async read(run) {
    const explained = (await ksparse.load("explained", run)).latents;
    const stored = ksparse.live ? {} : this.stored();
    return { explained, all: { ...(await ksparse.load("labels", run)).latents, ...stored } };
  },
  of(number, all = this.all) {
    const entry = all[number];
    const label = typeof entry?.label === "string" ? entry.label : "";
    return { label, star: entry?.star === true };
  },
  saved: Promise.resolve(),
  // Changes are saved one after the other: each starts from what the one before has left.
  set(number, changes) {
    const { all } = this, run = ksparse.name; // another run may be shown by then
    const saving = this.saved.then(() => this.save(number, changes, all, run));
    this.saved = saving.catch(() => {});
    return saving;
  },
  async save(number, changes, all, run) {
    const entry = { ...this.of(number, all), ...changes };
    if (ksparse.live) {
      all[number] = await ksparse.request("label", { latent: number, ...entry }, { run });
    } else {
      all[number] = entry;
      localStorage.setItem(this.key(), JSON.stringify({ ...this.stored(), [number]: entry }));
    }
  },
  key: () => `ksparse ${ksparse.run.name} ${ksparse.run.n} ${location.pathname}`,
  stored() {
    try {
      return JSON.parse(localStorage.getItem(this.key()) ?? "{}");
    } catch {
      return {};
    }
  },
  numbers() {
    return Object.keys(this.all).map(Number)
      .filter((i) => i < ksparse.run.n && this.of(i).label || this.of(i).star)
      .sort((a, b) => a - b);
  },
  download() {
    const latents = Object.fromEntries(this.numbers().map((number) => [number, this.of(number)]));
    const text = JSON.stringify({ format: 1, run: ksparse.run.name, latents }, null, 1);
    const blob = new Blob([text], { type: "application/json" });
    const href = URL.createObjectURL(blob);
    ksparse.el("a", { href, download: "labels.json" }).click();
    setTimeout(() => URL.revokeObjectURL(href), 10_000);
  },
};

// ---- addresses

// "#/run/k32/latents?sort=f1" -> { run: "k32", path: ["latents"], query: URLSearchParams }; the run
// is null where the address does not name it.
ksparse.address = function address() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?", 2);
  const parts = path.split("/").filter(Boolean);
  const run = parts[0] === "run" && parts.length > 1 ? decode(parts[1]) : null;
  return { run, path: run == null ? parts : parts.slice(2), query: new URLSearchParams(query) };
};

function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

ksparse.to = function to(path, query = {}) {
  const entries = Object.entries(query).filter(([, value]) => value !== "" && value != null);
  const text = new URLSearchParams(entries).toString();
  return `#/${path}${text ? `?${text}` : ""}`;
};

// An address of this page as one of a run. It names the run only where there are several.
ksparse.inRun = (href, run = ksparse.name) =>
  ksparse.runs.length > 1 && href.startsWith("#/") && !href.startsWith("#/run/")
    ? `#/run/${encodeURIComponent(run)}/${href.slice(2)}`
    : href;
