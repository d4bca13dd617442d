"""Compare ports with this implementation: float64 oracle, traces, first divergence, mutants."""
