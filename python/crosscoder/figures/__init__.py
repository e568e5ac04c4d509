"""Figures as plain data: a table of columns (`table`) and how it is drawn (`spec`). Whoever has results makes them;
`crosscoder.report` draws them."""
