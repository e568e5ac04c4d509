// The second view: search, filters, the list, and the panel beside it.
const Browser = (() => {
  const state = { sort: "emergence", descending: false, filter: Filters.empty(), query: "", firing: true, ids: null };
  let table, panel, root, status, searchBox, kindButtons, rangeInputs, sortSelect, filterCount;
  let ready = false;
  let wanted = null;
  let searchNumber = 0;
  let found = null;

  function render(view) {
    root = view;
    const { features } = Store;
    table = Table.create({ onOpen: open, onSort: sortBy, onMove: (feature) => panel.current !== null && follow(feature) });
    panel = FeaturePanel.create({ onClose: close, onStep: step, onSearch: searchFor });
    root.replaceChildren(toolbar(features), el("div", { class: "browser-body" }, table.node, panel.node));
    table.setSort(state.sort, state.descending);
    status.textContent = `unpacking ${Format.count(features.count)} features …`;
  }

  // --- toolbar
  function toolbar(features) {
    searchBox = el("input", {
      type: "search", id: "search", placeholder: "Search a token or a feature number", "aria-label": "Search by token text or feature number",
      autocomplete: "off", spellcheck: "false", title: 'Text in top contexts, or a number. Quotes keep spaces and digits as text: " the", "1863"',
      on: { input: () => { state.query = searchBox.value; soonSearch(); } },
    });
    const scope = el("select", { id: "scope", "aria-label": "Where to search", on: { change: () => { state.firing = scope.value === "firing"; search(); } } },
      el("option", { value: "firing" }, "where it fires"), el("option", { value: "anywhere" }, "anywhere in contexts"));
    kindButtons = features.kindNames.map((name, code) => el("button", {
      type: "button", class: "chip", "aria-pressed": "false", "data-kind": name, disabled: features.kindCounts[code] === 0, on: { click: () => toggleKind(code) },
    }, el("span", { class: "dot", style: { background: Plots.kindColour(name) } }), name, el("span", { class: "muted" }, ` ${Format.count(features.kindCounts[code])}`)));
    sortSelect = el("select", { id: "sort", "aria-label": "Sort by", on: { change: () => { const [key, way] = sortSelect.value.split(" "); setSort(key, way === "down"); } } },
      Table.COLUMNS.filter((column) => !column.fixed).flatMap(({ key, label }) => [
        el("option", { value: `${key} up` }, `${label} ↑`), el("option", { value: `${key} down` }, `${label} ↓`)]));
    sortSelect.value = "emergence up";
    status = el("p", { class: "status", role: "status", id: "status" });
    filterCount = el("span", { class: "filter-count" });
    const ranges = rangePanel();
    const rangesButton = el("button", {
      type: "button", class: "chip", id: "ranges-button", "aria-expanded": "false", "aria-controls": "ranges",
      on: { click: () => { ranges.hidden = !ranges.hidden; rangesButton.setAttribute("aria-expanded", String(!ranges.hidden)); } },
    }, "Ranges", filterCount);
    return el("div", { class: "toolbar" },
      el("div", { class: "toolbar-row" }, el("div", { class: "search-box" }, searchBox, el("kbd", { "aria-hidden": "true" }, "/")), scope),
      el("div", { class: "toolbar-row" }, el("div", { class: "chip-row", role: "group", "aria-label": "Kinds" }, kindButtons), rangesButton, sortSelect, el("span", { class: "spacer" }), status,
        el("button", { type: "button", class: "quiet", id: "reset", on: { click: reset } }, "reset")),
      ranges);
  }

  function rangePanel() {
    rangeInputs = {};
    const fields = Object.entries(Filters.QUANTITIES).map(([name, { label, unit }]) => {
      const make = (end) => el("input", { type: "number", step: "any", inputmode: "decimal", placeholder: end, "aria-label": `${label}, ${end}`, id: `range-${name}-${end}`, on: { input: readRanges } });
      rangeInputs[name] = [make("min"), make("max")];
      return el("fieldset", {}, el("legend", {}, label, unit ? el("span", { class: "muted" }, ` ${unit}`) : null), rangeInputs[name][0], el("span", { class: "muted" }, "to"), rangeInputs[name][1]);
    });
    return el("div", { class: "ranges", id: "ranges", hidden: true }, fields);
  }
  function readRanges() {
    const ranges = {};
    for (const [name, inputs] of Object.entries(rangeInputs)) {
      const [low, high] = inputs.map((input) => (input.value === "" || Number.isNaN(input.valueAsNumber) ? null : input.valueAsNumber));
      if (low !== null || high !== null) ranges[name] = [low, high];
    }
    state.filter.ranges = ranges;
    update();
  }
  function writeControls() {
    for (const [name, inputs] of Object.entries(rangeInputs)) {
      inputs.forEach((input, end) => (input.value = state.filter.ranges[name]?.[end] ?? ""));
    }
    kindButtons.forEach((button, code) => button.setAttribute("aria-pressed", String(state.filter.kinds?.has(code) ?? false)));
    searchBox.value = state.query;
  }
  function toggleKind(code) {
    const kinds = new Set(state.filter.kinds ?? []);
    if (kinds.has(code)) kinds.delete(code);
    else kinds.add(code);
    state.filter.kinds = kinds.size ? kinds : null;
    writeControls();
    update();
  }
  function reset() {
    state.filter = Filters.empty();
    state.query = "";
    writeControls();
    search();
  }
  // From a figure: list the features of one of its bars.
  function showOnly(ranges) {
    state.filter = { kinds: null, ranges };
    state.query = "";
    found = null;
    writeControls();
    go("features");
    search();
  }
  function searchFor(text) {
    state.query = `"${text}"`;
    writeControls();
    search();
  }

  // --- sorting
  function sortBy(key) {
    setSort(key, state.sort === key ? !state.descending : ["maxNorm", "rate", "lifetime"].includes(key));
  }
  function setSort(key, descending) {
    Object.assign(state, { sort: key, descending });
    table.setSort(key, descending);
    sortSelect.value = `${key} ${descending ? "down" : "up"}`;
    update();
  }

  // --- searching
  let timer = null;
  function soonSearch() {
    clearTimeout(timer);
    timer = setTimeout(search, 120);
  }
  async function search() {
    clearTimeout(timer);
    const number = ++searchNumber;
    const parsed = Search.parse(state.query);
    if (!ready) return;
    if (parsed.type === "none") found = null;
    else if (parsed.type === "id") found = idsLike(parsed.digits);
    else {
      status.textContent = "searching …";
      const result = await Search.featuresWithText(parsed.text, state.firing, () => number === searchNumber);
      if (result === null) return;
      found = result;
    }
    update();
  }
  function idsLike(digits) {
    const marks = new Uint8Array(Store.features.count);
    for (let f = 0; f < marks.length; f++) if (String(f).startsWith(digits)) marks[f] = 1;
    return marks;
  }

  function update() {
    if (!ready) return;
    const { features } = Store;
    const ids = Filters.sort(Filters.apply(state.filter, features, found), state.sort, state.descending, features);
    const parsed = Search.parse(state.query);
    if (parsed.type === "id") putFirst(ids, Number(parsed.digits));
    const active = Object.keys(state.filter.ranges).length;
    filterCount.textContent = active ? ` ${active}` : "";
    const narrowed = ids.length < features.count;
    byId("reset").hidden = !narrowed && !state.query;
    status.textContent = narrowed ? `${Format.count(ids.length)} of ${Format.count(features.count)} features` : `${Format.count(features.count)} features`;
    table.show(ids, nothingFound(parsed));
  }
  // The feature whose number was typed in full comes before those that only begin with it.
  function putFirst(ids, feature) {
    const position = ids.indexOf(feature);
    if (position > 0) {
      ids.copyWithin(1, 0, position);
      ids[0] = feature;
    }
  }
  function nothingFound(parsed) {
    if (parsed.type === "text" && !Store.contexts) return "This page holds no contexts, so features cannot be found by text.";
    if (parsed.type === "text" && state.firing) return "No feature fires on that in its top contexts. Try “anywhere in contexts”.";
    return "No feature passes these filters.";
  }

  // --- opening
  function open(feature, byKeyboard) {
    go(`feature=${feature}`);
    if (byKeyboard && isOverlay()) panel.node.focus();
  }
  const isOverlay = () => matchMedia("(max-width: 1000px)").matches;
  // Moving through the list with the panel open is one visit: the address follows without new history.
  function follow(feature) {
    history.replaceState(null, "", `#feature=${feature}`);
    showFeature(feature);
  }
  function step(offset) {
    const next = table.neighbour(panel.current, offset);
    if (next !== undefined) follow(next);
    else table.moveBy(offset);
  }
  function close() {
    go("features");
    table.grid.focus();
  }

  function showFeature(feature) {
    wanted = feature;
    if (!ready) return;
    root.classList.toggle("with-panel", feature !== null);
    if (feature === null) {
      panel.hide();
      table.setOpened(null);
    } else if (feature < Store.features.count) {
      panel.show(feature);
      table.setOpened(feature);
      if (isOverlay()) panel.node.focus();
    } else {
      root.classList.remove("with-panel");
      panel.hide();
      status.textContent = `there is no feature ${feature}: they go from 0 to ${Format.count(Store.features.count - 1)}`;
    }
  }

  return {
    render, showFeature, showOnly, close,
    isOpen: () => panel?.current !== null && panel?.current !== undefined,
    focusSearch() {
      searchBox.focus();
      searchBox.select();
    },
    clearSearch() {
      state.query = "";
      searchBox.value = "";
      search();
    },
    focusList: () => table.grid.focus({ preventScroll: true }),
    moveBy: (rows) => table.moveBy(rows),
    openCursor: () => table.openCursor(),
    async start() {
      ready = true;
      await search();
      if (wanted !== null) showFeature(wanted);
      root.dataset.ready = "true";
      await Store.loadParts(() => table.refresh());
    },
    fail(message) {
      status.textContent = message;
      status.classList.add("failed");
    },
  };
})();
