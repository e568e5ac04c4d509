"""Training a crosscoder: the trainer, its schedules, start, revival and checkpoints, and a whole resumable run."""
