// Numbers and tokens as people read them.
const Format = (() => {
  const grouped = new Intl.NumberFormat("en-US");
  const count = (value) => grouped.format(value);
  const compactStep = (step) => {
    if (step >= 1e6) return `${+(step / 1e6).toPrecision(3)}M`;
    return step >= 1000 ? `${+(step / 1000).toPrecision(3)}k` : `${step}`;
  };
  const number = (value, digits = 3) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e5 || size < 1e-4) return value.toExponential(digits - 1).replace("e-", "e−").replace("e+", "e");
    return size >= 1000 ? count(Math.round(value)) : String(+value.toPrecision(digits)).replace("-", "−");
  };
  const percent = (share) => {
    if (share === null || share === undefined || Number.isNaN(share)) return "–";
    if (share === 0) return "0 %";
    const value = 100 * share;
    return value < 0.01 ? `${value.toExponential(0).replace("e-", "e−")} %` : `${+value.toPrecision(2)} %`;
  };

  // Characters that would be invisible or act on the layout get a picture.
  const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
  const picture = (character) => {
    const code = character.charCodeAt(0);
    return code < 0x20 ? String.fromCharCode(0x2400 + code) : `\\u${code.toString(16).padStart(4, "0")}`;
  };
  const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(CONTROL, picture);
  // In running text a newline is shown and obeyed, spaces stay spaces unless the token is nothing else.
  const inText = (text) => {
    if (text === "") return "∅";
    if (/^ +$/.test(text)) return "␣".repeat(text.length);
    return text.replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t").replace(CONTROL, picture);
  };
  // On its own, a leading or trailing space matters.
  const alone = (text) => (text === "" ? "∅" : visible(text).replace(/^ +| +$/g, (run) => "␣".repeat(run.length)));
  return { count, compactStep, number, percent, visible, inText, alone };
})();
