"use strict";
// From the address to a view; keys; search; surprise.

(async function main() {
  const { el } = ksparse;
  let turn = 0;

  ksparse.say = function say(words) {
    document.querySelector(".said-aloud")?.remove();
    const shown = el("p", { class: "said-aloud", role: "alert" }, words, el("button", { type: "button", "aria-label": "Close", on: { click: () => shown.remove() } }, "×"));
    document.body.append(shown);
  };

  async function show() {
    const own = ++turn, current = () => own === turn;
    const { path, asked } = ksparse.address();
    const view = ksparse.views[path[0] ?? "latents"];
    for (const link of document.querySelectorAll("header nav a[href^='#']")) {
      if ((link.hash.slice(2) || "latents") === (path[0] ?? "latents")) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    if (path[0] === "search") search.value = asked.get("q") ?? "";
    try {
      if (view) await view(path.slice(1), asked, current);
      else ksparse.show(el("p", { class: "missing" }, "There is no such page. ", el("a", { href: "#/" }, "All latents")));
    } catch (error) {
      if (current()) ksparse.show(el("p", { class: "missing", role: "alert" }, error.message));
    }
  }

  async function surprise() {
    for (let tries = 0; tries < 12; tries++) { // a dead one is no surprise
      const number = Math.floor(Math.random() * ksparse.run.n);
      const { values } = await ksparse.latent(number);
      if (values.density !== 0) { location.hash = `#/latent/${number}`; return; }
    }
    ksparse.say("Twelve latents drawn at random were all dead.");
  }

  const step = (by) => {
    const { path } = ksparse.address();
    if (path[0] === "latent") location.hash = `#/latent/${(Number(path[1]) + by + ksparse.run.n) % ksparse.run.n}`;
  };
  const search = document.getElementById("search"), keys = document.getElementById("keys");
  const acts = { "/": () => search.select(), j: () => step(1), k: () => step(-1), r: surprise, s: () => ksparse.star(), e: () => document.getElementById("label")?.select(),
    n: () => ksparse.lines(!ksparse.lines()), l: () => { location.hash = "#/"; }, m: () => { location.hash = "#/map"; }, t: () => document.querySelector(".latent-head .button, header nav a[href='#/try']").click(), "?": () => keys.showModal() };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select, dialog") || !acts[event.key]) return;
    event.preventDefault();
    acts[event.key]();
  });
  search.addEventListener("keydown", (event) => { if (event.key === "Escape") search.blur(); });
  document.getElementById("search-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const q = search.value;
    if (/^\s*\d+\s*$/.test(q) && Number(q) < ksparse.run.n) location.hash = `#/latent/${Number(q)}`;
    else location.hash = ksparse.to("search", { q });
    search.blur();
  });
  document.getElementById("surprise").addEventListener("click", surprise);
  document.getElementById("help").addEventListener("click", () => keys.showModal());
  document.getElementById("skip").addEventListener("click", (event) => { event.preventDefault(); document.getElementById("main").focus(); }); // the hash is the address

  try {
    ksparse.run = await ksparse.load("overview");
    await ksparse.labels.open();
  } catch (error) {
    ksparse.show(el("p", { class: "missing", role: "alert" }, error.message));
    return;
  }
  document.getElementById("brand").textContent = ksparse.run.name;
  document.getElementById("report").hidden = !ksparse.run.has.report;
  if (ksparse.live) document.getElementById("report").search = `?token=${encodeURIComponent(ksparse.token)}`;
  search.placeholder = ksparse.live ? "Number, token, task, label, or any text" : "Number, token, task or label";
  addEventListener("hashchange", async () => {
    await show();
    scrollTo(0, 0);
  });
  await show();
})();
