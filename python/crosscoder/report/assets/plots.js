// Drawing habits shared by all figures: frame, colours, tooltips, redrawing, and the crosshair that links step axes.
const Plots = (() => {
  const KIND_COLOURS = { initialization: "var(--c1)", emergent: "var(--c2)", dead: "var(--c-dead)", other: "var(--c3)" };
  const MORE_COLOURS = ["var(--c4)", "var(--c5)", "var(--c3)"];
  const SERIES = [
    { colour: "var(--c1)", dash: null },
    { colour: "var(--c2)", dash: "5 3" },
    { colour: "var(--c3)", dash: "2 3" },
    { colour: "var(--c4)", dash: "8 3 2 3" },
  ];

  function kindColour(name) {
    if (KIND_COLOURS[name]) return KIND_COLOURS[name];
    const others = (Store.features?.kindNames ?? []).filter((other) => !KIND_COLOURS[other]);
    return MORE_COLOURS[Math.max(0, others.indexOf(name)) % MORE_COLOURS.length];
  }

  function plot(options) {
    return Plot.plot({
      className: "cc-plot",
      style: { fontFamily: "inherit", fontSize: "11px", overflow: "visible" },
      marginTop: 24, marginRight: 14, marginBottom: 36, marginLeft: 44,
      ...options,
    });
  }

  // Columns -> one object a row
  const rows = (columns) => {
    const names = Object.keys(columns);
    return columns[names[0]].map((_, index) => Object.fromEntries(names.map((name) => [name, columns[name][index]])));
  };
  const longForm = (columns, names) =>
    names.flatMap((name) => columns.step.map((step, index) => ({ snapshot: index, step, series: name, value: columns[name][index] })))
      .filter((row) => row.value !== null);

  const stepTitle = (row) => `step ${Format.count(row.step)}`;

  function legend(entries) {
    return el("ul", { class: "legend" }, entries.map(({ label, colour, dash, width, box, note }) =>
      el("li", {},
        box
          ? el("span", { class: "legend-box", style: { background: colour } })
          : svg("svg", { width: 22, height: 8, "aria-hidden": "true" },
              svg("line", { x1: 0, x2: 22, y1: 4, y2: 4, stroke: colour, "stroke-width": width ?? 2, "stroke-dasharray": dash })),
        el("span", {}, label, note ? el("span", { class: "muted" }, ` ${note}`) : null))));
  }

  // Lines over training steps with a tooltip that lists every series at the snapshot under the pointer.
  function stepLines({ columns, names, width, height = 230, y = {}, reference = [], format = Format.number, threshold = null }) {
    const data = longForm(columns, names);
    const table = rows(columns);
    const styles = names.map((_, index) => SERIES[index % SERIES.length]);
    const tipText = (row) => [stepTitle(row), ...names.map((name) => `${names.length > 1 ? `${name}  ` : ""}${format(row[name])}`)].join("\n");
    const anchor = (row) => names.map((name) => row[name]).find((value) => value !== null);
    return linked(plot({
      width, height,
      x: Axis.scale(Store.steps),
      y: { nice: true, ticks: 5, ...y },
      marks: [
        Plot.gridY({ stroke: "var(--grid)", strokeOpacity: 1, ticks: 5 }),
        Axis.marks(Store.steps, width),
        Plot.axisY({ stroke: null, color: "var(--axis)", ticks: 5, tickFormat: y.tickFormat }),
        Plot.ruleY(y.zero ? [0] : [], { stroke: "var(--axis)", strokeOpacity: 0.6 }),
        ...reference.map(({ value }) => Plot.ruleY([value], { stroke: "var(--muted)", strokeDasharray: "3 3" })),
        threshold === null ? null : Plot.ruleY([threshold], { stroke: "var(--muted)", strokeDasharray: "3 3" }),
        ...names.map((name, index) => Plot.line(data.filter((row) => row.series === name), {
          x: "step", y: "value", stroke: styles[index].colour, strokeWidth: 2, strokeDasharray: styles[index].dash, strokeLinejoin: "round",
        })),
        ...names.map((name, index) => Plot.dot(data.filter((row) => row.series === name), {
          x: "step", y: "value", fill: styles[index].colour, r: 2.2,
        })),
        Plot.tip(table, Plot.pointerX({ x: "step", y: anchor, title: tipText, ...TIP })),
      ],
    }), (step, scale) => scale.apply(step));
  }

  const TIP = { fontSize: 12, lineHeight: 1.35, textPadding: 9, stroke: "var(--line-strong)", fill: "var(--surface)", pathFilter: null };

  // --- the crosshair: every figure with snapshots on its x axis shows the one under the pointer
  const members = new Map();
  function linked(figure, place) {
    const scale = figure.scale("x");
    const drawing = figure.tagName.toLowerCase() === "svg" ? figure : figure.querySelector("svg");
    const [, , , height] = drawing.getAttribute("viewBox").split(" ").map(Number);
    const line = svg("line", { class: "crosshair", y1: 22, y2: height - 36, visibility: "hidden" });
    drawing.insertBefore(line, drawing.querySelector("g"));
    members.set(drawing, { line, x: (snapshot) => place(Store.steps[snapshot], scale, snapshot) });
    drawing.addEventListener("pointermove", (event) => point(nearest(drawing, event)));
    drawing.addEventListener("pointerleave", () => point(null));
    return figure;
  }
  function nearest(drawing, event) {
    const box = drawing.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * drawing.viewBox.baseVal.width;
    const place = members.get(drawing).x;
    let best = null;
    Store.steps.forEach((_, snapshot) => {
      const distance = Math.abs(place(snapshot) - x);
      if (best === null || distance < best.distance) best = { snapshot, distance };
    });
    return best.snapshot;
  }
  function point(snapshot) {
    for (const [drawing, { line, x }] of members) {
      if (!drawing.isConnected) {
        members.delete(drawing);
        continue;
      }
      if (snapshot === null) {
        line.setAttribute("visibility", "hidden");
        continue;
      }
      line.setAttribute("x1", x(snapshot));
      line.setAttribute("x2", x(snapshot));
      line.setAttribute("visibility", "visible");
    }
  }

  // Calls draw(width) for a container now and whenever its width or the step axis changes.
  const containers = new Map();
  const observer = new ResizeObserver((entries) => {
    for (const { target } of entries) redraw(target, false);
  });
  function redraw(container, force) {
    const state = containers.get(container);
    const width = Math.floor(container.clientWidth);
    if (!state || width === 0 || (!force && width === state.width)) return;
    state.width = width;
    container.replaceChildren(...[state.draw(width)].flat());
  }
  function keepDrawn(container, draw) {
    containers.set(container, { draw, width: 0 });
    observer.observe(container);
  }
  function forget(root) {
    for (const container of containers.keys()) {
      if (!root.contains(container)) continue;
      observer.unobserve(container);
      containers.delete(container);
    }
  }
  Axis.onChange(() => {
    for (const container of containers.keys()) {
      if (container.clientWidth) redraw(container, true);
      else containers.get(container).width = 0; // hidden: drawn again when shown
    }
  });

  return { SERIES, TIP, kindColour, plot, rows, legend, stepLines, stepTitle, linked, nearest, keepDrawn, forget };
})();
