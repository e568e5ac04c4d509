// Binary blocks of the page: base64 -> gzip -> typed array, and codes back to numbers (see quantise.py).
const Decode = (() => {
  const TYPES = {
    uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, int16: Int16Array, int32: Int32Array, float32: Float32Array,
  };
  const supported = typeof DecompressionStream === "function";

  function fromBase64(text) {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const characters = atob(text);
    const bytes = new Uint8Array(characters.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
    return bytes;
  }

  async function buffer(id) {
    const node = byId(id);
    if (!node) throw new Error(`the file is incomplete: ${id} is missing`);
    const stream = new Blob([fromBase64(node.textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }

  const json = async (id) => JSON.parse(new TextDecoder().decode(await buffer(id)));
  const raw = async (description) => new TYPES[description.type](await buffer(description.block));

  // Value of each code: 256 or 65,536 of them.
  function valuesOfCodes({ type, low, high }) {
    const top = type === "uint8" ? 255 : 65535;
    return Float32Array.from({ length: top + 1 }, (_, code) => low + (code * (high - low)) / top);
  }

  // A matrix of codes that is read row by row.
  async function matrix(description) {
    const codes = await raw(description);
    const [, width] = description.shape;
    const values = description.low === undefined ? null : valuesOfCodes(description);
    return {
      width,
      at: (row, column) => (values ? values[codes[row * width + column]] : codes[row * width + column]),
      row(row) {
        const numbers = new Array(width);
        for (let column = 0; column < width; column++) numbers[column] = this.at(row, column);
        return numbers;
      },
    };
  }
  return { supported, json, raw, matrix };
})();
