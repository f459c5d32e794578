"use strict";
// The start page: what this is, one search field with searches that find something, latents worth
// a look. The table comes below (table.js).

ksparse.start = function start() {
  const { el, run } = ksparse;
  const place = el("div", { class: "place" });
  ksparse.placeSearch(place);
  return [
    el("div", { class: "hero" },
      el("h1", {}, run.name),
      el("p", { class: "summary" }, run.summary, " Each latent fires on some texts; its page " +
        "shows on which, and what it does to the LM’s predictions."),
      ksparse.notEvaluated(),
      place, queries()),
    run.worth.length ? worth() : null,
  ];

  function queries() {
    const own = ksparse.labels.numbers().map((number) => ksparse.labels.of(number).label)
      .filter((label) => label && label.length <= 40);
    const found = [...new Set([...own.slice(0, 1), ...run.queries])].slice(0, 3);
    if (!found.length) return null;
    return el("p", { class: "queries" }, "For example: ", found.map((q, i) => [
      i ? " · " : null,
      el("a", { href: ksparse.to("search", { q }) }, el("bdi", {}, ksparse.visible(q)))]));
  }

  function worth() {
    return el("section", { class: "worth", "aria-labelledby": "worth-title" },
      el("h2", { id: "worth-title" }, "Latents worth a look"),
      el("div", { class: "worth-lists" }, run.worth.map((list) => el("section", {},
        el("h3", {}, list.title),
        el("p", { class: "note" }, list.reading),
        el("ol", {}, list.latents.map(latent)),
        list.sort
          ? el("p", {}, el("a", { href: ksparse.to("latents", { sort: list.sort }) },
            "All latents in this order"))
          : null))));
  }

  function latent({ latent: number, said, gloss, raises, example }) {
    return el("li", {}, el("p", { class: "head" }, ksparse.link(number).slice(0, 2),
      el("span", { class: "said" }, said)),
      el("p", { class: "told" }, ksparse.words(number, raises, gloss, "raises ")),
      example ? ksparse.snippet(example) : null);
  }
};

// The one search field is in the bar; the start page takes it into its middle.
ksparse.placeSearch = function placeSearch(place) {
  const form = document.getElementById("search-form");
  if (place) place.append(form);
  else (document.getElementById("run") ?? document.getElementById("brand")).after(form);
};
