"use strict";
// The columns of the table: which there are, which are shown, and what each means.

// A latent's own label, else its explanation by a model, else the tokens that its decoder row
// raises most (in old results, the tokens that it fires on). `prefix` comes before raised tokens.
ksparse.words = function words(number, raises, gloss, prefix = null) {
  const { el, labels } = ksparse;
  if (labels.of(number).label || labels.explained[number] || !raises?.length) {
    return ksparse.link(number, gloss).slice(2);
  }
  return [el("span", { class: "gloss" },
    prefix ? el("span", { class: "aside" }, prefix) : null,
    raises.map((token) => ksparse.quoted(token)))];
};

// A short example as a heat map, its strongest token marked.
ksparse.snippet = (example, largest) =>
  (example
    ? ksparse.text(example.t, example.a, largest || Math.max(...example.a), example.at,
      ksparse.number, example.borders)
    : ksparse.el("span", { class: "none" }, "–"));

ksparse.columns = {
  STORED: "ksparse columns",
  DEFAULT: ["words", "example", "density", "max_act"],

  // All columns in the order in which they are shown. Those without `kind` hold words.
  all() {
    const { run } = ksparse;
    const numbers = run.columns;
    const place = ({ key }) => {
      const i = ksparse.columns.DEFAULT.indexOf(key);
      return i < 0 ? Infinity : i;
    };
    const text = run.text ?? "the text";
    return [
      {
        key: "words", label: run.has.raises ? "Label or direct logits" : "Label or tokens",
        reading: run.has.raises
          ? "Your label; else a model’s explanation; else the tokens that its decoder row raises " +
            "most"
          : "Your label; else a model’s explanation; else the tokens that it fires on",
      },
      run.has.tokens ? {
        key: "example", label: "Example",
        reading: `Where it is strongest on ${text}; that token is underlined`,
      } : null,
      ...numbers.sort((a, b) => place(a) - place(b)),
      run.has.raises
        ? { key: "raises", label: "Raises", reading: "Tokens that its decoder row raises most" }
        : null,
      run.has.tokens ? {
        key: "fires", label: "Fires on",
        reading: "Tokens that it fires on, and their shares of its activation mass",
      } : null,
    ].filter(Boolean);
  },

  // Columns for axes and colours of maps, which say nothing as numbers.

  chosen() {
    try {
      const stored = JSON.parse(localStorage.getItem(this.STORED));
      if (Array.isArray(stored)) return stored;
    } catch { /* as if there were none */ }
    return this.DEFAULT;
  },

  choose(keys) {
    localStorage.setItem(this.STORED, JSON.stringify(keys));
  },

  // The columns that are shown: the chosen ones, and those by which rows are sorted or filtered.
  shown(used) {
    const keys = [...this.chosen(), ...used];
    return this.all().filter(({ key }) => keys.includes(key));
  },

  // A menu of all columns; `changed` is called after each choice.
  menu(changed) {
    const { el } = ksparse;
    const change = () => {
      this.choose(boxes.map((each) => each.firstChild).filter((input) => input.checked)
        .map((input) => input.name));
      changed();
    };
    const boxes = this.all().map(({ key, label }) => el("label", {},
      el("input", {
        type: "checkbox", name: key, checked: this.chosen().includes(key), on: { change },
      }), ` ${label}`));
    const reset = () => {
      localStorage.removeItem(this.STORED);
      for (const { firstChild: input } of boxes) input.checked = this.DEFAULT.includes(input.name);
      changed();
    };
    return el("details", { id: "columns" }, el("summary", {}, "Columns"),
      el("fieldset", {}, el("legend", { class: "none" }, "Shown, now and next time"), boxes,
        el("button", { type: "button", class: "button small", on: { click: reset } }, "Reset")));
  },

  // What each shown column means: touch screens have no tooltips.
  legend(columns) {
    const { el } = ksparse;
    const signs = columns.some(({ key }) => ["example", "words"].includes(key));
    return el("dl", { class: "legend" },
      columns.map(({ label, reading }) =>
        el("div", {}, el("dt", {}, label), el("dd", {}, `${reading}.`))),
      signs
        ? el("div", {}, el("dt", {}, "Signs"),
          el("dd", {}, "· a space, ↵ a line break, ⇥ a tab, ¶ the border of a document."))
        : null);
  },
};
