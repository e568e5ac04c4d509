"""SparseCode, W_dec -> reconstruction."""
