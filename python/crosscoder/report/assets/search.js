// Finding features by the text of their contexts. A word may be cut into several tokens: the match runs over tokens.
const Search = (() => {
  const FULL = 1;
  const BEGINS = 2;

  // What the reader typed: an id, a text, or nothing. Quotes keep spaces and force text.
  function parse(input) {
    const text = input.trim();
    if (text === "") return { type: "none" };
    const quoted = /^"(.+?)"?$/s.exec(text);
    if (quoted) return { type: "text", text: quoted[1].toLowerCase() };
    if (/^#?\d+$/.test(text)) return { type: "id", digits: text.replace("#", "") };
    return { type: "text", text: text.toLowerCase() };
  }

  // For each token: does it hold the query, or may the query begin in it and go on in the next?
  function tokenTable(vocabulary, query) {
    const role = new Uint8Array(vocabulary.length + 1);
    const overlaps = new Map();
    const lower = vocabulary.map((text) => text.toLowerCase());
    lower.forEach((text, id) => {
      if (text.includes(query)) {
        role[id] = FULL;
        return;
      }
      const lengths = [];
      for (let length = Math.min(text.length, query.length - 1); length > 0; length--) {
        if (text.endsWith(query.slice(0, length))) lengths.push(length);
      }
      if (lengths.length) {
        role[id] = BEGINS;
        overlaps.set(id, lengths);
      }
    });
    return { role, overlaps, lower };
  }

  // Position after the last token of a match that begins at `offset`, or 0.
  function matchEnd(tokens, offset, end, query, table, padding) {
    if (table.role[tokens[offset]] === FULL) return offset + 1;
    for (const length of table.overlaps.get(tokens[offset])) {
      let rest = query.slice(length);
      for (let next = offset + 1; next < end && tokens[next] !== padding; next++) {
        const text = table.lower[tokens[next]];
        if (text.startsWith(rest)) return next + 1;
        if (!rest.startsWith(text)) break;
        rest = rest.slice(text.length);
      }
    }
    return 0;
  }

  // Marks (1) features with `query` in a context; if `firing`, a token of the match must be active.
  async function featuresWithText(query, firing, isCurrent) {
    const found = new Uint8Array(Store.features.count);
    const contexts = Store.contexts;
    if (!contexts) return found;
    const { length, padding, start, parts, vocabulary } = contexts;
    const table = tokenTable(vocabulary, query);
    let feature = 0;
    for (let index = 0; index < parts.length; index++) {
      const { tokens, codes, start: first, stop } = await Store.part(index);
      if (!isCurrent()) return null;
      for (let row = first; row < stop; row++) {
        while (row >= start[feature + 1]) feature++;
        if (found[feature]) continue;
        const end = (row - first + 1) * length;
        for (let offset = end - length; offset < end; offset++) {
          if (!table.role[tokens[offset]]) continue;
          const last = matchEnd(tokens, offset, end, query, table, padding);
          if (!last) continue;
          let active = !firing;
          for (let at = offset; at < last && !active; at++) active = codes[at] > 0;
          if (active) {
            found[feature] = 1;
            break;
          }
        }
      }
      await breathe();
    }
    return found;
  }
  return { parse, featuresWithText };
})();
