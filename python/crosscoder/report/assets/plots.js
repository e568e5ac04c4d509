// Drawing habits shared by all figures: frame, colours, tooltips, redrawing, and the crosshair that links step axes.
const Plots = (() => {
  const KIND_COLOURS = { initialization: "var(--c1)", emergent: "var(--c2)", dead: "var(--c-dead)", other: "var(--c3)", all: "var(--ink)" };
  const COLOURS = ["var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)"];
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

  // A drawing; within a frame (see zoom.js) it can be zoomed, and shows the part that was chosen.
  function plot(options, frame = null, panel = 0) {
    const view = frame?.views[panel] ?? {};
    const drawing = Plot.plot({
      className: "cc-plot",
      style: { fontFamily: "inherit", fontSize: "11px", overflow: "visible" },
      marginTop: 24, marginRight: 14, marginBottom: 36, marginLeft: 44,
      ...options,
      x: Zoom.cut(options.x, view.x), y: Zoom.cut(options.y, view.y),
      clip: view.x || view.y ? true : null,
    });
    if (frame) Zoom.watch(drawing, frame, panel, options.x.domain);
    return drawing;
  }

  // Colours of n series, by name where it is a kind of features.
  const seriesColour = ({ colour }, index, n) => {
    if (KIND_COLOURS[colour]) return KIND_COLOURS[colour];
    if (n <= COLOURS.length) return COLOURS[index];
    return index === n - 1 ? "var(--line-strong)" : d3.schemeTableau10[index % 10];
  };

  // Columns -> one object a row
  const rows = (columns) => {
    const names = Object.keys(columns);
    return columns[names[0]].map((_, index) => Object.fromEntries(names.map((name) => [name, columns[name][index]])));
  };
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

  const TIP = { fontSize: 12, lineHeight: 1.35, textPadding: 9, stroke: "var(--line-strong)", fill: "var(--surface)", pathFilter: null };

  // --- the crosshair: every figure with snapshots on its x axis shows the one under the pointer
  const members = new Map();
  function linked(figure, place) {
    const scale = figure.scale("x");
    const drawing = figure.tagName.toLowerCase() === "svg" ? figure : figure.querySelector("svg");
    const [, , , height] = drawing.getAttribute("viewBox").split(" ").map(Number);
    const line = svg("line", { class: "crosshair", y1: 22, y2: height - 36, visibility: "hidden" });
    drawing.insertBefore(line, drawing.querySelector("g"));
    members.set(drawing, { line, x: (snapshot) => place(Store.steps[snapshot], scale, snapshot), range: scale.range });
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
      if (Number.isFinite(distance) && (best === null || distance < best.distance)) best = { snapshot, distance };
    });
    return best.snapshot;
  }
  function point(snapshot) {
    for (const [drawing, { line, x, range: [left, right] }] of members) {
      if (!drawing.isConnected) {
        members.delete(drawing);
        continue;
      }
      if (snapshot === null) {
        line.setAttribute("visibility", "hidden");
        continue;
      }
      const at = x(snapshot);
      const shown = at >= left && at <= right;
      if (shown) for (const end of ["x1", "x2"]) line.setAttribute(end, at);
      line.setAttribute("visibility", shown ? "visible" : "hidden");
    }
  }

  // Calls draw(frame) for a container now and whenever its width, the step axis or the part that is shown changes.
  const containers = new Map();
  const observer = new ResizeObserver((entries) => {
    for (const { target } of entries) redraw(target, false);
  });
  function redraw(container, force) {
    const state = containers.get(container);
    const width = Math.floor(container.clientWidth);
    if (!state || width === 0 || (!force && width === state.frame.width)) return;
    state.frame.width = width;
    state.frame.scales = [];
    container.replaceChildren(...[state.draw(state.frame)].flat());
  }
  function keepDrawn(container, draw, onZoom = () => {}) {
    const frame = {
      width: 0, views: [], scales: [],
      changed() {
        onZoom(frame.views.some((view) => view?.x || view?.y));
        redraw(container, true);
      },
      show(panel, view) {
        frame.views[panel] = view;
        frame.changed();
      },
      reset() {
        frame.views = [];
        frame.changed();
      },
    };
    containers.set(container, { draw, frame });
    observer.observe(container);
    return frame;
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
      else containers.get(container).frame.width = 0; // hidden: drawn again when shown
    }
  });

  return { SERIES, TIP, kindColour, seriesColour, plot, rows, legend, stepTitle, linked, nearest, keepDrawn, forget };
})();
