"""Benchmarks; a package, so that `python -m benchmarks.gpu` finds this one and no other."""
