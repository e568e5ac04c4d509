"""x, W_enc -> h, gates and the sparse code."""
