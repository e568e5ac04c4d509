// Windows of text with tokens shaded by activation.
const ContextView = (() => {
  function words(context) {
    return context.tokens.map((token, index) => {
      // a window's first space would only indent its first line
      const text = index === 0 && token.share === 0 ? token.text.replace(/^ (?=\S)/, "") : token.text;
      const node = el("span", { class: token.share > 0 ? `tok on${index === context.peak ? " top" : ""}` : "tok" }, Format.inText(text));
      node.token = token;
      if (token.share > 0) node.style.setProperty("--a", token.share.toFixed(3));
      return node;
    });
  }

  function one(context, rank) {
    const strongest = context.tokens[context.peak]?.activation ?? 0;
    const from = [context.document, context.position >= 0 ? `token ${Format.count(context.position)}` : null].filter((part) => part !== null);
    return el("li", { class: "context" },
      el("div", { class: "context-head" }, el("span", { class: "rank" }, rank + 1), el("span", { class: "document" }, from.join(" · ")), el("span", { class: "strength" }, Format.number(strongest))),
      el("p", { class: "text" }, words(context)));
  }

  // Which tokens carry the activation, over all contexts of a feature.
  function mainTokens(contexts) {
    const sums = new Map();
    let total = 0;
    for (const context of contexts) {
      for (const { text, activation } of context.tokens) {
        if (activation === 0) continue;
        sums.set(text, (sums.get(text) ?? 0) + activation);
        total += activation;
      }
    }
    return [...sums].sort((a, b) => b[1] - a[1]).slice(0, 6).map(([text, sum]) => ({ text, share: sum / total }));
  }

  // One tooltip for all tokens, filled on demand.
  function watch(root) {
    const tooltip = byId("tooltip");
    const hide = () => (tooltip.hidden = true);
    root.addEventListener("pointerover", (event) => {
      const { token } = event.target;
      if (!token) return hide();
      tooltip.replaceChildren(el("code", {}, JSON.stringify(token.text)), el("span", {}, token.share > 0 ? Format.number(token.activation) : "not active"));
      tooltip.hidden = false;
      const box = event.target.getClientRects()[0];
      const [width, height] = [tooltip.offsetWidth, tooltip.offsetHeight];
      const left = Math.max(6, Math.min(innerWidth - width - 6, box.left + box.width / 2 - width / 2));
      tooltip.style.setProperty("left", `${left}px`);
      tooltip.style.setProperty("top", `${box.top - height - 6 > 0 ? box.top - height - 6 : box.bottom + 6}px`);
    });
    root.addEventListener("pointerleave", hide);
    addEventListener("scroll", hide, { capture: true, passive: true });
  }
  return { one, mainTokens, watch };
})();
