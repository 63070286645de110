"""Running a schedule for real: modules instead of costs, processes instead of rows, with backward passes split as the ops say.

The executor does what its rank's list says and decides nothing itself. An op waits for what it needs, computes, and sends on; what
it must keep until its backward half comes is kept under (direction, stage, micro-batch) and let go of there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..._checks import require
from ..group import Group
from .mailbox import Mailbox
from .schedule import Kind, Message, Op, Pair, Schedule, ops
from .split_backward import Owed, backward_input
from .verify import verify

Tensors = tuple[Tensor | None, ...]
Key = tuple[int, int, int]  # direction, stage, micro-batch


def one_after_the_other(forward: Callable[[], None], backward: Callable[[], None]) -> None:
    """A pair without overlap; what `Executor` does unless it is told better."""
    forward()
    backward()


class Executor:
    """One rank of a pipeline, on gloo (NCCL has no tags, which keep the channels of a pair of ranks apart).

    stages: this rank's modules, in the order of `schedule.held(rank)`, rank being `group.index`. A module takes the tensors
    that the stage before returned (one or a tuple; at stage 0 what `step` is given) and may return shapes of its own.
    group: the pipeline's ranks, such as `mesh.pp`; its timeout bounds every wait.
    loss: `loss(*outputs, target)` -> scalar; the gradients are those of the sum over all micro-batches, so a mean is up to it.
    overlap: called for a pair with its two halves; must run both. What hides one's communication under the other comes in here.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Sequence[nn.Module],
        group: Group,
        *,
        loss: Callable[..., Tensor],
        overlap: Callable[[Callable[[], None], Callable[[], None]], None] = one_after_the_other,
    ) -> None:
        verify(schedule)
        require(
            group.size == schedule.ranks,
            "group",
            f"must have the schedule's {schedule.ranks} ranks",
            group.size,
        )
        held = schedule.held(group.index)
        rule = f"must be one module for each of (direction, stage) {', '.join(map(str, held))}"
        require(len(stages) == len(held), "stages", rule, f"{len(stages)} modules")
        self.schedule, self.group, self.loss, self.overlap = schedule, group, loss, overlap
        self.stages = dict(zip(held, stages, strict=True))
        self.peak_chunks = 0
        self._mailbox = Mailbox(schedule, group)
        self._alive: dict[Key, tuple[Tensors, tuple[Tensor, ...]]] = {}
        self._owed: dict[Key, Owed] = {}
        self._here: dict[Message, Tensors] = {}  # between two stages of this rank
        self._inputs: Sequence[Tensor | tuple[Tensor, ...]] = ()
        self._targets: Sequence[Tensor] = ()
        self._losses: list[Tensor] = []

    def step(
        self, inputs: Sequence[Tensor | tuple[Tensor, ...]] = (), targets: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """Run every op once; gradients are added to the parameters' `.grad`. Returns the losses that were computed here.

        inputs: where this rank holds a stage 0, one entry per micro-batch of that direction; targets: where it holds a
        last stage, likewise (in DualPipe rank 0 gets the inputs of direction 0 and the targets of direction 1).
        """
        last = self.schedule.stages - 1
        for name, given, stage in (("inputs", inputs, 0), ("targets", targets, last)):
            wanted = (
                self.schedule.microbatches_per_direction if any(s == stage for _, s in self.stages) else 0
            )
            rule = f"must be {wanted} on rank {self.group.index}, one per micro-batch of stage {stage}"
            require(len(given) == wanted, name, rule, len(given))
        self._inputs, self._targets, self._losses, self.peak_chunks = inputs, targets, [], 0
        for position, action in enumerate(self.schedule.orders[self.group.index]):
            try:
                self._do(action)
            except Exception as error:
                error.add_note(f"rank {self.group.index}, op {position}: {action}")
                raise
        self._mailbox.finish()
        return self._losses

    def reduce_mirrored(self) -> None:
        """DualPipe's two copies of each stage: both get the sum of both gradients, to the bit the same on both ranks.

        A layout that is replicated as well sums over all copies of a stage at once instead (`mesh.dense`, `mesh.expert`).
        """
        if self.schedule.directions == 1:
            return
        mirror = self.schedule.ranks - 1 - self.group.index
        tag = 8 * self.schedule.stages  # above those of the mailbox
        pending, sums = [], []
        for (direction, stage), module in sorted(self.stages.items(), key=lambda item: item[0][1]):
            phase = f"reducing the gradients of stage {stage}"
            for parameter in filter(lambda p: p.requires_grad, module.parameters()):
                mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
                other = torch.empty_like(mine)
                pending.append(self.group.send(mine, mirror, tag, phase=phase))
                pending.append(self.group.receive_into(other, mirror, tag, phase=phase))
                sums.append((parameter, mine, other) if direction == 0 else (parameter, other, mine))
        for wait in pending:
            wait.wait()
        for parameter, forth, back in sums:
            parameter.grad = forth + back

    def _do(self, action: Op | Pair) -> None:
        arrived = {op: self._receive(op) for op in ops(action)}  # a pair starts when both halves can
        sends: list[tuple[Message, Tensors]] = []

        def run(op: Op) -> None:
            made = self._compute(op, arrived[op])
            if message := self.schedule.sent(op):
                sends.append((message, made))

        if isinstance(action, Pair):
            self.overlap(lambda: run(action.forward), lambda: run(action.backward))
        else:
            run(action)
        for message, tensors in sends:
            if self.schedule.receiver(message) == self.group.index:
                self._here[message] = tensors
            else:
                self._mailbox.send(message, tensors)

    def _receive(self, op: Op) -> Tensors:
        message = self.schedule.received(op)
        if message is None:
            return ()
        if self.schedule.sender(message) != self.group.index:
            return self._mailbox.receive(message)
        return tuple(
            tensor if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad)
            for tensor in self._here.pop(message)
        )

    def _compute(self, op: Op, arrived: Tensors) -> Tensors:
        key = (op.direction, op.stage, op.microbatch)
        if op.kind is Kind.F:
            return self._forward(key, arrived)
        if op.kind is Kind.W:
            self._owed.pop(key).backward_weight()
            return ()
        inputs, outputs = self._alive.pop(key)
        gradients = arrived if op.stage < self.schedule.stages - 1 else (torch.ones_like(outputs[0]),)
        leaves = [tensor for tensor in inputs if tensor is not None]
        if op.kind is Kind.BI:
            results, self._owed[key] = backward_input(outputs, gradients, leaves)
        else:
            pairs = [
                (o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad and g is not None
            ]
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
            results = [tensor.grad for tensor in leaves]
        return tuple(results)

    def _forward(self, key: Key, arrived: Tensors) -> Tensors:
        direction, stage, microbatch = key
        if stage == 0:
            given = self._inputs[microbatch]
            arrived = tuple(tensor.detach() for tensor in (given if isinstance(given, tuple) else (given,)))
        result = self.stages[direction, stage](*arrived)
        outputs = result if isinstance(result, tuple) else (result,)
        if stage == self.schedule.stages - 1:
            outputs = (self.loss(*outputs, self._targets[microbatch]),)
            self._losses.append(outputs[0].detach())
        self._alive[key] = arrived, outputs
        self.peak_chunks = max(self.peak_chunks, len(self._alive) + len(self._owed))
        return outputs
