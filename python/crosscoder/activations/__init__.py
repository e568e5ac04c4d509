"""Activations of the same tokens in K snapshots: which snapshots, which tokens, collected, stored, loaded."""
