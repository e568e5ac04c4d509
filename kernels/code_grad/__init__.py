"""residual, W_dec -> the reconstruction loss's gradient for the N pairs of a code."""
