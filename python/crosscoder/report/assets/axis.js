// The step axis: one choice, log or linear, for every figure. "Log" is log(1 + step), so that step 0 has its place.
const Axis = (() => {
  const listeners = new Set();
  let mode = "log";

  const [bend, unbend] = [Math.log1p, Math.expm1];
  const position = (step) => (mode === "log" ? bend(step) : step);

  function ticksFor(first, last, width) {
    if (mode === "linear") return d3.ticks(first, last, Math.max(2, Math.min(7, Math.floor(width / 80))));
    const ticks = [0, 1, 10, 100, 1000, 10000, 100000, 1000000].filter((tick) => tick >= first && tick <= last);
    return ticks.length > 1 ? ticks : [first, last];
  }

  // Between powers of ten a zoomed log axis needs ticks of its own: round steps, evenly spread over the width.
  function zoomedTicks([first, last], width) {
    const most = Math.max(2, Math.min(7, Math.floor(width / 80)));
    if (mode === "linear" || bend(last) - bend(Math.max(first, 0)) < 1.5) return d3.ticks(first, last, most);
    return roundTicks(first, last, most, [0]);
  }
  // 1, 2, 5, 10, ... between first and last, or the powers of ten alone where those are too many
  function roundTicks(first, last, most, before = []) {
    const powers = d3.range(-6, 9);
    const between = (digits) => [...before, ...powers.flatMap((power) => digits.map((digit) => +`${digit}e${power}`))].filter((tick) => tick >= first && tick <= last);
    const [fine, coarse] = [between([1, 2, 5]), between([1])];
    if (fine.length < 2) return d3.ticks(first, last, most);
    return fine.length <= most + 2 || coarse.length < 2 ? fine : coarse;
  }

  // x scale and x axis of a Plot whose x is a training step
  function scale(steps) {
    const [first, last] = [steps[0], steps.at(-1)];
    const domain = [first, last === first ? first + 1 : last];
    return mode === "linear" ? { type: "linear", domain } : { type: "symlog", constant: 1, domain };
  }
  // the x axis of a figure, or of the part [first, last] of it that is shown
  const marks = (steps, width, shown = null) => Plot.axisX(shown ? zoomedTicks(shown, width) : ticksFor(steps[0], steps.at(-1), width), {
    tickFormat: Format.compactStep, label: "training step →", labelArrow: false, stroke: null, color: "var(--axis)",
  });

  // x of each snapshot in [0, width], for sparklines
  function spread(steps, width) {
    const [low, high] = [position(steps[0]), position(steps.at(-1))];
    return steps.map((step) => (high > low ? ((position(step) - low) / (high - low)) * width : width / 2));
  }

  function show() {
    for (const name of ["log", "linear"]) byId(`axis-${name}`).setAttribute("aria-pressed", String(name === mode));
  }
  function set(next) {
    if (next === mode) return;
    mode = next;
    show();
    for (const listener of listeners) listener();
  }
  return {
    bend, unbend, scale, marks, roundTicks, spread, set, show,
    toggle: () => set(mode === "log" ? "linear" : "log"),
    onChange: (listener) => listeners.add(listener),
    get mode() {
      return mode;
    },
  };
})();
