"""What all benchmarks share: measuring, situations to measure in, opponents, results."""
