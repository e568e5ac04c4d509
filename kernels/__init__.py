"""The operations of the training step, one folder each.

`encode` -> `decode` -> `transpose` -> `update`, and `threshold`. In each folder `reference.py`, where there is one, is
the operation in plain dense torch, in any floating dtype (float64 included); `native.py` is the C++ path for CPUs,
`triton.py` the one for GPUs. `SparseCode` is what passes between them. `crosscoder/backends/` puts them together, and
its `README.md` says what is compared with what.

Letters: B tokens, K snapshots, D width of one activation, F features, N non-zero (token, feature) pairs.
"""
