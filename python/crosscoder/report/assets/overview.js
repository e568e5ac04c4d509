// The first view: what was found, the numbers, the figures, what to keep in mind, the settings.
const Overview = (() => {
  const { overview } = Store;
  const BADGES = {
    paper: ["paper", "The definition is the paper's"],
    ours: ["ours", "The definition is ours: the paper gives none"],
    both: ["paper + ours", "Some definitions are the paper's, some ours: see the caption"],
    standard: ["standard", "A usual measure of the field"],
  };

  function render(root) {
    root.replaceChildren(
      el("header", { class: "hero" }, el("h1", {}, overview.title), overview.subtitle ? el("p", { class: "subtitle" }, overview.subtitle) : null),
      el("div", { class: "lead" },
        overview.sentences.length
          ? el("section", { "aria-labelledby": "findings" }, el("h2", { id: "findings" }, "Findings"),
              el("ol", { class: "findings" }, overview.sentences.map((sentence) => el("li", {}, sentence))))
          : null,
        overview.notes.length
          ? el("section", { class: "notes", "aria-labelledby": "notes" }, el("h2", { id: "notes" }, "Keep in mind"),
              el("ul", {}, overview.notes.map((note) => el("li", {}, note))))
          : null),
      facts(), ...groups(), settings());
  }

  function facts() {
    if (!overview.facts.length) return "";
    // as many columns as leave the fewest holes in the last row
    const n = overview.facts.length;
    const holes = (across) => (across - (n % across)) % across;
    const across = n <= 7 ? n : [7, 6, 5, 4].reduce((best, next) => (holes(next) < holes(best) ? next : best));
    return el("dl", { class: "facts", style: { "--across": across } }, overview.facts.map(([label, value, explanation]) =>
      el("div", {}, el("dt", {}, label), el("dd", { class: "value" }, value), el("dd", { class: "why" }, explanation))));
  }

  function groups() {
    const names = [...new Set(overview.figures.map((figure) => figure.group))];
    return names.map((name, index) => el("section", { class: "group", "aria-labelledby": `group-${index}` },
      el("h2", { id: `group-${index}` }, name), overview.leads[name] ? el("p", { class: "section-lead" }, overview.leads[name]) : null,
      el("div", { class: "grid" }, overview.figures.filter((figure) => figure.group === name).map(card))));
  }

  function card(figure) {
    const plotted = el("div", { class: "plot", id: `plot-${figure.key}`, role: "img", "aria-label": `${figure.title}. The numbers are behind the button “data”.` });
    const [badge, explanation] = BADGES[figure.definition];
    const draw = figure.spec ? Kinds.draw : Controls.ablation;
    let frame = null;
    const tools = el("div", { class: "zoom-tools", hidden: true }, Zoom.buttons(figure.title, () => frame));
    const zoom = el("button", { type: "button", class: "quiet", "aria-label": `Zoom ${figure.title}`, "aria-expanded": "false", on: { click: () => openTools(tools.hidden) } }, "zoom");
    function openTools(open) {
      tools.hidden = !open;
      zoom.setAttribute("aria-expanded", String(open));
    }
    const node = el("figure", { class: `card${figure.wide ? " wide" : ""}`, id: `figure-${figure.key}`, role: "group", "aria-label": figure.title },
      el("header", {},
        el("h3", {}, figure.title), el("span", { class: `badge badge-${figure.definition}`, title: explanation }, badge),
        el("span", { class: "card-tools" }, figure.spec?.kind === "listing" ? null : zoom,
          el("button", { type: "button", class: "quiet", "aria-label": `Numbers of ${figure.title}`, on: { click: () => showData(figure) } }, "data"))),
      tools, Kinds.legendOf(figure), plotted, el("figcaption", {}, figure.caption));
    frame = Plots.keepDrawn(plotted, (shown) => draw(figure, shown), (zoomed) => zoomed && openTools(true));
    return node;
  }

  // --- the numbers behind a figure
  const cell = (value) => (value === null ? "" : String(value));
  const csvCell = (value) => (/[",\n\r]/.test(cell(value)) ? `"${cell(value).replace(/"/g, '""')}"` : cell(value));
  function csv(columns) {
    const names = Object.keys(columns);
    const lines = columns[names[0]].map((_, index) => names.map((name) => csvCell(columns[name][index])).join(","));
    return [names.map(csvCell).join(","), ...lines].join("\n") + "\n";
  }
  function showData(figure) {
    const names = Object.keys(figure.columns);
    const rows = figure.columns[names[0]].map((_, index) => names.map((name) => cell(figure.columns[name][index])));
    const SHOWN = 400;
    const dialog = byId("data-dialog");
    const url = URL.createObjectURL(new Blob([csv(figure.columns)], { type: "text/csv" }));
    dialog.replaceChildren(
      el("header", {}, el("h2", { id: "data-title" }, figure.title),
        el("a", { class: "button", href: url, download: `${figure.key}.csv` }, "Download CSV"),
        el("button", { type: "button", class: "icon", "aria-label": "Close", on: { click: () => dialog.close() } }, "×")),
      el("div", { class: "scroll", tabindex: 0 }, el("table", { class: "numbers" },
        el("thead", {}, el("tr", {}, names.map((name) => el("th", { scope: "col" }, name)))),
        el("tbody", {}, rows.slice(0, SHOWN).map((row) => el("tr", {}, row.map((value) => el("td", {}, value))))))),
      rows.length > SHOWN ? el("p", { class: "muted" }, `The first ${SHOWN} of ${Format.count(rows.length)} rows; the CSV has all.`) : "");
    dialog.addEventListener("close", () => URL.revokeObjectURL(url), { once: true });
    dialog.showModal();
  }

  // --- settings: a nested object as sections of key and value
  function settings() {
    if (!Object.keys(overview.settings).length) return "";
    const isGroup = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
    const sections = [];
    (function walk(value, path) {
      const entries = Object.entries(value);
      const plain = entries.filter(([, item]) => !isGroup(item));
      if (plain.length) sections.push([path, plain]);
      for (const [key, item] of entries) if (isGroup(item)) walk(item, [...path, key]);
    })(overview.settings, []);
    const show = (value) => (value === null ? "none" : Array.isArray(value) ? value.map((item) => (item !== null && typeof item === "object" ? JSON.stringify(item) : String(item))).join(", ") : String(value));
    return el("details", { class: "settings" }, el("summary", {}, el("h2", {}, "Settings")),
      el("div", { class: "settings-grid" }, sections.map(([path, entries]) => el("section", {},
        path.length ? el("h3", {}, path.join(" › ")) : null,
        el("dl", {}, entries.map(([key, value]) => el("div", {}, el("dt", {}, key), el("dd", {}, show(value)))))))));
  }
  return { render };
})();
