"""Benchmarks of hypergrad: `python -m benchmarks` measures, `python -m benchmarks --quick` asserts counts."""
