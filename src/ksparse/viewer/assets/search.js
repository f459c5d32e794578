"use strict";
// What was typed: a number, a label, a token, a task; and any text, whose latents the server finds through the LM.

const MOST_TOKENS = 6, MOST_LATENTS = 24;

ksparse.views.search = async function searchView(path, asked, current) {
  const { el, run } = ksparse;
  const q = asked.get("q") ?? "", plain = q.trim();
  document.title = `${ksparse.visible(plain.slice(0, 60))} · ${run.name}`;
  const section = (title, why, ...children) => el("section", { class: "hits" }, el("h2", {}, title, why ? el("span", { class: "aside" }, why) : null), children);
  const list = (entries) => el("div", { class: "list" }, entries.map(([number, said, gloss]) => el("div", { class: "row" }, el("span", { class: "said" }, said), ksparse.link(number, gloss))));
  const places = Object.fromEntries(["number", "labels", "tokens", "tasks", "text"].map((name) => [name, el("div", { id: `hits-${name}` })]));
  ksparse.show(el("h1", {}, "Search"), plain ? null : el("p", { class: "note" }, "Type a number, a token, a task, a label of yours, or any text."), Object.values(places));
  if (!plain) return;

  if (/^\d+$/.test(plain) && Number(plain) < run.n) places.number.append(section("Latent", "", list([[Number(plain), "", await ksparse.gloss(Number(plain))]])));
  const mine = ksparse.labels.numbers().filter((number) => ksparse.labels.of(number).label.toLowerCase().includes(plain.toLowerCase()));
  if (mine.length) places.labels.append(section("Labels", "", list(mine.slice(0, MOST_LATENTS).map((number) => [number, ""]))));
  await Promise.all([tokens(), tasks(), text()].map((each) => each.catch((error) => ksparse.say(error.message))));
  if (current() && Object.values(places).every((place) => !place.hasChildNodes())) places.text.append(el("p", { class: "missing" }, "Nothing here has that name."));

  // Tokens that are the text, then those that begin with it, then those that hold it.
  async function tokens() {
    if (!run.has.tokens) return;
    const { numbers, strings } = await ksparse.load("tokens");
    const bare = strings.map((string) => string.replace(/[·↵⇥]/g, " ").trim());
    const rank = (text) => (text === plain ? 0 : text.toLowerCase() === plain.toLowerCase() ? 1 : text.startsWith(plain) ? 2 : text.includes(plain) ? 3 : 4);
    const found = bare.map((text, i) => [rank(text), text.length, i]).filter(([place]) => place < 4).sort((a, b) => a[0] - b[0] || a[1] - b[1]).slice(0, MOST_TOKENS);
    const listed = await Promise.all(found.map(async ([, , i]) => [strings[i], (await ksparse.load(`tokens/${Math.floor(numbers[i] / run.token_block)}`)).tokens[numbers[i]]]));
    if (!current() || !listed.length) return;
    places.tokens.append(section("Tokens", "latents by the share of their activations that is on the token", listed.map(([token, latents]) => el("details", { open: listed.length < 3 || token === listed[0][0] },
      el("summary", {}, el("bdi", { class: "text" }, `"${token}"`), el("span", { class: "aside" }, `${latents.length} latent${latents.length === 1 ? "" : "s"}`)),
      list(latents.slice(0, MOST_LATENTS).map(([number, share, gloss]) => [number, ksparse.percent(share), gloss]))))));
  }

  async function tasks() {
    if (!run.has.tasks) return;
    const found = (await ksparse.load("tasks")).tasks.filter(({ name }) => name.toLowerCase().includes(plain.toLowerCase()));
    if (!current() || !found.length) return;
    const loss = (losses, key, word) => (losses[key] ? `${word} ${losses[key][0].toFixed(3)}` : null);
    places.tasks.append(section("Probe tasks", "their ten best latents, chosen on the training half", found.slice(0, 8).map(({ name, best, losses }, i) => el("details", { open: i === 0 },
      el("summary", {}, name, el("span", { class: "aside" }, [loss(losses, "loss", "loss"), loss(losses, "channel_loss", "best channel"), loss(losses, "random_sae_loss", "random latent"), loss(losses, "prior_loss", "share alone")].filter(Boolean).join(" · "))),
      list(best.map(([number, gloss], place) => [number, `${place + 1}.`, gloss]))))));
  }

  // The latents that fire on the text, by how near they come to their largest value anywhere.
  async function text() {
    if (!ksparse.live) {
      places.text.append(el("p", { class: "note" }, "Which latents fire on a text is known to a server alone: ", el("code", {}, run.serve), "."));
      return;
    }
    if (/^\d+$/.test(plain)) return;
    const waiting = el("p", { class: "note", role: "status" }, "Reading the text with the LM …");
    places.text.append(waiting);
    try {
      const [{ tokens: read, latents }, largest] = await Promise.all([ksparse.ask("activations", { text: q }), run.columns.some(({ key }) => key === "max_act") ? ksparse.column("max_act") : null]);
      if (!current()) return;
      const found = new Map();
      latents.forEach((active, place) => active.forEach(([number, value]) => {
        if (!found.has(number)) found.set(number, new Array(read.length).fill(0));
        found.get(number)[place] = value;
      }));
      const top = (number) => Math.max(...found.get(number));
      const share = (number) => (largest?.[number] > 0 ? top(number) / largest[number] : 0);
      const order = [...found.keys()].sort((a, b) => share(b) - share(a) || top(b) - top(a));
      const glosses = await Promise.all(order.slice(0, MOST_LATENTS).map(ksparse.gloss));
      waiting.replaceWith(section("This text", `${ksparse.count(order.length)} latents fire on it; first those that come nearest to their largest value on held-out text`,
        el("p", {}, el("a", { class: "button", href: ksparse.to("try", { text: q }) }, "Try it with this text")),
        el("div", { class: "list" }, order.slice(0, MOST_LATENTS).map((number, i) => el("div", { class: "row tall" }, el("span", { class: "said" }, largest ? ksparse.percent(share(number)) : ksparse.number(top(number))),
          ksparse.link(number, glosses[i]), ksparse.text(read, found.get(number), Math.max(top(number), largest?.[number] || 0)))))));
    } catch (error) {
      waiting.replaceWith(el("p", { class: "missing", role: "status" }, error.message));
    }
  }
};
