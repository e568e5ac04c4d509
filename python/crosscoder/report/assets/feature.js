// The panel of one feature.
const FeaturePanel = (() => {
  function create({ onClose, onStep, onSearch }) {
    const node = el("aside", { class: "panel-feature", id: "panel", tabindex: -1, hidden: true });
    let current = null;
    ContextView.watch(node);

    async function show(feature) {
      current = feature;
      const { features } = Store;
      const kind = features.kindNames[features.kind[feature]];
      const contextList = el("div", { class: "contexts" }, el("p", { class: "muted" }, "…"));
      Plots.forget(node);
      node.setAttribute("aria-label", `Feature ${feature}`);
      node.hidden = false;
      node.replaceChildren(head(feature, kind), facts(feature), curves(feature, kind), contextList, neighbours(feature));
      node.scrollTop = 0;
      const contexts = await Store.contextsOf(feature);
      if (current === feature) showContexts(contextList, contexts);
    }

    function head(feature, kind) {
      const status = el("span", { class: "copied", role: "status" });
      return el("header", { class: "panel-head" },
        el("h2", {}, "Feature ", el("span", { class: "number" }, feature)),
        el("span", { class: "kind" }, el("span", { class: "dot", style: { background: Plots.kindColour(kind) } }), kind),
        el("span", { class: "spacer" }), status,
        el("button", { type: "button", class: "quiet", id: "copy-link", on: { click: () => copyLink(feature, status) } }, "copy link"),
        el("button", { type: "button", class: "icon", "aria-label": "Previous in the list", title: "Previous (k)", on: { click: () => onStep(-1) } }, "↑"),
        el("button", { type: "button", class: "icon", "aria-label": "Next in the list", title: "Next (j)", on: { click: () => onStep(1) } }, "↓"),
        el("button", { type: "button", class: "icon", id: "close-panel", "aria-label": "Close", title: "Close (Esc)", on: { click: onClose } }, "×"));
    }

    function facts(feature) {
      const { features } = Store;
      const step = (snapshot) => (snapshot < 0 ? "–" : `step ${Format.count(Store.steps[snapshot])}`);
      const entries = [
        ["emerges", step(features.emergence[feature])], ["peaks", step(features.peak[feature])],
        ["lives", `${Math.round(100 * features.lifetime[feature])} % of snapshots`], ["max norm", Format.number(features.maxNorm[feature])],
        ["max activation", Format.number(features.maxActivation[feature])], ["fires on", `${Format.percent(features.rate[feature])} of tokens`],
      ];
      return el("dl", { class: "panel-facts" }, entries.map(([label, value]) => el("div", {}, el("dt", {}, label), el("dd", {}, value))));
    }

    function curves(feature, kind) {
      const [norm, rate] = [el("div", { class: "plot" }), el("div", { class: "plot" })];
      Plots.keepDrawn(norm, ({ width }) => normCurve(feature, kind, width));
      Plots.keepDrawn(rate, ({ width }) => rateCurve(feature, kind, width));
      return el("div", { class: "panel-curves" },
        el("section", {}, el("h3", {}, "Decoder norm", el("span", { class: "muted" }, " of its maximum")), norm),
        el("section", {}, el("h3", {}, "Firing rate", el("span", { class: "muted" }, " of tokens")), rate));
    }

    function showContexts(root, contexts) {
      if (!contexts.length) {
        root.replaceChildren(el("h3", {}, "Top contexts"), el("p", { class: "muted" }, "This page holds no contexts for this feature."));
        return;
      }
      root.replaceChildren(
        el("h3", {}, "Fires most on"),
        el("div", { class: "chips" }, ContextView.mainTokens(contexts).map(({ text, share }) =>
          el("button", { type: "button", class: "token-chip", title: "Search for this token", on: { click: () => onSearch(text) } },
            Format.alone(text), el("span", { class: "muted" }, ` ${Math.round(100 * share)} %`)))),
        el("h3", {}, `Top ${contexts.length === 1 ? "context" : `${contexts.length} contexts`}`, el("span", { class: "shade-key", "aria-hidden": "true" }, el("span", {}, "0"), el("span", { class: "shade-bar" }), el("span", {}, "max"))),
        el("ol", { class: "context-list" }, contexts.map(ContextView.one)));
    }

    return {
      node, show,
      hide() {
        current = null;
        Plots.forget(node);
        node.hidden = true;
        node.replaceChildren();
        byId("tooltip").hidden = true;
      },
      get current() {
        return current;
      },
    };
  }

  function snapshots(values) {
    return Store.steps.map((step, snapshot) => ({ step, snapshot, value: values[snapshot] }));
  }

  function curve(rows, colour, width, { y, format, height, marks = [] }) {
    return Plots.linked(Plots.plot({
      width, height, marginTop: 10, marginLeft: 46, x: Axis.scale(Store.steps), y,
      marks: [
        Plot.gridY({ stroke: "var(--grid)", strokeOpacity: 1, ticks: 4 }),
        Axis.marks(Store.steps, width),
        Plot.axisY({ stroke: null, color: "var(--axis)", ticks: 4, tickFormat: y.tickFormat, label: null }),
        Plot.areaY(rows, { x: "step", y: "value", fill: colour, fillOpacity: 0.1 }),
        Plot.line(rows, { x: "step", y: "value", stroke: colour, strokeWidth: 2, strokeLinejoin: "round" }),
        Plot.dot(rows, { x: "step", y: "value", fill: colour, r: 2.5 }),
        ...marks,
        Plot.tip(rows, Plot.pointerX({ x: "step", y: "value", ...Plots.TIP, title: (row) => `${Plots.stepTitle(row)}\n${format(row.value)}` })),
      ],
    }), (step, scale) => scale.apply(step));
  }

  function normCurve(feature, kind, width) {
    const { features } = Store;
    const rows = snapshots(features.norms.row(feature));
    const [born, peak] = [features.emergence[feature], features.peak[feature]];
    const alive = features.maxNorm[feature] > 0;
    const marks = [
      features.threshold === null ? null : Plot.ruleY([features.threshold], { stroke: "var(--muted)", strokeDasharray: "3 3" }),
      alive && born >= 0 ? Plot.dot([rows[born]], { x: "step", y: "value", r: 6, stroke: "var(--ink)", strokeWidth: 1.5 }) : null,
      alive ? Plot.dot([rows[peak]], { x: "step", y: "value", r: 4.5, symbol: "diamond", fill: "var(--ink)" }) : null,
    ];
    const key = el("p", { class: "plot-note" },
      born >= 0 ? [svg("svg", { width: 14, height: 12, "aria-hidden": "true" }, svg("circle", { cx: 7, cy: 6, r: 4.5, class: "key-ring" })), "emerges "] : null,
      svg("svg", { width: 14, height: 12, "aria-hidden": "true" }, svg("path", { d: "M7 1L11 6L7 11L3 6Z", class: "key-diamond" })), "peaks ",
      features.threshold === null ? null : [svg("svg", { width: 18, height: 12, "aria-hidden": "true" }, svg("line", { x1: 1, x2: 17, y1: 6, y2: 6, class: "key-dashes" })), `present above ${Format.number(features.threshold)}`]);
    return [curve(rows, Plots.kindColour(kind), width, { y: { domain: [0, 1] }, height: 190, format: (value) => `${Format.number(value)} of maximum · ${Format.number(value * features.maxNorm[feature])}`, marks }), alive ? key : ""];
  }

  function rateCurve(feature, kind, width) {
    const { rates, rate } = Store.features; // rates are relative to the largest
    const rows = snapshots(rates.row(feature).map((share) => share * rate[feature]));
    const most = Math.max(...rows.map((row) => row.value));
    return curve(rows, Plots.kindColour(kind), width, {
      y: { domain: [0, most > 0 ? most * 1.08 : 1], tickFormat: Format.percent }, height: 150, format: (value) => `active on ${Format.percent(value)} of tokens`,
    });
  }

  function neighbours(feature) {
    const { features } = Store;
    if (!features.neighbours) return "";
    const entries = [];
    for (let index = 0; index < features.neighbours.width; index++) {
      const other = features.neighbours.at(feature, index);
      if (other >= 0) entries.push(neighbour(other, features.neighbourCosines.at(feature, index)));
    }
    return el("section", { class: "neighbours" }, el("h3", {}, "Neighbours", el("span", { class: "muted" }, ` ${features.neighbourNote}`)),
      entries.length ? el("ul", {}, entries) : el("p", { class: "muted" }, "None."));
  }
  function neighbour(other, cosine) {
    const spark = Sparkline.create();
    spark.update(other);
    const top = Store.topToken(other);
    return el("li", {}, el("a", { href: `#feature=${other}` },
      el("span", { class: "number" }, other), spark,
      el("span", { class: "cosine" }, el("span", { class: "cosine-bar", style: { "--share": Math.abs(cosine).toFixed(3) } }), el("span", { class: "cosine-value" }, Format.number(cosine, 2))),
      top === null ? el("span") : el("span", { class: "token-chip" }, Format.alone(top))));
  }

  async function copyLink(feature, status) {
    const url = new URL(location.href);
    url.hash = `feature=${feature}`;
    try {
      await navigator.clipboard.writeText(url.href);
      status.textContent = "copied";
    } catch {
      // no permission: show it, so that it can be copied by hand
      const field = el("input", { readonly: true, "aria-label": "Link", class: "link-field" });
      field.value = url.href;
      status.replaceChildren(field);
      field.select();
    }
  }
  return { create };
})();
