"""Experiments: the searches and tables behind the defaults; speed/ has the benchmarks."""
