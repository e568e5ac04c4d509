// Zooming a drawing: drag over a part of it (across, along or both ways), or use the buttons below its title.
// A frame belongs to a container: its width, and for each panel the part that is shown, {x, y}, in the terms of the
// scales (numbers, or indices of bands). Null is all of it.
const Zoom = (() => {
  const LEAST = 12; // pixels of a drag that mean something

  const isBand = (scale) => scale.bandwidth !== undefined;
  // Position in [0, 1] along a scale, and back.
  const BENT = { log: [Math.log, Math.exp], symlog: [Axis.bend, Axis.unbend] };
  const bent = (scale) => BENT[scale.type] ?? [(value) => value, (value) => value];

  // The part [from, to] in pixels of a scale's range.
  function part(scale, from, to) {
    if (!isBand(scale)) return [scale.invert(from), scale.invert(to)].sort((a, b) => a - b);
    const centres = scale.domain.map((value) => scale.apply(value) + scale.bandwidth / 2);
    const [low, high] = [Math.min(from, to), Math.max(from, to)];
    const inside = scale.domain.filter((_, index) => centres[index] + scale.bandwidth / 2 >= low && centres[index] - scale.bandwidth / 2 <= high);
    return inside.length ? inside : null;
  }

  // Options of a scale with the part of it that is shown.
  const cut = (options, shown) => (shown ? { ...options, domain: shown, nice: false } : options);

  // What `factor` (below 1 is nearer) and `move` (share of the width) make of a part of a scale.
  function changed(scale, all, factor, move) {
    if (isBand(scale)) {
      const [first, last] = [all.indexOf(scale.domain[0]), all.indexOf(scale.domain.at(-1))];
      const n = Math.min(all.length, Math.max(1, Math.round((last - first + 1) * factor)));
      const shift = Math.round(move * (last - first + 1)) || Math.sign(move);
      const start = Math.max(0, Math.min(all.length - n, Math.round((first + last + 1 - n) / 2) + shift));
      return n === all.length ? null : all.slice(start, start + n);
    }
    const [to, back] = bent(scale);
    const [low, high] = [scale.domain[0], scale.domain.at(-1)].map(to);
    const [middle, half] = [(low + high) / 2 + move * (high - low), ((high - low) / 2) * factor];
    return [back(middle - half), back(middle + half)];
  }

  function watch(drawing, frame, panel, ends) {
    const [x, y] = [drawing.scale("x"), drawing.scale("y")];
    const node = drawing.tagName.toLowerCase() === "svg" ? drawing : drawing.querySelector("svg");
    frame.scales[panel] = { x, y, ends };
    let start = null;
    let box = null;
    const place = (event) => {
      const outer = node.getBoundingClientRect();
      const scale = node.viewBox.baseVal.width / outer.width;
      const keep = (value, [from, to]) => Math.max(Math.min(from, to), Math.min(Math.max(from, to), value));
      return [keep((event.clientX - outer.left) * scale, x.range), keep((event.clientY - outer.top) * scale, y.range)];
    };
    const whole = (range, near, far) => (Math.abs(far - near) < LEAST ? [Math.min(...range), Math.max(...range)] : [Math.min(near, far), Math.max(near, far)]);
    node.addEventListener("pointerdown", (event) => {
      if (event.button === 0 && event.pointerType !== "touch") start = place(event);
    }, { capture: true }); // before Plot's own, which keeps it from others
    node.addEventListener("pointermove", (event) => {
      if (!start) return;
      const end = place(event);
      if (!box && Math.abs(end[0] - start[0]) < LEAST && Math.abs(end[1] - start[1]) < LEAST) return;
      if (!box) {
        box = svg("rect", { class: "zoom-box" });
        node.append(box);
        node.setPointerCapture(event.pointerId);
      }
      const [[left, right], [top, bottom]] = [whole(x.range, start[0], end[0]), whole(y.range, start[1], end[1])];
      for (const [name, value] of Object.entries({ x: left, y: top, width: right - left, height: bottom - top })) box.setAttribute(name, value);
    });
    node.addEventListener("pointerup", (event) => {
      const [from, end] = [start, place(event)];
      start = null;
      if (!box) return;
      node.addEventListener("click", (click) => click.stopImmediatePropagation(), { capture: true, once: true });
      box.remove();
      const view = frame.views[panel] ?? {};
      const along = (scale, name, index) => (Math.abs(end[index] - from[index]) < LEAST ? view[name] ?? null : part(scale, from[index], end[index]));
      setTimeout(() => frame.show(panel, { x: along(x, "x", 0), y: along(y, "y", 1) })); // after the click that is swallowed
    });
    node.addEventListener("pointercancel", () => {
      start = null;
      box?.remove();
      box = null;
    });
    node.addEventListener("dblclick", () => frame.reset());
  }

  // Nearer, farther, left or right, for all panels of a figure along x.
  function step(frame, factor, move) {
    frame.scales.forEach(({ x, ends }, panel) => {
      frame.views[panel] = { ...frame.views[panel], x: changed(x, ends, factor, move) };
    });
    frame.changed();
  }

  function buttons(title, frame) {
    const button = (text, label, act) => el("button", { type: "button", class: "icon", "aria-label": `${label}: ${title}`, title: label, on: { click: act } }, text);
    return [
      button("+", "Zoom in", () => step(frame(), 0.5, 0)), button("−", "Zoom out", () => step(frame(), 2, 0)),
      button("←", "Move left", () => step(frame(), 1, -0.25)), button("→", "Move right", () => step(frame(), 1, 0.25)),
      button("⟲", "Show all", () => frame().reset()),
    ];
  }
  return { watch, cut, buttons };
})();
