// The list of features: only the rows in view exist in the document. Follows the ARIA grid pattern, one tab stop.
const Table = (() => {
  const ROW = 36;
  const SPARE = 6;
  const COLUMNS = [
    { key: "id", label: "Feature", title: "Number of the feature" },
    { key: "norm", label: "Norm by step", title: "Decoder norm against training step, relative to the feature's maximum", fixed: true },
    { key: "kind", label: "Kind", title: "Initialization: present at the first snapshot. Emergent: appears later" },
    { key: "emergence", label: "Emerges", title: "Training step of emergence" },
    { key: "peak", label: "Peaks", title: "Training step of the largest norm" },
    { key: "lifetime", label: "Lives", title: "Share of snapshots at which the feature is present" },
    { key: "maxNorm", label: "Max norm", title: "Largest decoder norm over the snapshots" },
    { key: "rate", label: "Fires on", title: "Share of tokens on which the feature is active, at the snapshot where that is largest" },
    { key: "token", label: "Top token", title: "Token of the strongest activation" },
    { key: "context", label: "Strongest context", title: "The text around the strongest activation", fixed: true },
  ];

  function create({ onOpen, onSort, onMove }) {
    let ids = new Uint32Array(0);
    let cursor = 0;
    let opened = null;
    const pool = [];
    const headers = COLUMNS.map((column) => header(column, onSort));
    const head = el("div", { class: "row head", role: "row", "aria-rowindex": 1 }, headers.map(({ node }) => node));
    const body = el("div", { class: "rows", role: "rowgroup" });
    const scroller = el("div", { class: "scroller" }, el("div", { class: "head-group", role: "rowgroup" }, head), body);
    const grid = el("div", {
      class: "grid-table", role: "grid", tabindex: 0, id: "grid", "aria-label": "Features", "aria-colcount": COLUMNS.length, "aria-readonly": "true",
    }, scroller);
    const nothing = el("p", { class: "nothing", hidden: true });
    const node = el("div", { class: "table" }, grid, nothing);

    function makeRow() {
      const spark = Sparkline.create();
      const cells = Object.fromEntries(COLUMNS.map(({ key }) => [key, el("div", { role: "gridcell", class: `cell-${key}` })]));
      const dot = el("span", { class: "dot" });
      const kind = el("span", { class: "kind-name" });
      const token = el("span", { class: "token-chip" });
      cells.norm.append(spark);
      cells.kind.append(dot, kind);
      cells.token.append(token);
      const [before, peak, after] = [el("span", { class: "before" }), el("mark"), el("span", { class: "after" })];
      cells.context.append(before, peak, after);
      const row = el("div", { class: "row", role: "row" }, Object.values(cells));
      const state = { row, position: -1 };
      row.addEventListener("click", () => {
        moveTo(state.position);
        onOpen(ids[state.position], false);
      });
      state.update = (position, force) => {
        const feature = ids[position];
        if (state.position !== position || state.feature !== feature || force) {
          state.position = position;
          state.feature = feature;
          const { features } = Store;
          row.style.setProperty("transform", `translateY(${position * ROW}px)`);
          row.id = `row-${position}`;
          row.setAttribute("aria-rowindex", position + 2);
          row.dataset.feature = feature;
          spark.update(feature);
          const kindName = features.kindNames[features.kind[feature]];
          dot.style.setProperty("background", Plots.kindColour(kindName));
          kind.textContent = kindName;
          cells.id.textContent = feature;
          cells.emergence.textContent = features.emergence[feature] < 0 ? "–" : Format.count(Store.steps[features.emergence[feature]]);
          cells.peak.textContent = Format.count(Store.steps[features.peak[feature]]);
          cells.lifetime.textContent = `${Math.round(100 * features.lifetime[feature])} %`;
          cells.maxNorm.textContent = Format.number(features.maxNorm[feature]);
          cells.rate.textContent = Format.percent(features.rate[feature]);
          const top = Store.topToken(feature);
          token.textContent = top === null ? "" : Format.alone(top);
          token.hidden = top === null;
          const snippet = Store.snippet(feature);
          // the left part is cut at its beginning (see browser.css), so the marked token stays in view
          before.textContent = snippet ? Format.visible(snippet.before) : "";
          peak.textContent = snippet ? Format.visible(snippet.token) : "";
          after.textContent = snippet ? Format.visible(snippet.after) : "";
        }
        row.classList.toggle("cursor", position === cursor);
        row.classList.toggle("opened", feature === opened);
        row.setAttribute("aria-selected", String(feature === opened));
      };
      return state;
    }

    const headHeight = () => head.offsetHeight;
    // The pool grows to what fits in view and stays bounded by that.
    function draw(force = false) {
      const height = scroller.clientHeight;
      if (height === 0) return;
      const first = Math.max(0, Math.floor(scroller.scrollTop / ROW) - SPARE);
      const last = Math.min(ids.length, Math.ceil((scroller.scrollTop + height) / ROW) + SPARE);
      while (pool.length < last - first) {
        const state = makeRow();
        pool.push(state);
        body.append(state.row);
      }
      // position p always uses row p modulo pool size, so that scrolling rewrites only rows that come into view
      pool.forEach((state) => (state.used = false));
      for (let position = first; position < last; position++) {
        const state = pool[position % pool.length];
        state.used = true;
        state.row.hidden = false;
        state.update(position, force);
      }
      for (const state of pool) if (!state.used) {
        state.row.hidden = true;
        state.row.removeAttribute("id");
        state.position = -1;
      }
      const active = ids.length && byId(`row-${cursor}`);
      if (active) grid.setAttribute("aria-activedescendant", `row-${cursor}`);
      else grid.removeAttribute("aria-activedescendant");
    }

    let queued = false;
    scroller.addEventListener("scroll", () => {
      if (queued) return;
      queued = true;
      requestAnimationFrame(() => {
        queued = false;
        draw();
      });
    }, { passive: true });
    new ResizeObserver(() => draw()).observe(scroller);
    Axis.onChange(() => draw(true));

    function reveal(position) {
      const [top, bottom] = [position * ROW, (position + 1) * ROW];
      const view = scroller.clientHeight - headHeight();
      if (top < scroller.scrollTop) scroller.scrollTop = top;
      else if (bottom > scroller.scrollTop + view) scroller.scrollTop = bottom - view;
    }
    const isInView = (position) => position * ROW >= scroller.scrollTop && (position + 1) * ROW <= scroller.scrollTop + scroller.clientHeight - headHeight();
    function moveTo(position, centred = false) {
      if (!ids.length) return;
      cursor = Math.max(0, Math.min(ids.length - 1, position));
      if (centred && !isInView(cursor)) scroller.scrollTop = (cursor + 0.5) * ROW - (scroller.clientHeight - headHeight()) / 2;
      reveal(cursor);
      draw();
    }
    function moveBy(rows) {
      const before = cursor;
      moveTo(cursor + rows);
      if (cursor !== before) onMove(ids[cursor]);
    }
    const page = () => Math.max(1, Math.floor((scroller.clientHeight - headHeight()) / ROW) - 1);
    grid.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target !== grid) return;
      const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page(), PageUp: -page(), Home: -Infinity, End: Infinity };
      if (event.key in moves) moveBy(moves[event.key] === Infinity ? ids.length : moves[event.key] === -Infinity ? -ids.length : moves[event.key]);
      else if (event.key === "Enter" && ids.length) onOpen(ids[cursor], true);
      else return;
      event.preventDefault();
    });

    return {
      node, grid, moveBy,
      openCursor: () => ids.length && onOpen(ids[cursor], true),
      show(next, message) {
        ids = next;
        cursor = Math.max(0, opened === null ? 0 : ids.indexOf(opened));
        body.style.setProperty("height", `${ids.length * ROW}px`);
        grid.setAttribute("aria-rowcount", ids.length + 1);
        nothing.hidden = ids.length > 0;
        nothing.textContent = message;
        scroller.scrollTop = 0;
        for (const state of pool) state.position = -1;
        if (ids.length) reveal(cursor);
        draw(true);
      },
      refresh: () => draw(true),
      setOpened(feature) {
        opened = feature;
        const position = feature === null ? -1 : ids.indexOf(feature);
        if (position >= 0) moveTo(position, true);
        else draw();
      },
      setSort(key, descending) {
        for (const { column, node: cell } of headers) {
          if (column.fixed) continue;
          cell.setAttribute("aria-sort", column.key === key ? (descending ? "descending" : "ascending") : "none");
        }
      },
      neighbour: (feature, offset) => {
        const position = ids.indexOf(feature);
        return position < 0 ? undefined : ids[position + offset];
      },
    };
  }

  function header(column, onSort) {
    const content = column.fixed ? el("span", {}, column.label) : el("button", { type: "button", "data-sort": column.key, on: { click: () => onSort(column.key) } }, column.label, el("span", { class: "arrow", "aria-hidden": "true" }));
    return { column, node: el("div", { role: "columnheader", class: `cell-${column.key}`, title: column.title }, content) };
  }
  return { create, COLUMNS };
})();
