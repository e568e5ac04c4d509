"""The ways to compute a training step: dense torch, C++ on a CPU, Triton on a GPU."""
