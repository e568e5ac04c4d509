// A row of selects above a drawing, and the one figure that needs several: ablation curves.
const Controls = (() => {
  const chosen = new Map(); // `${figure.key} ${control}` -> value: a redrawing keeps what was chosen

  // draw(values) is called now and after each choice.
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

  const SETS = [["top", "top k", 0], ["random", "k random, matched", 1], ["active", "random, as active as the top k", 2]];
  const MODES = { disrupt: ["drop", "disrupt: ablate the top k"], restore: ["faithfulness", "restore: keep the top k alone"] };

  function ablation(figure, frame) {
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
        Kinds.panels(frame, [
          [`at step ${Format.count(Store.steps[snapshot])}, by number of features`, (each) => lines(known.filter((row) => row.snapshot === snapshot), "k", measure, shown, each, y, frame)],
          [`of ${Format.count(k)} features, by step`, (each) => lines(known.filter((row) => row.k === k), "step", measure, shown, each, y, frame)],
        ]),
      ];
    });
  }
  const KINDS = { mean: "their mean", zero: "0", resample: "what they are on the corrupted prompt" };

  function lines(data, x, measure, sets, width, y, frame) {
    const style = (name) => Plots.SERIES[SETS.find(([set]) => set === name)[2]];
    const bySteps = x === "step";
    const panel = bySteps ? 1 : 0;
    const sizes = [...new Set(data.map((row) => row.k))];
    const scale = bySteps ? Axis.scale(Store.steps) : { type: "log", domain: [1, Math.max(2, ...sizes)] };
    const places = [...new Set(data.map((row) => row[x]))].sort((a, b) => a - b)
      .map((at) => ({ at, rows: data.filter((row) => row[x] === at) }));
    const drawing = Plots.plot({
      width, height: 260, marginLeft: 50, x: scale, y: { ...y, label: `↑ ${measure}`, labelArrow: false },
      marks: [
        Plot.gridY({ stroke: "var(--grid)", strokeOpacity: 1, ticks: 5 }),
        bySteps ? Axis.marks(Store.steps, width, frame.views[panel]?.x) : Plot.axisX(scale.domain[1] > 3 ? d3.range(0, Math.log10(scale.domain[1])).map((power) => 10 ** power) : [1, 2], {
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
    }, frame, panel);
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

  return { withControls, ablation };
})();
