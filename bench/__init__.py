"""Benchmarks: each states its floor and its baseline and runs the baseline in the same process."""
