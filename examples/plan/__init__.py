"""A planner: what a training run costs on a cluster that one does not have (yet).

    python -m examples.plan 671b --gpus 2048 --hardware h800

`hardware` holds every assumption with its source, `model_costs` counts FLOPs and bytes of a layer, `stages` cuts the model
into pipeline stages, `memory` and `step` make bytes per GPU and seconds per step of them, `search` ranks layouts, `run`
puts days and dollars on it, `page` writes and draws. Nothing here runs a model; docs/scaling.md shows what comes out.
"""
