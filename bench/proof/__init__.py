"""The proof on hardware behind `python -m bench.prove`: one module per idea.

device        what touches the machine: processes with a deadline, clocks, the GPU's name (tests replace it)
revision      which source was proven: commit and digest of the tree
plan          steps, the budget of minutes, what fits and what does not
journal       finished steps, one JSON line each, so that a killed run goes on where it stopped
runner        runs a plan: deadlines, failures, the journal and the ledger after every step
ledger        the machine-readable result and its schema
claims        every claim that silicon has to confirm, in one place
page          docs/hardware.md from all ledger files
steps         the steps there are
worker        what runs inside the process of one step
builds        compiles probes by nvcc for the device and by g++ for the emulator
probes        runs a probe on either, compares, keeps golden vectors
probe_*       the cases of the probes
measure       timing: cold L2, repeats, percentiles
benchmarks    kernels beside their baselines
"""
