// One function for each overview figure: (figure, width) -> nodes. `legendOf` says what its colours mean.
const Figures = (() => {
  const percentTicks = (value) => `${+(100 * value).toFixed(2)} %`;

  const curves = (names, options = {}) => (figure, width) => {
    const present = names.filter((name) => figure.columns[name]);
    return Plots.stepLines({ columns: figure.columns, names: present, width, ...options });
  };

  // Explained variance: the interesting part is near 1; a few bad snapshots must not squeeze the others.
  function explainedVariance(figure, width) {
    const names = ["mean of ratios", "ratio of sums"].filter((name) => figure.columns[name]);
    const values = names.flatMap((name) => figure.columns[name]).filter((value) => value !== null);
    const low = Math.min(...values);
    return Plots.stepLines({
      columns: figure.columns, names, width, format: (value) => (value === null ? "–" : value.toFixed(3)),
      y: { domain: [Math.max(-0.2, low - (1 - low) * 0.15), 1], nice: false, label: "↑ explained variance", labelArrow: false, clamp: true },
    });
  }

  function loss(figure, width) {
    const lines = Object.entries(figure.extra.entropies).sort((a, b) => b[1] - a[1]);
    const values = [...figure.columns.loss.filter((value) => value !== null), ...lines.map(([, value]) => value)];
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const drawing = Plots.stepLines({
      columns: figure.columns, names: ["loss"], width, height: 250, reference: lines.map(([, value]) => ({ value })),
      y: { label: "↑ nats a token", labelArrow: false, domain: [low - 0.08 * (high - low), high + 0.04 * (high - low)] },
      format: (value) => `${Format.number(value)} nats`,
    });
    labelLines(drawing, lines, figure.columns.loss, width);
    return drawing;
  }

  // Names of horizontal lines: at the left where the curve passes above, else at the right; two close lines
  // have theirs above the upper and below the lower.
  function labelLines(drawing, lines, loss, width) {
    const [x, y] = [drawing.scale("x"), drawing.scale("y")];
    const [left, right] = x.range;
    const early = loss.filter((value, snapshot) => value !== null && x.apply(Store.steps[snapshot]) < left + 0.5 * (right - left));
    const places = lines.map(([label, value]) => ({ text: `${label}  ${Format.number(value)}`, y: y.apply(value), atLeft: early.every((other) => other > value + 0.04 * (y.domain[1] - y.domain[0])) }));
    places.forEach((place, index) => {
      const above = places[index - 1];
      const crowded = above && above.atLeft === place.atLeft && place.y - above.y < 17;
      drawing.append(svg("text", {
        class: "line-label", x: place.atLeft ? left + 4 : right, y: crowded ? place.y + 13 : place.y - 5, "text-anchor": place.atLeft ? "start" : "end",
      }, place.text));
    });
  }

  // Norm curves, one panel a kind; the curve nearest to the pointer stands out and opens its feature on click.
  function norms(figure, width) {
    const kinds = Object.keys(figure.extra.counts);
    const across = width >= 640 ? kinds.length : 1;
    const gap = 28;
    const panelWidth = Math.floor((width - gap * (across - 1)) / across);
    const rows = Plots.rows(figure.columns);
    const panels = kinds.map((kind) => {
      const count = figure.extra.counts[kind];
      const drawing = normPanel(rows.filter((row) => row.kind === kind), kind, panelWidth, figure.extra.threshold);
      return el("div", { class: "panel" },
        el("h4", {}, el("span", { class: "dot", style: { background: Plots.kindColour(kind) } }), `${kind} `,
          el("span", { class: "muted" }, `${Format.count(count)} features`)),
        drawing);
    });
    return el("div", { class: "panels", style: { "--across": across } }, panels);
  }

  function normPanel(rows, kind, width, threshold) {
    const colour = Plots.kindColour(kind);
    const examples = rows.filter((row) => row.feature !== null);
    const mean = rows.filter((row) => row.feature === null);
    const drawing = Plots.linked(Plots.plot({
      width, height: 270,
      x: Axis.scale(Store.steps),
      y: { domain: [0, 1], label: "↑ norm / own maximum", labelArrow: false },
      marks: [
        Plot.gridY({ stroke: "var(--grid)", strokeOpacity: 1, ticks: 5 }),
        Axis.marks(Store.steps, width),
        Plot.axisY({ stroke: null, color: "var(--axis)", ticks: 5 }),
        threshold === null ? null : Plot.ruleY([threshold], { stroke: "var(--muted)", strokeDasharray: "3 3" }),
        Plot.line(examples, { x: "step", y: "norm", z: "series", stroke: colour, strokeWidth: 1.1, strokeOpacity: 0.55 }),
        Plot.line(mean, { x: "step", y: "norm", stroke: "var(--surface)", strokeWidth: 6 }),
        Plot.line(mean, { x: "step", y: "norm", stroke: colour, strokeWidth: 3 }),
        Plot.tip(rows, Plot.pointer({
          x: "step", y: "norm", ...Plots.TIP, maxRadius: 30,
          title: (row) => `${row.feature === null ? `mean of ${kind} features` : `feature ${row.feature}`}\n${Plots.stepTitle(row)}\n${Format.number(row.norm)} of maximum`,
        })),
      ],
    }), (step, scale) => scale.apply(step));
    const order = [...new Set(examples.map((row) => row.feature))];
    const lines = drawing.querySelector('[aria-label="line"]'); // the first line mark: one path an example
    lines.classList.add("examples");
    const paths = lines.querySelectorAll("path");
    drawing.addEventListener("input", () => {
      const feature = drawing.value?.feature ?? null;
      paths.forEach((path, index) => path.classList.toggle("lit", feature !== null && order[index] === feature));
      drawing.classList.toggle("clickable", feature !== null);
    });
    drawing.addEventListener("click", () => {
      const feature = drawing.value?.feature ?? null;
      if (feature !== null) go(`feature=${feature}`);
    });
    return drawing;
  }

  // Labels for bands: all where there is room, else evenly thinned.
  function bandTicks(n, width, room) {
    const every = Math.max(1, Math.ceil((n * room) / Math.max(width - 60, 1)));
    return Array.from({ length: n }, (_, index) => index).filter((index) => index % every === 0);
  }
  const snapshotBands = (width) => ({
    type: "band", domain: Store.steps.map((_, index) => index), padding: 0.18, label: "snapshot (training step)",
    ticks: bandTicks(Store.steps.length, width, 30), tickFormat: (index) => Format.compactStep(Store.steps[index]),
  });
  const bandCentre = (_, scale, snapshot) => scale.apply(snapshot) + scale.bandwidth / 2;
  const bandAxes = (x) => [
    Plot.gridY({ stroke: "var(--grid)", strokeOpacity: 1, ticks: 4 }),
    Plot.axisX({ stroke: null, color: "var(--axis)", ticks: x.ticks, tickFormat: x.tickFormat, label: x.label, tickSize: 0 }),
    Plot.axisY({ stroke: null, color: "var(--axis)", ticks: 4, tickFormat: (value) => Format.count(Math.abs(value)) }),
    Plot.ruleY([0], { stroke: "var(--axis)" }),
  ];

  function stacked(figure, width, position, x, titleOf) {
    const kinds = figure.extra.kinds;
    const table = Plots.rows(figure.columns);
    const data = kinds.flatMap((kind) => table.map((row) => ({ at: row[position], kind, count: row[kind] })));
    return Plots.plot({
      width, height: 230, x,
      y: { label: "↑ features", labelArrow: false, nice: true },
      color: { domain: kinds, range: kinds.map(Plots.kindColour) },
      marks: [
        ...bandAxes(x),
        Plot.barY(data, { x: "at", y: "count", fill: "kind", order: kinds, insetTop: 0.5 }),
        Plot.tip(table, Plot.pointerX({
          x: position, y: (row) => kinds.reduce((sum, kind) => sum + row[kind], 0), ...Plots.TIP,
          title: (row) => [titleOf(row), ...kinds.map((kind) => `${kind}  ${Format.count(row[kind])}`)].join("\n"),
        })),
      ],
    });
  }

  function emergence(figure, width) {
    const drawing = Plots.linked(stacked(figure, width, "snapshot", snapshotBands(width), Plots.stepTitle), bandCentre);
    drawing.classList.add("clickable");
    drawing.addEventListener("click", (event) => {
      const snapshot = Plots.nearest(drawing, event);
      Browser.showOnly({ emergence: [Store.steps[snapshot], Store.steps[snapshot]] });
    });
    return drawing;
  }

  function lifetimes(figure, width) {
    const n = figure.extra.n_snapshots;
    const ticks = bandTicks(n + 1, width, 26);
    return stacked(figure, width, "snapshots", {
      type: "band", domain: figure.columns.snapshots, padding: 0.18, label: `snapshots present, of ${n}`, ticks, tickFormat: String,
    }, (row) => `present at ${row.snapshots} of ${n} snapshots`);
  }

  function turnover(figure, width) {
    const table = Plots.rows(figure.columns);
    const x = snapshotBands(width);
    return Plots.linked(Plots.plot({
      width, height: 230, x, y: { label: "↑ features", labelArrow: false, nice: true },
      marks: [
        ...bandAxes(x),
        Plot.barY(table, { x: "snapshot", y: "births", fill: "var(--c3)" }),
        Plot.barY(table, { x: "snapshot", y: (row) => -row.deaths, fill: "var(--c4)" }),
        Plot.tip(table, Plot.pointerX({
          x: "snapshot", y: "births", ...Plots.TIP,
          title: (row) => `${Plots.stepTitle(row)}\nborn  ${Format.count(row.births)}\ndied  ${Format.count(row.deaths)}`,
        })),
      ],
    }), bandCentre);
  }

  const ramp = d3.interpolateViridis;

  function cosines(figure, width) {
    const side = Math.min(width, 540);
    const n = Store.steps.length;
    const margins = { marginTop: 12, marginRight: 12, marginBottom: 40, marginLeft: 52 };
    const ticks = bandTicks(n, side, 30);
    const bands = { type: "band", domain: Store.steps.map((_, index) => index), padding: n > 20 ? 0 : 0.03, round: false };
    const labels = { ticks, tickFormat: (index) => Format.compactStep(Store.steps[index]), tickSize: 0, color: "var(--axis)" };
    const drawing = Plots.plot({
      width: side, height: side - 12, ...margins,
      x: { ...bands, label: "training step" }, y: { ...bands, reverse: true, label: "training step" },
      color: { type: "linear", domain: [0, 1], interpolate: ramp, unknown: "var(--grid)" },
      marks: [
        Plot.axisX({ ...labels, label: "training step" }),
        Plot.axisY({ ...labels, label: "training step", labelAnchor: "center" }),
        Plot.cell(Plots.rows(figure.columns), { x: "other_snapshot", y: "snapshot", fill: "mean", inset: 0 }),
        Plot.tip(Plots.rows(figure.columns), Plot.pointer({
          x: "other_snapshot", y: "snapshot", ...Plots.TIP, title: (row) => cosineText(row, figure.extra.levels),
        })),
      ],
    });
    if (figure.extra.turning) markTurning(drawing, figure.extra.turning);
    return [drawing, rampKey(), turningText(figure.extra.turning)].filter(Boolean);
  }

  function cosineText(row, levels) {
    const lines = [`steps ${Format.count(row.step)} and ${Format.count(row.other_step)}`];
    lines.push(row.mean === null ? "no feature alive at both" : `mean cosine  ${Format.number(row.mean)}`);
    for (const level of levels) if (row[level] !== null) lines.push(`${+(100 * level.slice(1)).toFixed(1)} % quantile  ${Format.number(row[level])}`);
    if (row.null !== undefined && row.null !== null) lines.push(`random directions  ${Format.number(row.null)}`);
    if (row.n_features !== undefined) lines.push(`${Format.count(row.n_features)} features`);
    return lines.join("\n");
  }

  // Where a step that is no snapshot falls on a band axis (between two centres, by log(1 + step)).
  function bandPosition(scale, step) {
    const { steps } = Store;
    const centre = (index) => scale.apply(index) + scale.bandwidth / 2;
    const after = steps.findIndex((other) => other >= step);
    if (after === 0) return centre(0);
    if (after < 0) return centre(steps.length - 1);
    const [low, high] = [Math.log1p(steps[after - 1]), Math.log1p(steps[after])];
    return centre(after - 1) + ((Math.log1p(step) - low) / (high - low)) * (centre(after) - centre(after - 1));
  }

  function markTurning(drawing, turning) {
    const [x, y] = [drawing.scale("x"), drawing.scale("y")];
    const [left, right] = [x.apply(0), x.apply(Store.steps.length - 1) + x.bandwidth];
    const [bottom, top] = [y.apply(0) + y.bandwidth, y.apply(Store.steps.length - 1)];
    const lines = [[turning.step, "turning"], [turning.low, "turning-end"], [turning.high, "turning-end"]].filter(([step]) => step !== null);
    for (const [step, name] of lines) {
      const [px, py] = [bandPosition(x, step), bandPosition(y, step)];
      drawing.append(svg("line", { class: name, x1: px, x2: px, y1: top, y2: bottom }), svg("line", { class: name, x1: left, x2: right, y1: py, y2: py }));
    }
  }

  function turningText(turning) {
    if (!turning) return null;
    const interval = turning.low === null || turning.high === null ? ""
      : ` (${turning.level ? `${+(100 * turning.level).toFixed(1)} % ` : ""}interval ${Format.count(Math.round(turning.low))} to ${Format.count(Math.round(turning.high))})`;
    return el("p", { class: "plot-note" }, svg("svg", { width: 22, height: 8, "aria-hidden": "true" },
      svg("line", { x1: 0, x2: 22, y1: 4, y2: 4, class: "turning-key" })),
    `turning point: step ${Format.count(Math.round(turning.step))}${interval}`);
  }

  function rampKey() {
    const stops = Array.from({ length: 11 }, (_, index) => ramp(index / 10)).join(",");
    return el("div", { class: "ramp", role: "img", "aria-label": "Colours from 0, dark, to 1, bright" },
      el("span", {}, "0"), el("span", { class: "ramp-bar", style: { background: `linear-gradient(to right, ${stops})` } }), el("span", {}, "1"),
      el("span", { class: "muted" }, "mean cosine"));
  }

  const DRAW = {
    norms, emergence, lifetimes, turnover, cosines, loss,
    explained_variance: explainedVariance,
    dimensionality: curves(["rate"], { height: 300, y: { label: "↑ share of D", labelArrow: false, domain: [0, 1], tickFormat: percentTicks, zero: true }, format: Format.percent }),
    kl: curves(["unigram", "bigram", "per prediction"], { y: { label: "↑ nats", labelArrow: false, zero: true }, format: (value) => `${Format.number(value)} nats` }),
    induction: curves(["gap"], { y: { label: "↑ nats", labelArrow: false, zero: true }, format: (value) => `${Format.number(value)} nats` }),
    l0: curves(["l0"], { y: { label: "↑ features a token", labelArrow: false, zero: true }, format: (value) => `${Format.number(value)} features` }),
  };
  const WIDE = new Set(["norms", "ability", "ablation", "carriers"]);
  const kindOf = (figure) => figure.key.split("--")[0]; // a task's figures: kind--task

  function legendOf(figure) {
    const series = (names) => Plots.legend(names.filter((name) => figure.columns[name]).map((name, index) => (
      { label: name, colour: Plots.SERIES[index].colour, dash: Plots.SERIES[index].dash })));
    const boxes = (pairs) => Plots.legend(pairs.map(([label, colour]) => ({ label, colour, box: true })));
    switch (figure.key) {
      case "explained_variance": return series(["mean of ratios", "ratio of sums"]);
      case "kl": return series(["unigram", "bigram", "per prediction"]);
      case "turnover": return boxes([["births", "var(--c3)"], ["deaths", "var(--c4)"]]);
      case "emergence": case "lifetimes": return boxes(figure.extra.kinds.map((kind) => [kind, Plots.kindColour(kind)]));
      default: return null;
    }
  }
  return {
    draw: (figure, width) => (DRAW[kindOf(figure)] ?? Behaviour[kindOf(figure)])(figure, width),
    legendOf, isWide: (figure) => WIDE.has(kindOf(figure)), snapshotBands, bandCentre,
  };
})();
