"use strict";
// Search: a number, a label, a token, a task; and any text, whose latents the server finds with
// the LM.

const MOST_TOKENS = 6, MOST_LATENTS = 24, MOST_TASKS = 8;

ksparse.views.search = async function searchView(path, query, current) {
  const { el, run } = ksparse;
  const q = query.get("q") ?? "", plain = q.trim();
  document.title = `${ksparse.visible(plain.slice(0, 60))} · ${run.name}`;
  const places = Object.fromEntries(["number", "labels", "tokens", "tasks", "text"]
    .map((name) => [name, el("div", { id: `hits-${name}` })]));
  const hint = "Type a number, a token, a task, one of your labels, or any text.";
  ksparse.show(el("h1", {}, "Search"), plain ? null : el("p", { class: "note" }, hint),
    Object.values(places));
  if (!plain) return;

  if (/^\d+$/.test(plain) && Number(plain) < run.n) {
    const number = Number(plain);
    places.number.append(section("Latent", "", list([[number, "", await ksparse.gloss(number)]])));
  }
  const labelled = ksparse.labels.numbers().filter((number) =>
    ksparse.labels.of(number).label.toLowerCase().includes(plain.toLowerCase()));
  if (labelled.length) {
    places.labels.append(section("Labels", "",
      list(labelled.slice(0, MOST_LATENTS).map((number) => [number, ""]))));
  }
  const explained = Object.entries(ksparse.labels.explained).filter(([, { text }]) =>
    text.toLowerCase().includes(plain.toLowerCase()));
  if (explained.length) {
    places.labels.append(section("Explanations", "by a model",
      list(explained.slice(0, MOST_LATENTS).map(([number, { text }]) =>
        [Number(number), ksparse.labels.of(number).label ? text : ""]))));
  }
  await Promise.all([searchTokens(), searchTasks(), searchText()]
    .map((search) => search.catch((error) => ksparse.say(error.message))));
  if (current() && Object.values(places).every((place) => !place.hasChildNodes())) {
    places.text.append(ksparse.live
      ? el("p", { class: "missing" }, `${nothing()}.`)
      : ksparse.box(`${nothing()}. A server can also find the latents that fire on any text:`,
        run.serve));
  } else if (current() && !ksparse.live) {
    places.text.append(el("p", { class: "note" }, "A server can also search by any text: ",
      ksparse.command(run.serve)));
  }

  function nothing() {
    const kinds = ["label", run.has.tokens && "token", run.has.tasks && "probe task"];
    const list = kinds.filter(Boolean).join(" or ");
    return `No ${list} of this run matches “${ksparse.visible(plain)}”`;
  }

  function section(title, aside, ...children) {
    return el("section", { class: "hits" },
      el("h2", {}, title, aside ? el("span", { class: "aside" }, aside) : null), children);
  }

  function list(entries) {
    return el("div", { class: "list" }, entries.map(([number, remark, gloss]) =>
      el("div", { class: "row" }, el("span", { class: "said" }, remark),
        ksparse.link(number, gloss))));
  }

  // Tokens that are the text, then those that begin with it, then those that contain it.
  async function searchTokens() {
    if (!run.has.tokens) return;
    const { numbers, strings } = await ksparse.load("tokens");
    const hits = strings.map((string, i) => {
      const bare = ksparse.bareToken(string);
      return [ksparse.rankToken(bare, plain), bare.length, i];
    }).filter(([rank]) => rank < 4).sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    const entries = await Promise.all(hits.slice(0, MOST_TOKENS).map(async ([, , i]) => {
      const block = await ksparse.load(`tokens/${Math.floor(numbers[i] / run.token_block)}`);
      return [strings[i], block.tokens[numbers[i]]];
    }));
    if (!current() || !entries.length) return;
    const item = ([token, latents]) =>
      el("details", { open: entries.length < 3 || token === entries[0][0] },
        el("summary", {}, el("bdi", { class: "text" }, `"${token}"`),
          el("span", { class: "aside" },
            `${latents.length} latent${latents.length === 1 ? "" : "s"}`)),
        list(latents.slice(0, MOST_LATENTS).map(([number, share, gloss]) =>
          [number, ksparse.percent(share), gloss])));
    places.tokens.append(section("Tokens",
      "latents by the share of their activations that is on the token", entries.map(item)));
  }

  async function searchTasks() {
    if (!run.has.tasks) return;
    const hits = (await ksparse.load("tasks")).tasks
      .filter(({ name }) => name.toLowerCase().includes(plain.toLowerCase()));
    if (!current() || !hits.length) return;
    const words = {
      loss: "loss", channel_loss: "best channel", random_sae_loss: "random latent",
      prior_loss: "base rate",
    };
    const describe = (losses) => Object.entries(words).filter(([key]) => losses[key])
      .map(([key, word]) => `${word} ${losses[key][0].toFixed(3)}`).join(" · ");
    const item = ({ name, best, losses }, i) => el("details", { open: i === 0 },
      el("summary", {}, name, el("span", { class: "aside" }, describe(losses))),
      list(best.map(([number, gloss], place) => [number, `${place + 1}.`, gloss])));
    places.tasks.append(section("Probe tasks",
      "their ten best latents, chosen on the training half",
      hits.slice(0, MOST_TASKS).map(item)));
  }

  // The latents that fire on the text, by how near each comes to its maximum.
  async function searchText() {
    if (!ksparse.live) return;
    if (/^\d+$/.test(plain)) return;
    const waiting = el("p", { class: "note", role: "status" }, "Reading the text with the LM …");
    places.text.append(waiting);
    try {
      const [activations, largest] = await Promise.all(
        [ksparse.request("activations", { text: q }), ksparse.largestValues()]);
      if (!current()) return;
      waiting.replaceWith(await latentsOfText(activations, largest));
    } catch (error) {
      waiting.replaceWith(el("p", { class: "missing", role: "status" }, error.message));
    }
  }

  async function latentsOfText({ tokens, latents }, largest) {
    const values = new Map(); // latent -> its value on each token
    latents.forEach((active, place) => active.forEach(([number, value]) => {
      if (!values.has(number)) values.set(number, new Array(tokens.length).fill(0));
      values.get(number)[place] = value;
    }));
    const most = (number) => Math.max(...values.get(number));
    const share = (number) => (largest?.[number] > 0 ? most(number) / largest[number] : 0);
    const order = [...values.keys()].sort((a, b) => share(b) - share(a) || most(b) - most(a));
    const shown = order.slice(0, MOST_LATENTS);
    const glosses = await Promise.all(shown.map(ksparse.gloss));
    const row = (number, i) => el("div", { class: "row tall" },
      el("span", { class: "said" },
        largest ? ksparse.percent(share(number)) : ksparse.number(most(number))),
      ksparse.link(number, glosses[i]),
      ksparse.text(tokens, values.get(number), Math.max(most(number), largest?.[number] || 0)));
    const first = largest ? `those nearest to their maximum on ${run.text}` : "the largest";
    return section("This text", `${ksparse.count(order.length)} latents fire on it; first ${first}`,
      el("p", {}, el("a", { class: "button", href: ksparse.to("try", { text: q }) },
        "Try it with this text")),
      el("div", { class: "list" }, shown.map(row)));
  }
};
