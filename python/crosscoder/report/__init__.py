"""The HTML page and the figures of a run: `PageData` in, one self-contained file out."""
