// Figures of tasks: ability, the circuit's heat map, dominance, ablation curves, the features with their contexts.
const Behaviour = (() => {
  const chosen = new Map(); // `${figure.key} ${control}` -> value: a redrawing keeps what was chosen

  // A row of selects above a drawing: draw(values) is called now and after each choice.
  function withControls(figure, definitions, draw) {
    const drawing = el("div", {});
    const value = ({ name, options }) => chosen.get(`${figure.key} ${name}`) ?? options[0][0];
    const redraw = () => {
      const values = Object.fromEntries(definitions.map((definition) => [definition.name, value(definition)]));
      drawing.replaceChildren(...[draw(values)].flat());
    };
    const selects = definitions.map((definition) => {
      const select = el("select", {
        id: `${definition.name}-${figure.key}`,
        on: { change: () => { chosen.set(`${figure.key} ${definition.name}`, definition.options[select.selectedIndex][0]); redraw(); } },
      }, definition.options.map(([option, text]) => el("option", { selected: option === value(definition) }, text)));
      return el("label", {}, el("span", { class: "muted" }, `${definition.label} `), select);
    });
    redraw();
    return el("div", {}, el("div", { class: "controls" }, selects), drawing);
  }

  function panels(width, nodes) {
    const across = width >= 640 ? nodes.length : 1;
    const each = Math.floor((width - 28 * (across - 1)) / across);
    return el("div", { class: "panels", style: { "--across": across } }, nodes.map(([title, draw]) => el("div", { class: "panel" }, el("h4", {}, title), draw(each))));
  }

  function ability(figure, width) {
    const { columns } = figure;
    return panels(width, [
      ["accuracy", (each) => Plots.stepLines({
        columns, names: ["accuracy"], width: each, reference: [{ value: 0.5 }], format: Format.percent,
        y: { domain: [0, 1], nice: false, label: "↑ prompts answered right", labelArrow: false, tickFormat: (value) => `${Math.round(100 * value)} %` },
      })],
      [figure.extra.metric, (each) => el("div", {}, Plots.stepLines({
        columns, names: ["clean", "corrupted"], width: each, y: { label: "↑ mean over prompts", labelArrow: false, zero: true },
      }), Plots.legend(["clean", "corrupted"].map((label, index) => ({ label, colour: Plots.SERIES[index].colour, dash: Plots.SERIES[index].dash }))))],
    ]);
  }

  // --- heat map
  const MEASURES = ["share", "attribution", "RelIE", "relative norm"];
  const signed = (value) => d3.interpolateRdBu(value);

  function circuit(figure, width) {
    return withControls(figure, [{ name: "measure", label: "show", options: MEASURES.map((name) => [name, name]) }], ({ measure }) => {
      const rows = Plots.rows(figure.columns);
      const largest = Math.max(...rows.map((row) => Math.abs(row[measure] ?? 0)), 1e-12);
      const isSigned = measure === "attribution";
      const ramp = isSigned ? signed : d3.interpolateViridis;
      const domain = isSigned ? [-largest, largest] : [0, largest];
      const height = 62 + 15 * figure.extra.features.length;
      const bands = Figures.snapshotBands(width);
      const drawing = Plots.linked(Plots.plot({
        width, height, marginTop: 22, marginLeft: 56, marginBottom: 38,
        x: { ...bands, padding: 0.02 }, y: { type: "band", domain: figure.extra.features, padding: 0.04, label: "feature" },
        color: { type: "linear", domain, interpolate: ramp, unknown: "var(--grid)" },
        marks: [
          Plot.axisX({ stroke: null, color: "var(--axis)", ticks: bands.ticks, tickFormat: bands.tickFormat, label: bands.label, tickSize: 0 }),
          Plot.axisY({ stroke: null, color: "var(--axis)", tickSize: 0, label: "feature, in order of emergence", labelAnchor: "top", tickFormat: String }),
          Plot.cell(rows, { x: "snapshot", y: "feature", fill: (row) => row[measure] ?? NaN }),
          Plot.tip(rows, Plot.pointer({
            x: "snapshot", y: "feature", ...Plots.TIP,
            title: (row) => [`feature ${row.feature}`, Plots.stepTitle(row), ...MEASURES.map((name) => `${name}  ${Format.number(row[name])}`)].join("\n"),
          })),
        ],
      }), Figures.bandCentre);
      drawing.classList.add("clickable");
      drawing.addEventListener("click", () => drawing.value && Store.features && go(`feature=${drawing.value.feature}`));
      const stops = Array.from({ length: 11 }, (_, index) => ramp(index / 10)).join(",");
      return [drawing, el("div", { class: "ramp" }, el("span", {}, Format.number(domain[0], 2)),
        el("span", { class: "ramp-bar", style: { background: `linear-gradient(to right, ${stops})` } }), el("span", {}, Format.number(domain[1], 2)), el("span", { class: "muted" }, measure))];
    });
  }

  // --- dominance
  const BANDS = d3.schemeTableau10;
  const bandColour = (index, series) => (index === series.length - 1 ? "var(--line-strong)" : BANDS[index % BANDS.length]);

  function dominance(figure, width) {
    const { series } = figure.extra;
    const table = Plots.rows(figure.columns).filter((row) => row.dominant >= 0);
    const data = series.flatMap((name) => table.map((row) => ({ step: row.step, snapshot: row.snapshot, name, share: row[name] })));
    const colours = series.map((_, index) => bandColour(index, series));
    const narrow = table.length < 2; // an area needs two snapshots
    const mark = narrow
      ? Plot.rectY(data, { x1: (row) => row.step * 0.97, x2: (row) => row.step * 1.03 + 1, y: "share", fill: "name", order: series })
      : Plot.areaY(data, { x: "step", y: "share", fill: "name", order: series, stroke: "var(--surface)", strokeWidth: 0.5 });
    const drawing = Plots.linked(Plots.plot({
      width, height: 300, x: Axis.scale(Store.steps), y: { domain: [0, 1], label: "↑ share of positive attribution", labelArrow: false },
      color: { domain: series, range: colours },
      marks: [
        Axis.marks(Store.steps, width),
        Plot.axisY({ stroke: null, color: "var(--axis)", ticks: 5, tickFormat: (value) => `${Math.round(100 * value)} %` }),
        mark,
        Plot.tip(table, Plot.pointerX({
          x: "step", y: () => 1, ...Plots.TIP,
          title: (row) => [Plots.stepTitle(row), `largest: feature ${row.dominant}`, ...series.map((name) => `${name}  ${Format.percent(row[name])}`)].join("\n"),
        })),
      ],
    }), (step, scale) => scale.apply(step));
    return [drawing, Plots.legend(series.map((label, index) => ({ label, colour: colours[index], box: true })))];
  }

  // --- ablation
  const SETS = [["top", "top k", 0], ["random", "k random, matched", 1], ["active", "random, as active as the top k", 2]];
  const MODES = { disrupt: ["drop", "disrupt: ablate the top k"], restore: ["faithfulness", "restore: keep the top k alone"] };

  function ablation(figure, width) {
    const rows = Plots.rows(figure.columns);
    const snapshots = [...new Set(rows.map((row) => row.snapshot))].reverse();
    const sizes = [...new Set(rows.map((row) => row.k))].sort((a, b) => a - b);
    const usual = sizes.includes(50) ? 50 : sizes.at(-1);
    const definitions = [
      { name: "mode", label: "", options: Object.entries(MODES).map(([name, [, text]]) => [name, text]) },
      { name: "kind", label: "ablated features become", options: [...new Set(rows.map((row) => row.ablation))].map((name) => [name, KINDS[name] ?? name]) },
      { name: "snapshot", label: "left: step", options: snapshots.map((index) => [index, Format.count(Store.steps[index])]) },
      { name: "k", label: "right: k", options: [usual, ...sizes.filter((k) => k !== usual)].map((k) => [k, Format.count(k)]) },
    ];
    return withControls(figure, definitions, ({ mode, kind, snapshot, k }) => {
      const [measure] = MODES[mode];
      const known = rows.filter((row) => row.ablation === kind && row[measure] !== null);
      const shown = SETS.filter(([name]) => known.some((row) => row.set === name));
      const ends = (end) => known.map((row) => row[`${measure}_${end}`]);
      const y = { domain: [Math.min(0, ...ends("low")), Math.max(1, ...ends("high"))], nice: true };
      return [
        Plots.legend(shown.map(([, label, index]) => ({ label, colour: Plots.SERIES[index].colour, dash: Plots.SERIES[index].dash }))),
        panels(width, [
          [`at step ${Format.count(Store.steps[snapshot])}, by number of features`, (each) => lines(known.filter((row) => row.snapshot === snapshot), "k", measure, shown, each, y)],
          [`of ${Format.count(k)} features, by step`, (each) => lines(known.filter((row) => row.k === k), "step", measure, shown, each, y)],
        ]),
      ];
    });
  }
  const KINDS = { mean: "their mean", zero: "0", resample: "what they are on the corrupted prompt" };

  function lines(data, x, measure, sets, width, y) {
    const style = (name) => Plots.SERIES[SETS.find(([set]) => set === name)[2]];
    const bySteps = x === "step";
    const sizes = [...new Set(data.map((row) => row.k))];
    const scale = bySteps ? Axis.scale(Store.steps) : { type: "log", domain: [1, Math.max(2, ...sizes)] };
    const places = [...new Set(data.map((row) => row[x]))].sort((a, b) => a - b)
      .map((at) => ({ at, rows: data.filter((row) => row[x] === at) }));
    const drawing = Plots.plot({
      width, height: 260, marginLeft: 50, x: scale, y: { ...y, label: `↑ ${measure}`, labelArrow: false },
      marks: [
        Plot.gridY({ stroke: "var(--grid)", strokeOpacity: 1, ticks: 5 }),
        bySteps ? Axis.marks(Store.steps, width) : Plot.axisX(scale.domain[1] > 3 ? d3.range(0, Math.log10(scale.domain[1])).map((power) => 10 ** power) : [1, 2], {
          tickFormat: Format.count, label: "features (k) →", labelArrow: false, stroke: null, color: "var(--axis)" }),
        Plot.axisY({ stroke: null, color: "var(--axis)", ticks: 5, tickFormat: (value) => `${Math.round(100 * value)} %` }),
        Plot.ruleY([0], { stroke: "var(--axis)", strokeOpacity: 0.6 }),
        ...sets.flatMap(([name]) => {
          const rows = data.filter((row) => row.set === name);
          return [
            Plot.areaY(rows, { x, y1: `${measure}_low`, y2: `${measure}_high`, fill: style(name).colour, fillOpacity: 0.14 }),
            Plot.line(rows, { x, y: measure, stroke: style(name).colour, strokeWidth: 2, strokeDasharray: style(name).dash }),
            Plot.dot(rows, { x, y: measure, fill: style(name).colour, r: 2.2 }),
          ];
        }),
        Plot.tip(places, Plot.pointerX({ x: "at", y: (place) => place.rows[0][measure], ...Plots.TIP, title: (place) => tipText(place, x, measure, sets) })),
      ],
    });
    return bySteps ? Plots.linked(drawing, (step, xScale) => xScale.apply(step)) : drawing;
  }

  function tipText({ at, rows }, x, measure, sets) {
    const head = x === "step" ? `step ${Format.count(at)}` : `${Format.count(at)} features`;
    const texts = sets.map(([name, label]) => {
      const row = rows.find((other) => other.set === name);
      if (!row) return `${label}  –`;
      const interval = `${Format.percent(row[`${measure}_low`])} to ${Format.percent(row[`${measure}_high`])}`;
      return `${label}  ${Format.percent(row[measure])} (${interval}), ${Format.number(row.active)} active a token`;
    });
    return [head, ...texts].join("\n");
  }

  // --- features
  function carriers(figure) {
    const cells = (row) => [
      el("span", { class: "number" }, row.feature),
      el("span", {}, row.emergence === null ? "–" : `step ${Format.count(row.emergence)}`),
      el("span", { class: "number" }, Format.number(row.attribution)),
      el("span", { class: "muted" }, `step ${Format.count(row["at step"])}`),
      el("span", { class: "number" }, Format.percent(row["firing rate"])),
      el("span", { class: "carrier-text" }, el("span", { class: "before" }, Format.visible(row.before)), row.token ? el("mark", {}, Format.alone(row.token)) : null, el("span", { class: "after" }, Format.visible(row.after))),
    ];
    const heads = ["feature", "emerges", "attribution", "at", "fires on", "where it is most active"];
    return el("div", { class: "carriers" },
      el("div", { class: "carrier carrier-head", "aria-hidden": "true" }, heads.map((head) => el("span", {}, head))),
      el("ol", {}, Plots.rows(figure.columns).map((row) => el("li", {},
        el("a", { class: "carrier", href: Store.features ? `#feature=${row.feature}` : null, "aria-label": `Feature ${row.feature}` }, cells(row))))));
  }

  return { ability, circuit, dominance, ablation, carriers };
})();
