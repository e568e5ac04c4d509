"""Token-major code -> feature-major code."""
