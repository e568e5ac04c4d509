// All data of the page. The overview is there at once; features are decoded after the first paint.
const Store = (() => {
  const overview = JSON.parse(byId("overview-data").textContent);
  const described = overview.features ?? null;
  const steps = overview.steps;
  let contextsState = null;

  const features = described && {
    count: described.count,
    kindNames: described.kindNames,
    kindCounts: described.kindCounts,
    threshold: described.threshold,
    neighbourNote: described.neighbourNote,
  };

  async function load() {
    if (!Decode.supported) {
      throw new Error("this browser cannot unpack the features (it has no DecompressionStream): please use a newer one");
    }
    for (const [name, description] of Object.entries(described.arrays)) {
      features[name] = description.shape.length === 2 ? await Decode.matrix(description) : await Decode.raw(description);
      await breathe();
    }
    if (described.contexts) contextsState = await loadContextIndex(described.contexts);
    return features;
  }

  async function loadContextIndex(description) {
    const [vocabulary, documents] = [await Decode.json(description.vocabulary), await Decode.json(description.documents)];
    const counts = await Decode.raw(description.count);
    const start = new Uint32Array(counts.length + 1);
    for (let feature = 0; feature < counts.length; feature++) start[feature + 1] = start[feature] + counts[feature];
    features.top = await Decode.raw(description.top);
    return {
      length: description.length,
      padding: description.padding,
      vocabulary,
      documents,
      start,
      document: await Decode.raw(description.document),
      position: await Decode.raw(description.position),
      parts: description.parts.map((part) => ({ ...part, loaded: null, unpacked: null })),
    };
  }

  // Tokens and codes of one part, unpacked once.
  function part(index) {
    const entry = contextsState.parts[index];
    entry.loaded ??= Promise.all([Decode.raw(entry.tokens), Decode.raw(entry.codes)]).then(([tokens, codes]) => {
      entry.unpacked = { start: entry.start, stop: entry.stop, tokens, codes };
      return entry.unpacked;
    });
    return entry.loaded;
  }

  const partOf = (row) => contextsState.parts.findIndex((entry) => row < entry.stop);

  // Unpacks all parts, one at a time, so that lists and searches need not wait.
  async function loadParts(progress) {
    for (let index = 0; index < (contextsState?.parts.length ?? 0); index++) {
      await part(index);
      await breathe();
      progress();
    }
  }

  // Around the strongest token of a feature's first context: {before, token, after}, or null while that is not unpacked.
  function snippet(feature) {
    if (!contextsState) return null;
    const { start, length, padding, vocabulary, parts } = contextsState;
    const row = start[feature];
    if (row === start[feature + 1]) return null;
    const unpacked = parts[partOf(row)].unpacked;
    if (!unpacked) return null;
    const offset = (row - unpacked.start) * length;
    let peak = 0;
    for (let i = 1; i < length; i++) if (unpacked.codes[offset + i] > unpacked.codes[offset + peak]) peak = i;
    const text = (from, to) => {
      let joined = "";
      for (let i = Math.max(0, from); i < Math.min(length, to); i++) {
        if (unpacked.tokens[offset + i] !== padding) joined += vocabulary[unpacked.tokens[offset + i]];
      }
      return joined;
    };
    return { before: text(peak - 16, peak), token: text(peak, peak + 1), after: text(peak + 1, peak + 12) };
  }

  // The contexts of a feature, the strongest first: [{tokens: [{id, text, activation, share}], peak, document, position}].
  async function contextsOf(feature) {
    if (!contextsState) return [];
    const { length, padding, vocabulary, documents, document: names, position, start } = contextsState;
    const contexts = [];
    for (let row = start[feature]; row < start[feature + 1]; row++) {
      const { tokens, codes, start: first } = await part(partOf(row));
      const words = [];
      let peak = 0;
      for (let offset = (row - first) * length, end = offset + length; offset < end; offset++) {
        if (tokens[offset] === padding) continue;
        const share = codes[offset] / 255;
        words.push({ id: tokens[offset], text: vocabulary[tokens[offset]], share, activation: share * features.maxActivation[feature] });
        if (share > words[peak].share) peak = words.length - 1;
      }
      contexts.push({ tokens: words, peak, document: names[row] < 0 ? null : documents[names[row]], position: position[row] });
    }
    return contexts;
  }

  const topToken = (feature) => {
    const token = features.top ? features.top[feature] : -1;
    return token < 0 ? null : contextsState.vocabulary[token];
  };

  return {
    overview, steps, features, load, loadParts, contextsOf, snippet, topToken, part,
    get contexts() {
      return contextsState;
    },
  };
})();
