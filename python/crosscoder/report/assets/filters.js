// Which features are listed: kinds, ranges and the search. Ranges are in the units the reader sees.
const Filters = (() => {
  const NO_EMERGENCE = -1;
  // value(feature) of each filterable, sortable quantity; steps for snapshots
  const QUANTITIES = {
    emergence: { label: "Emergence", unit: "step", value: (f, d) => (d.emergence[f] === NO_EMERGENCE ? NaN : Store.steps[d.emergence[f]]) },
    peak: { label: "Peak", unit: "step", value: (f, d) => Store.steps[d.peak[f]] },
    lifetime: { label: "Lifetime", unit: "%", value: (f, d) => 100 * d.lifetime[f] },
    maxNorm: { label: "Max norm", unit: "", value: (f, d) => d.maxNorm[f] },
    rate: { label: "Fires on", unit: "% of tokens", value: (f, d) => 100 * d.rate[f] },
  };

  const empty = () => ({ kinds: null, ranges: {} });

  // Ids that pass, ascending. `found` is null or marks (1) what the search found.
  function apply(state, data, found) {
    const tests = [];
    if (state.kinds) {
      const allowed = data.kindNames.map((_, code) => state.kinds.has(code));
      tests.push((f) => allowed[data.kind[f]]);
    }
    for (const [name, [low, high]] of Object.entries(state.ranges)) {
      const { value } = QUANTITIES[name];
      // shown numbers are rounded: a bound typed as it is shown must include its feature
      const slack = (bound) => Math.abs(bound) * 1e-6 + 1e-12;
      tests.push((f) => {
        const number = value(f, data);
        return (low === null || number >= low - slack(low)) && (high === null || number <= high + slack(high));
      });
    }
    if (found) tests.push((f) => found[f] === 1);
    const ids = new Uint32Array(data.count);
    let n = 0;
    for (let f = 0; f < data.count; f++) if (tests.every((test) => test(f))) ids[n++] = f;
    return ids.slice(0, n);
  }

  // Sorts ids in place; features without a value come last either way, ties by id.
  function sort(ids, key, descending, data) {
    const keys = new Float64Array(data.count);
    const label = key === "token" ? tokenRanks(data) : null;
    for (const f of ids) {
      let value = f;
      if (label) value = label[f];
      else if (key === "kind") value = data.kind[f];
      else if (QUANTITIES[key]) value = QUANTITIES[key].value(f, data);
      keys[f] = Number.isNaN(value) ? Infinity : descending ? -value : value;
    }
    return ids.sort((a, b) => (keys[a] === keys[b] ? a - b : keys[a] < keys[b] ? -1 : 1));
  }

  // Alphabetical rank of each feature's top token, computed once.
  let ranks = null;
  function tokenRanks(data) {
    if (ranks) return ranks;
    const words = Store.contexts ? Store.contexts.vocabulary.map((text, id) => [text.trim().toLowerCase(), id]) : [];
    words.sort((a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : a[1] - b[1]));
    const rankOf = new Float64Array(words.length);
    words.forEach(([, id], rank) => (rankOf[id] = rank));
    ranks = Float64Array.from({ length: data.count }, (_, f) => (data.top && data.top[f] >= 0 ? rankOf[data.top[f]] : NaN));
    return ranks;
  }
  return { QUANTITIES, empty, apply, sort };
})();
