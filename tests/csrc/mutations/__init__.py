"""Kernels for mutation runs, a module each family: `kernels()` gives them, the one with most steps first."""
