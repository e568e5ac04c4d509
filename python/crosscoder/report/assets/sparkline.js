// A feature's norm curve in the height of a line of text.
const Sparkline = (() => {
  const WIDTH = 96;
  const HEIGHT = 22;
  const PAD = 2;
  let xs = null;
  const forgetAxis = () => {
    xs = Axis.spread(Store.steps, WIDTH - 2 * PAD).map((x) => (x + PAD).toFixed(1));
  };
  Axis.onChange(forgetAxis);

  function path(feature) {
    if (!xs) forgetAxis();
    const { norms } = Store.features;
    let line = "";
    for (let k = 0; k < xs.length; k++) {
      line += `${k ? "L" : "M"}${xs[k]} ${(HEIGHT - PAD - norms.at(feature, k) * (HEIGHT - 2 * PAD)).toFixed(1)}`;
    }
    return line;
  }

  // An element with .update(feature), so that table rows can reuse it.
  function create() {
    const area = svg("path", { class: "spark-area" });
    const line = svg("path", { class: "spark-line" });
    const node = svg("svg", { class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, width: WIDTH, height: HEIGHT, "aria-hidden": "true", preserveAspectRatio: "none" }, area, line);
    node.update = (feature) => {
      const shape = path(feature);
      line.setAttribute("d", shape);
      area.setAttribute("d", `${shape}L${WIDTH - PAD} ${HEIGHT - PAD}L${PAD} ${HEIGHT - PAD}Z`);
      node.style.setProperty("color", Plots.kindColour(Store.features.kindNames[Store.features.kind[feature]]));
    };
    return node;
  }
  return { create };
})();
