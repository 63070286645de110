"""Pipeline schedules as data: made, verified, simulated and drawn (report 3.2.1).

    schedule = generate("dualpipe", ranks=8, microbatches=20)
    verify(schedule, peak_chunks=9)
    timeline = simulate(schedule, Costs(pair=2.6), Link(latency=0.1))
    timeline.total, timeline.bubble, timeline.peak_chunks, timeline.critical_path

`python -m deepseek_ops.parallel.dualpipe` prints and draws them; docs/pipeline.md explains them.
"""

from .costs import Costs, Link, parse_costs
from .generate import NAMES, generate
from .schedule import Action, Kind, Message, Op, Pair, Schedule, ops
from .simulate import Span, Stuck, Timeline, simulate
from .verify import ScheduleError, verify

__all__ = [
    "NAMES",
    "Action",
    "Costs",
    "Kind",
    "Link",
    "Message",
    "Op",
    "Pair",
    "Schedule",
    "ScheduleError",
    "Span",
    "Stuck",
    "Timeline",
    "generate",
    "ops",
    "parse_costs",
    "simulate",
    "verify",
]
