"""What several rooms share: named arrays, tables, statistics, the text of byte-level tokens, SVG figures."""
