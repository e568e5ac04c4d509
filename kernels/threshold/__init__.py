"""The straight-through gradient of the thresholds."""
