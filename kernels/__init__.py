"""The operations of the training step, one folder each, every one with a dense twin that is its specification.

`encode` -> `decode` -> `code_grad` -> `transpose` -> `update`, and `threshold`. In each folder `reference.py` is plain
dense torch in any floating dtype (float64 included): short and obvious, the oracle of every faster path.

Letters: B tokens, K snapshots, D width of one activation, F features, N non-zero (token, feature) pairs.
"""
