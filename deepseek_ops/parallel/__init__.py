"""Parallelism of the report (section 3.2) on torch.distributed: layouts and meshes, expert parallelism, ZeRO-1, DualPipe.

Nothing is imported here; take what you need from its module. docs/parallel.md has the pictures.
"""
