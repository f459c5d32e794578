"use strict";
// From the address to a view; keys; search; a random latent.

(async function main() {
  const { el } = ksparse;
  let turn = 0;

  ksparse.say = function say(message) {
    document.querySelector(".said-aloud")?.remove();
    const close = el("button", {
      type: "button", "aria-label": "Close", on: { click: () => alert.remove() } }, "×");
    const alert = el("p", { class: "said-aloud", role: "alert" }, message, close);
    document.body.append(alert);
  };

  async function show() {
    const ownTurn = ++turn, current = () => ownTurn === turn;
    const { run, path, query } = ksparse.address();
    const name = path[0] ?? "latents", view = ksparse.views[name];
    ksparse.leave?.();
    ksparse.leave = null;
    try {
      if (!(await ksparse.enter(run, current))) return;
    } catch (error) {
      if (current()) ksparse.show(el("p", { class: "missing", role: "alert" }, error.message));
      return;
    }
    for (const link of document.querySelectorAll("header nav a[data-page]")) {
      if ((link.dataset.page || "latents") === name) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    ksparse.placeSearch(null); // the start page takes it
    if (name === "search") search.value = query.get("q") ?? "";
    try {
      if (view) await view(path.slice(1), query, current);
      else ksparse.show(el("p", { class: "missing" }, "There is no such page. ",
        el("a", { href: "#/" }, "All latents")));
    } catch (error) {
      if (current()) ksparse.show(el("p", { class: "missing", role: "alert" }, error.message));
    }
  }

  async function openRandomLatent() {
    for (let tries = 0; tries < 12; tries++) {
      const number = Math.floor(Math.random() * ksparse.run.n);
      const { values } = await ksparse.latent(number);
      if (values.density !== 0) { // dead latents have nothing to show
        location.hash = `#/latent/${number}`;
        return;
      }
    }
    ksparse.say("Twelve latents drawn at random were all dead.");
  }

  const step = (by) => {
    const { path } = ksparse.address();
    if (path[0] !== "latent") return;
    location.hash = `#/latent/${(Number(path[1]) + by + ksparse.run.n) % ksparse.run.n}`;
  };
  const search = document.getElementById("search"), keys = document.getElementById("keys");
  const actions = {
    "/": () => search.select(),
    j: () => step(1),
    k: () => step(-1),
    r: openRandomLatent,
    s: () => ksparse.star(),
    e: () => document.getElementById("label")?.select(),
    n: () => ksparse.lines(!ksparse.lines()),
    l: () => { location.hash = "#/latents"; },
    m: () => { location.hash = "#/map"; },
    p: () => { location.hash = "#/scatter"; },
    t: () => document.querySelector(".latent-head .button, header nav a[href$='/try']").click(),
    "?": () => keys.showModal(),
  };
  addEventListener("keydown", (event) => {
    const modified = event.ctrlKey || event.metaKey || event.altKey;
    const typing = event.target.closest("input, textarea, select, dialog");
    if (modified || typing || !actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  });
  search.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.preventDefault(); // which would empty the field
    search.blur();
  });
  document.getElementById("search-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const q = search.value;
    const isLatent = /^\s*\d+\s*$/.test(q) && Number(q) < ksparse.run.n;
    location.hash = isLatent ? `#/latent/${Number(q)}` : ksparse.to("search", { q });
    search.blur();
  });
  document.getElementById("surprise").addEventListener("click", openRandomLatent);
  document.getElementById("help").addEventListener("click", () => keys.showModal());
  document.getElementById("skip").addEventListener("click", (event) => {
    event.preventDefault(); // the hash is the address
    document.getElementById("main").focus();
  });

  try {
    await ksparse.openRuns();
  } catch (error) {
    ksparse.show(el("p", { class: "missing", role: "alert" }, error.message));
    return;
  }
  ksparse.suggest(search);
  search.placeholder = ksparse.live
    ? "Number, token, task, label, or any text"
    : "Number, token, task or label";
  addEventListener("hashchange", async () => {
    await show();
    scrollTo(0, 0);
  });
  await show();
})();
