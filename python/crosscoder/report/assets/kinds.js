// The general kinds of figures, drawn from columns and a spec (crosscoder/report/spec.py): (figure, frame) -> nodes.
const Kinds = (() => {
  const GRID = { stroke: "var(--grid)", strokeOpacity: 1, ticks: 5 };
  const WRITE = { number: Format.number, count: Format.count, percent: Format.percent, text: String };
  const write = (format) => (value) => (value === null || value === undefined ? "–" : WRITE[format](value));
  const tick = { number: undefined, count: (value) => Format.count(Math.abs(value)), percent: (value) => `${+(100 * value).toFixed(2)} %`, text: String };
  const fits = (row, where) => Object.entries(where ?? {}).every(([column, value]) => row[column] === value);
  const known = (row, ...columns) => columns.every((column) => row[column] !== null && row[column] !== undefined);
  const marksOf = (figure) => [...Store.overview.marks, ...(figure.extra.marks ?? [])];
  const widest = (texts) => Math.max(0, ...texts.map((text) => String(text).length));

  // A scale's options from an axis and its values.
  function scaleOf(axis, values) {
    const finite = values.filter((value) => value !== null && Number.isFinite(value));
    const [low, high] = axis.domain;
    const ends = [low ?? Math.min(...finite, axis.zero ? 0 : Infinity), high ?? Math.max(...finite, axis.zero ? 0 : -Infinity)];
    if (!finite.length || ends[0] === ends[1]) ends[1] = ends[0] + 1;
    const isLog = axis.scale === "log";
    const domain = isLog ? [ends[0] / 1.15, ends[1] * 1.15] : ends;
    return { type: axis.scale, domain: domain.map((end) => (Number.isFinite(end) ? end : 0)), nice: !isLog && (low === null || high === null), clamp: low !== null };
  }
  const ticksOf = (axis, domain, most) => (axis.scale === "log" ? Axis.roundTicks(...domain, most) : undefined);
  const axisY = (axis, scale, shown = null) => {
    const ticks = ticksOf(axis, shown ?? scale.domain, 5);
    return [
      Plot.gridY(ticks, GRID),
      Plot.axisY(ticks, { stroke: null, color: "var(--axis)", ticks: 5, tickFormat: tick[axis.format], label: `↑ ${axis.label}`, labelArrow: false }),
      Plot.ruleY(axis.zero && scale.domain[0] <= 0 ? [0] : [], { stroke: "var(--axis)", strokeOpacity: 0.6 }),
    ];
  };
  const axisX = (axis, scale, shown = null) => Plot.axisX(ticksOf(axis, shown ?? scale.domain, 6), { stroke: null, color: "var(--axis)", ticks: 6, tickFormat: tick[axis.format], label: `${axis.label} →`, labelArrow: false });
  const stepPlace = (step, scale) => scale.apply(step);

  function panels(frame, nodes) {
    if (nodes.length === 1) return nodes[0][1](frame.width);
    const across = frame.width >= 640 ? nodes.length : 1;
    const each = Math.floor((frame.width - 28 * (across - 1)) / across);
    return el("div", { class: "panels", style: { "--across": across } }, nodes.map(([title, draw]) => el("div", { class: "panel" }, el("h4", {}, title), draw(each))));
  }

  // A drawing whose points or lines are features: a click opens the one under the pointer.
  function opensFeatures(drawing) {
    drawing.addEventListener("input", () => drawing.classList.toggle("clickable", Boolean(Store.features && known(drawing.value ?? {}, "feature"))));
    drawing.addEventListener("click", () => {
      if (Store.features && known(drawing.value ?? {}, "feature")) go(`feature=${drawing.value.feature}`);
    });
    return drawing;
  }

  // ------------------------------------------------------------------------------------------------ steps
  // Steps at which something else happens: a dotted line with a few words, and a band for an interval.
  function markSteps(drawing, marks, place) {
    const [x, y] = [drawing.scale("x"), drawing.scale("y")];
    const [left, right] = [Math.min(...x.range), Math.max(...x.range)];
    const [bottom, top] = [Math.max(...y.range), Math.min(...y.range)];
    const node = drawing.tagName.toLowerCase() === "svg" ? drawing : drawing.querySelector("svg");
    const inside = (at) => Math.max(left, Math.min(right, at));
    for (const mark of marks) {
      if (known(mark, "low", "high")) {
        const [from, to] = [place(mark.low, x), place(mark.high, x)].map(inside);
        if (to > from) node.insertBefore(svg("rect", { class: "step-span", x: from, y: top, width: to - from, height: bottom - top }), node.querySelector("g"));
      }
      const at = place(mark.step, x);
      if (!(at >= left && at <= right)) continue;
      const label = { x: at > left + 30 ? at - 4 : at + 9, y: bottom - 5 };
      // under the data: their first group
      const first = node.querySelector("g");
      for (const part of [svg("line", { class: "step-mark", x1: at, x2: at, y1: top, y2: bottom }, svg("title", {}, `${mark.label}: step ${Format.count(Math.round(mark.step))}`)),
        svg("text", { class: "step-label", "text-anchor": "start", transform: `translate(${label.x} ${label.y}) rotate(-90)` }, mark.label)]) node.insertBefore(part, first);
    }
    return drawing;
  }

  // Where a step between snapshots falls on a band axis.
  function bandPlace(step, scale) {
    const centre = (index) => scale.apply(index) + scale.bandwidth / 2;
    const { steps } = Store;
    const after = steps.findIndex((other) => other >= step);
    if (after <= 0) return centre(after < 0 ? steps.length - 1 : 0);
    const [low, high] = [Axis.bend(steps[after - 1]), Axis.bend(steps[after])];
    return centre(after - 1) + ((Axis.bend(step) - low) / (high - low)) * (centre(after) - centre(after - 1));
  }
  const bandCentre = (_, scale, snapshot) => scale.apply(snapshot) + scale.bandwidth / 2;

  // ------------------------------------------------------------------------------------------------ lines
  function lines(figure, frame) {
    const { spec } = figure;
    const rows = Plots.rows(figure.columns);
    const several = spec.panels.length > 1 && spec.panels.some(({ series }) => series.length > 1);
    return panels(frame, spec.panels.map((panel, index) => [panel.title, (width) => [
      several ? lineLegend(panel.series) : null, linesPanel(figure, panel, rows.filter((row) => fits(row, panel.where)), frame, index, width),
    ].filter(Boolean)]));
  }

  function linesPanel(figure, panel, rows, frame, index, width) {
    const { spec } = figure;
    const bySteps = spec.x === "step";
    const { series } = panel;
    const rules = Object.entries(panel.rules ?? {}).sort((a, b) => b[1] - a[1]);
    const thin = rows.filter((row) => known(row, "feature"));
    const thick = rows.filter((row) => !known(row, "feature"));
    const values = series.flatMap(({ column, low, high }) => rows.flatMap((row) => [row[column], low ? row[low] : null, high ? row[high] : null]));
    const y = scaleOf(panel.y, [...values, ...rules.map(([, value]) => value)]);
    const x = bySteps ? Axis.scale(Store.steps) : scaleOf(spec.x_axis, rows.map((row) => row[spec.x]));
    const colour = (item, place) => Plots.seriesColour(item, place, series.length);
    const dash = (place) => Plots.SERIES[place % Plots.SERIES.length].dash;
    const head = (row) => (bySteps ? Plots.stepTitle(row) : `${spec.x_axis.label} ${write(spec.x_axis.format)(row[spec.x])}`);
    const say = write(panel.y.format);
    const interval = (row, { low, high }) => (low && high && known(row, low, high) ? `  (${say(row[low])} to ${say(row[high])})` : "");
    const name = (row) => (row.feature === null || row.feature === undefined ? row[spec.split] : `feature ${row.feature}`);
    const title = (row) => [spec.split ? `${name(row)}, ${head(row)}` : head(row), ...series.filter(({ column }) => !spec.split || known(row, column)).map((item) => `${series.length > 1 ? `${item.label}  ` : ""}${say(row[item.column])}${interval(row, item)}`)].join("\n");
    const anchor = (row) => series.map(({ column }) => row[column]).find((value) => value !== null && value !== undefined);
    const near = spec.split ? Plot.pointer : Plot.pointerX;
    const drawing = Plots.plot({
      width, height: spec.split ? 280 : 250, x, y, marginLeft: 48,
      marks: [
        ...axisY(panel.y, y, frame.views[index]?.y),
        bySteps ? Axis.marks(Store.steps, width, frame.views[index]?.x) : axisX(spec.x_axis, x, frame.views[index]?.x),
        ...rules.map(([, value]) => Plot.ruleY([value], { stroke: "var(--muted)", strokeDasharray: "3 3" })),
        ...series.flatMap((item, place) => (item.low && item.high ? [Plot.areaY(thick.filter((row) => known(row, item.low, item.high)), { x: spec.x, y1: item.low, y2: item.high, z: spec.split, fill: colour(item, place), fillOpacity: 0.16 })] : [])),
        ...series.flatMap((item, place) => (thin.length ? [Plot.line(thin.filter((row) => known(row, item.column)), { x: spec.x, y: item.column, z: spec.split, stroke: colour(item, place), strokeWidth: 1.1, strokeOpacity: 0.5, className: "examples" })] : [])),
        ...series.flatMap((item, place) => {
          const shown = thick.filter((row) => known(row, item.column));
          return [
            thin.length ? Plot.line(shown, { x: spec.x, y: item.column, z: spec.split, stroke: "var(--surface)", strokeWidth: 5 }) : null,
            Plot.line(shown, { x: spec.x, y: item.column, z: spec.split, stroke: colour(item, place), strokeWidth: thin.length ? 3 : 2, strokeDasharray: dash(place), strokeLinejoin: "round" }),
            thin.length ? null : Plot.dot(shown, { x: spec.x, y: item.column, fill: colour(item, place), r: 2.2 }),
          ];
        }),
        Plot.tip(rows.filter((row) => anchor(row) !== undefined), near({ x: spec.x, y: anchor, title, ...Plots.TIP, maxRadius: spec.split ? 30 : Infinity })),
      ],
    }, frame, index);
    if (thin.length) litLines(opensFeatures(drawing), thin);
    if (rules.length) labelLines(drawing, rules, rows.map((row) => [row[spec.x], anchor(row)]));
    if (!bySteps) return drawing;
    return markSteps(Plots.linked(drawing, stepPlace), marksOf(figure), stepPlace);
  }

  // The thin line under the pointer stands out.
  function litLines(drawing, thin) {
    const order = [...new Set(thin.map((row) => row.feature))];
    const group = drawing.querySelector('[aria-label="line"]'); // the first line mark: one path an example
    group.classList.add("examples");
    const paths = group.querySelectorAll("path");
    drawing.addEventListener("input", () => {
      const feature = drawing.value?.feature ?? null;
      paths.forEach((path, place) => path.classList.toggle("lit", feature !== null && order[place] === feature));
    });
  }

  // Names of horizontal lines: at the left where the curve passes above, else at the right; of two close lines the
  // upper has its name above and the lower below.
  function labelLines(drawing, rules, points) {
    const [x, y] = [drawing.scale("x"), drawing.scale("y")];
    const [left, right] = x.range;
    const early = points.filter(([at, value]) => value !== null && x.apply(at) < left + 0.5 * (right - left)).map(([, value]) => value);
    const span = y.domain[1] - y.domain[0];
    const places = rules.filter(([, value]) => value >= y.domain[0] && value <= y.domain[1])
      .map(([label, value]) => ({ text: `${label}  ${Format.number(value)}`, y: y.apply(value), atLeft: early.every((other) => other > value + 0.04 * span) }));
    places.forEach((place, index) => {
      const above = places[index - 1];
      const crowded = above && above.atLeft === place.atLeft && place.y - above.y < 17;
      drawing.append(svg("text", { class: "line-label", x: place.atLeft ? left + 4 : right, y: crowded ? place.y + 13 : place.y - 5, "text-anchor": place.atLeft ? "start" : "end" }, place.text));
    });
  }

  // ------------------------------------------------------------------------------------------------- bars
  function bands(values, width, room, label) {
    const every = Math.max(1, Math.ceil((values.length * room) / Math.max(width - 60, 1)));
    return { scale: { type: "band", domain: values, padding: 0.18 }, ticks: values.filter((_, index) => index % every === 0), label };
  }
  const stepOf = (snapshot) => Format.compactStep(Store.steps[snapshot]);
  const bandText = (column) => (column === "snapshot" || column === "other_snapshot" ? stepOf : (value) => (typeof value === "number" ? Format.number(value) : String(value)));
  const shownTicks = (ticks, shown) => (shown ? (shown.length <= ticks.length ? shown : ticks.filter((value) => shown.includes(value))) : ticks);

  function bars(figure, frame) {
    const { spec } = figure;
    const bySteps = spec.x === "snapshot";
    const rows = Plots.rows(figure.columns);
    const text = bandText(spec.x);
    const names = rows.map((row) => row[spec.x]);
    const inWords = names.some((name) => typeof name === "string");
    const x = bands(names, frame.width, inWords ? 0 : Math.max(26, 7 * widest(names.map(text)) + 8), spec.x_label);
    const up = spec.series.filter(({ column }) => !spec.down.includes(column)).map(({ column }) => column);
    const down = spec.series.filter(({ column }) => spec.down.includes(column));
    const colours = spec.series.map((item, place) => Plots.seriesColour(item, place, spec.series.length));
    const colourOf = (column) => colours[spec.series.findIndex((item) => item.column === column)];
    const data = up.flatMap((column) => rows.filter((row) => known(row, column)).map((row) => ({ at: row[spec.x], column, value: row[column] })));
    const total = (row) => up.reduce((sum, column) => sum + (row[column] ?? 0), 0);
    const y = scaleOf({ ...spec.y, zero: true }, rows.flatMap((row) => [total(row), ...down.map(({ column }) => -row[column])]));
    const say = write(spec.y.format);
    const drawing = Plots.plot({
      width: frame.width, height: inWords ? 270 : 240, marginLeft: 48, marginBottom: inWords ? 22 + 3.6 * widest(names) : 36, x: x.scale, y: { ...y, clamp: false },
      color: { domain: up, range: up.map(colourOf) },
      marks: [
        ...axisY(spec.y, y),
        Plot.axisX({ stroke: null, color: "var(--axis)", ticks: shownTicks(x.ticks, frame.views[0]?.x), tickFormat: text, label: inWords ? null : x.label, tickSize: 0, tickRotate: inWords ? -35 : 0 }),
        Plot.ruleY([0], { stroke: "var(--axis)" }),
        Plot.barY(data, { x: "at", y: "value", fill: "column", order: up, insetTop: 0.5 }),
        ...down.map(({ column }) => Plot.barY(rows, { x: spec.x, y: (row) => -row[column], fill: colourOf(column) })),
        Plot.tip(rows.filter((row) => up.some((column) => known(row, column))), Plot.pointerX({
          x: spec.x, y: total, ...Plots.TIP,
          title: (row) => [bySteps ? Plots.stepTitle(row) : `${spec.x_label}: ${text(row[spec.x])}`, ...spec.series.map(({ column, label }) => `${label}  ${say(row[column])}`)].join("\n"),
        })),
      ],
    }, frame);
    if (!bySteps) return drawing;
    markSteps(Plots.linked(drawing, bandCentre), marksOf(figure), bandPlace);
    if (spec.lists && Store.features) {
      drawing.classList.add("clickable");
      drawing.addEventListener("click", (event) => {
        const step = Store.steps[Plots.nearest(drawing, event)];
        Browser.showOnly({ emergence: [step, step] });
      });
    }
    return drawing;
  }

  // ---------------------------------------------------------------------------------------------- scatter
  // Always the same noise in [-1, 1] for a row.
  const noise = (index, salt) => 2 * ((Math.sin((index + 1) * (salt ? 12.9898 : 78.233)) * 43758.5453) % 1) * 0.5;

  function scatter(figure, frame) {
    const { spec } = figure;
    const bySteps = spec.x === "step";
    const rows = Plots.rows(figure.columns).filter((row) => known(row, spec.x, spec.y));
    const whole = rows.every((row) => Number.isInteger(row[spec.y]));
    const at = (row, index) => (!spec.jitter ? row[spec.x] : bySteps ? Math.max(0, Axis.unbend(Axis.bend(row[spec.x]) + 0.1 * noise(index, 0))) : row[spec.x] + 0.25 * noise(index, 0));
    const up = (row, index) => {
      if (!spec.jitter || !whole) return row[spec.y];
      return spec.y_axis.scale === "log" ? row[spec.y] * Math.exp(0.2 * noise(index, 1)) : row[spec.y] + 0.3 * noise(index, 1);
    };
    const points = rows.map((row, index) => ({ ...row, "·x": at(row, index), "·y": up(row, index) }));
    const x = bySteps ? Axis.scale(Store.steps) : scaleOf(spec.x_axis, points.map((row) => row["·x"]));
    const y = scaleOf(spec.y_axis, points.map((row) => row["·y"]));
    const colours = spec.groups.map((name, place) => Plots.seriesColour({ colour: name }, place, spec.groups.length));
    const title = (row) => [
      ...(known(row, "feature") ? [`feature ${row.feature}`] : []), ...(spec.group ? [row[spec.group]] : []),
      bySteps ? Plots.stepTitle(row) : `${spec.x_axis.label}  ${write(spec.x_axis.format)(row[spec.x])}`,
      `${spec.y_axis.label}  ${write(spec.y_axis.format)(row[spec.y])}`,
      ...spec.details.map((column) => `${column}  ${typeof row[column] === "number" ? Format.number(row[column]) : row[column] ?? "–"}`),
    ].join("\n");
    const drawing = opensFeatures(Plots.plot({
      width: frame.width, height: 300, marginLeft: 48, x, y,
      color: spec.group ? { domain: spec.groups, range: colours } : undefined,
      marks: [
        ...axisY(spec.y_axis, y, frame.views[0]?.y),
        bySteps ? Axis.marks(Store.steps, frame.width, frame.views[0]?.x) : axisX(spec.x_axis, x, frame.views[0]?.x),
        Plot.dot(points, { x: "·x", y: "·y", fill: spec.group ?? "var(--c1)", fillOpacity: 0.5, r: 2.5 }),
        Plot.dot(points, Plot.pointer({ x: "·x", y: "·y", stroke: "var(--ink)", strokeWidth: 1.5, r: 4.5 })),
        Plot.tip(points, Plot.pointer({ x: "·x", y: "·y", title, ...Plots.TIP })),
      ],
    }, frame));
    return bySteps ? markSteps(Plots.linked(drawing, stepPlace), marksOf(figure), stepPlace) : drawing;
  }

  // ------------------------------------------------------------------------------------------------- heat
  function heat(figure, frame) {
    const { spec } = figure;
    const options = spec.measures.map(({ label }, index) => [index, label]);
    const drawn = (measure) => heatMap(figure, frame, spec.measures[measure]);
    return options.length > 1 ? Controls.withControls(figure, [{ name: "measure", label: "show", options }], ({ measure }) => drawn(measure)) : drawn(0);
  }

  function heatMap(figure, frame, measure) {
    const { spec } = figure;
    const rows = Plots.rows(figure.columns);
    const [across, up] = [spec.x, spec.y].map((column) => [...new Set(figure.columns[column])]);
    const width = spec.square ? Math.min(frame.width, 540) : frame.width;
    const [atX, atY] = [spec.x, spec.y].map(bandText);
    const marginLeft = Math.max(48, 20 + 7 * widest(up.map(atY)));
    const x = bands(across, width, Math.max(26, 7 * widest(across.map(atX)) + 6), spec.x_label);
    const y = spec.square ? bands(up, width, 22, spec.y_label) : { ticks: up };
    const values = rows.map((row) => row[measure.column]).filter((value) => value !== null);
    const largest = Math.max(1e-12, ...values.map(Math.abs));
    const domain = measure.signed ? [-largest, largest] : [measure.domain[0] ?? Math.min(...values, 0), measure.domain[1] ?? Math.max(...values, 1e-12)];
    const ramp = measure.signed ? d3.interpolateRdBu : d3.interpolateViridis;
    const padding = across.length > 20 ? 0 : 0.03;
    const view = frame.views[0] ?? {};
    const label = (column, row) => (column === "feature" ? `feature ${row.feature}` : null);
    const steps = (row) => (row.other_step === undefined ? Plots.stepTitle(row) : `steps ${Format.count(row.step)} and ${Format.count(row.other_step)}`);
    const named = spec.x === "snapshot" || spec.x === "other_snapshot";
    const title = (row) => [
      label(spec.y, row), named ? steps(row) : `${spec.x_label}  ${atX(row[spec.x])}`, ...(spec.y === "feature" || spec.square ? [] : [`${spec.y_label}  ${atY(row[spec.y])}`]),
      ...spec.measures.map((item) => `${item.label}  ${write("number")(row[item.column])}`), ...spec.details.map((column) => `${column.replaceAll("_", " ")}  ${write("number")(row[column])}`),
    ].filter(Boolean).join("\n");
    const axis = { tickSize: 0, stroke: null, color: "var(--axis)" };
    const drawing = Plots.plot({
      width, height: spec.square ? width - 12 : 62 + 15 * up.length, marginTop: spec.square ? 12 : 22, marginRight: 12, marginBottom: 40, marginLeft,
      x: { ...x.scale, padding }, y: { type: "band", domain: spec.square ? [...up].reverse() : up, padding },
      color: { type: "linear", domain, interpolate: ramp, unknown: "var(--grid)" },
      marks: [
        Plot.axisX({ ...axis, ticks: shownTicks(x.ticks, view.x), tickFormat: atX, label: spec.x_label }),
        Plot.axisY({ ...axis, ticks: shownTicks(y.ticks, view.y), tickFormat: spec.y === "feature" ? String : atY, label: spec.y_label, labelAnchor: spec.square ? "center" : "top" }),
        Plot.cell(rows, { x: spec.x, y: spec.y, fill: (row) => row[measure.column] ?? NaN }),
        Plot.tip(rows, Plot.pointer({ x: spec.x, y: spec.y, ...Plots.TIP, title })),
      ],
    }, frame);
    if (spec.y === "feature") opensFeatures(drawing);
    if (spec.x === "snapshot") Plots.linked(drawing, bandCentre);
    if (figure.extra.turning) markTurning(drawing, figure.extra.turning);
    if (named) markEdge(drawing, marksOf(figure));
    return [drawing, rampKey(ramp, domain, measure.label), turningText(figure.extra.turning)].filter(Boolean);
  }

  // Marked steps of a heat map: a triangle at its upper edge, which hides no cell.
  function markEdge(drawing, marks) {
    const [x, y] = [drawing.scale("x"), drawing.scale("y")];
    const top = Math.min(...y.range);
    for (const mark of marks) {
      const at = bandPlace(mark.step, x);
      if (Number.isFinite(at)) drawing.append(svg("path", { class: "edge-mark", d: `M${at} ${top}l-4 -8h8z` }, svg("title", {}, `${mark.label}: step ${Format.count(Math.round(mark.step))}`)));
    }
  }

  function markTurning(drawing, turning) {
    const [x, y] = [drawing.scale("x"), drawing.scale("y")];
    const [left, right] = x.range;
    const [top, bottom] = y.range;
    const ends = [[turning.step, "turning"], [turning.low, "turning-end"], [turning.high, "turning-end"]].filter(([step]) => step !== null);
    for (const [step, name] of ends) {
      const [px, py] = [bandPlace(step, x), bandPlace(step, y)];
      if (Number.isFinite(px)) drawing.append(svg("line", { class: name, x1: px, x2: px, y1: top, y2: bottom }));
      if (Number.isFinite(py)) drawing.append(svg("line", { class: name, x1: left, x2: right, y1: py, y2: py }));
    }
  }

  function turningText(turning) {
    if (!turning) return null;
    const interval = turning.low === null || turning.high === null ? ""
      : ` (${turning.level ? `${+(100 * turning.level).toFixed(1)} % ` : ""}interval ${Format.count(Math.round(turning.low))} to ${Format.count(Math.round(turning.high))})`;
    return el("p", { class: "plot-note" }, svg("svg", { width: 22, height: 8, "aria-hidden": "true" },
      svg("line", { x1: 0, x2: 22, y1: 4, y2: 4, class: "turning-key" })),
    `${turning.name}: step ${Format.count(Math.round(turning.step))}${interval}`);
  }

  function rampKey(ramp, domain, label) {
    const stops = Array.from({ length: 11 }, (_, index) => ramp(index / 10)).join(",");
    const ends = domain.map((end) => Format.number(end, 2));
    return el("div", { class: "ramp", role: "img", "aria-label": `Colours from ${ends[0]} to ${ends[1]}` },
      el("span", {}, ends[0]), el("span", { class: "ramp-bar", style: { background: `linear-gradient(to right, ${stops})` } }), el("span", {}, ends[1]),
      el("span", { class: "muted" }, label));
  }

  // ---------------------------------------------------------------------------------------------- listing
  function listing(figure) {
    const { spec } = figure;
    const cell = (field, row) => (known(row, field.column) ? `${field.prefix}${write(field.format)(row[field.column])}` : "–");
    const context = (row) => (spec.context
      ? el("span", { class: "carrier-text" }, el("span", { class: "before" }, Format.visible(row.before)), row.token ? el("mark", {}, Format.alone(row.token)) : null, el("span", { class: "after" }, Format.visible(row.after)))
      : null);
    const wideText = spec.context || spec.text;
    const prose = (row) => (spec.text ? el("span", {}, Format.visible(row[spec.text])) : null);
    const columns = (narrow) => [...spec.fields.filter((field) => field.narrow || !narrow).map(({ column, format }) => (format === "text" ? `${Math.min(20, Math.max(7, widest(figure.columns[column])))}ch` : "minmax(48px, 96px)")), ...(wideText ? ["minmax(0, 1fr)"] : [])].join(" ");
    const cells = (make) => spec.fields.map((field) => el("span", { class: `number${field.narrow ? "" : " roomy"}` }, make(field)));
    return el("div", { class: "carriers", style: { "--columns": columns(false), "--columns-narrow": columns(true) } },
      el("div", { class: "carrier carrier-head", "aria-hidden": "true" }, cells((field) => field.label), wideText ? el("span", {}, spec.context || spec.text) : null),
      el("ol", {}, Plots.rows(figure.columns).map((row) => {
        const opens = Store.features && known(row, "feature");
        return el("li", {}, el(opens ? "a" : "div", { class: "carrier", href: opens ? `#feature=${row.feature}` : null, "aria-label": opens ? `Feature ${row.feature}` : null }, cells((field) => cell(field, row)), context(row)));
      })));
  }

  // ----------------------------------------------------------------------------------------------- legend
  const lineLegend = (series) => Plots.legend(series.map((item, index) => (
    { label: item.label, colour: Plots.seriesColour(item, index, series.length), dash: Plots.SERIES[index % Plots.SERIES.length].dash })));

  function legendOf({ spec, columns }) {
    const boxes = (items) => Plots.legend(items.map((item, index) => ({ label: item.label, colour: Plots.seriesColour(item, index, items.length), box: true })));
    if (spec?.kind === "lines") return spec.panels.length > 1 || spec.panels[0].series.length < 2 ? null : lineLegend(spec.panels[0].series);
    if (spec?.kind === "bars" && spec.series.length > 1) return boxes(spec.series);
    if (spec?.kind === "scatter" && spec.groups.length > 1) {
      return boxes(spec.groups.map((name) => ({ label: `${name} (${Format.count(columns[spec.group].filter((other) => other === name).length)})`, colour: name })));
    }
    return null;
  }

  const DRAW = { lines, bars, scatter, heat, listing };
  return { draw: (figure, frame) => DRAW[figure.spec.kind](figure, frame), legendOf, panels };
})();
