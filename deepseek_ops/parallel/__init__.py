"""Training on many ranks: pipeline schedules, expert parallelism, meshes. Import the part that you use."""
