"""The proof on hardware behind `python -m bench.prove`: one module per idea.

families/     the kernel families, one file each: shapes, steps, claims; a new one is found by being there
steps         what a step is
claims        what a claim is, and how data is judged
plan          the budget of minutes, what fits and what does not
runner        runs a plan: deadlines, failures, the journal and the ledger after every step
worker        what runs inside the process of one step
journal       finished steps, one JSON line each, so that a killed run goes on where it stopped
ledger        the machine-readable result and its schema
page          docs/hardware.md from all ledger files
device        what touches the machine: processes with a deadline, clocks, the GPU's name (tests replace it)
revision      which source was proven: commit and digest of the tree
machine       what is noted about the machine, what is built there
gpu_tests     runs the tests marked `gpu`
builds        compiles probes by nvcc for the device and by g++ for the emulator
probes        runs a probe on either, compares, keeps golden vectors
probe_*       the cases of the probes
micro         two questions about the SM
measure       timing: cold L2, repeats, percentiles
rows          rows of a benchmark: rates, right or wrong, in words; the command line that benchmarks share
memory_bound  ops bound by memory, measured beside a copy: bench/{quantize,moe,norm,activation,optimizer}.py
vendor        what others make of our FP8 operands
ceilings      what the card gives without us
"""
