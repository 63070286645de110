"""Tuples of tensors from one rank to another, their shapes and dtypes with them: no shape is agreed beforehand.

A message is a header of fixed size, which says what each tensor is, and the bytes of all of them. Sends go on by themselves;
`finish` waits for them. Every wait ends within the group's deadline, in an error that names the message.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._checks import require
from ..group import Group, Pending
from .schedule import Message, Schedule

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool,
          torch.float8_e4m3fn)  # fmt: skip
TENSORS, DIMENSIONS = 16, 8  # most in a message, most of a tensor
FIELDS = (
    3 + DIMENSIONS
)  # dtype (-1: no tensor here), whether its gradient is wanted, number of dimensions, sizes


class Mailbox:
    """What a rank sends and receives in a step."""

    def __init__(self, schedule: Schedule, group: Group) -> None:
        self.schedule, self.group = schedule, group
        self._sent: list[tuple[Pending, Tensor]] = []  # gloo reads the tensor until the wait

    def send(self, message: Message, tensors: Sequence[Tensor | None]) -> None:
        """Send on the message's channel, without waiting."""
        require(len(tensors) <= TENSORS, "outputs", f"at most {TENSORS} tensors per stage", len(tensors))
        header = torch.zeros(1 + TENSORS * FIELDS, dtype=torch.int64)
        header[0] = len(tensors)
        parts = []
        for place, tensor in enumerate(tensors):
            fields = header[1 + place * FIELDS :]
            fields[0] = -1
            if tensor is not None:
                require(
                    tensor.dtype in DTYPES, "outputs", "must be of a dtype that can be sent", tensor.dtype
                )
                require(tensor.ndim <= DIMENSIONS, "outputs", f"at most {DIMENSIONS} dimensions", tensor.ndim)
                fields[:3] = torch.tensor(
                    [DTYPES.index(tensor.dtype), int(tensor.requires_grad), tensor.ndim]
                )
                fields[3 : 3 + tensor.ndim] = torch.tensor(tensor.shape)
                parts.append(tensor.detach().reshape(-1).view(torch.uint8))
        body = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
        to, tag, phase = self.schedule.receiver(message), self._tag(message), f"sending {message}"
        self._sent.append((self.group.send(header, to, tag, phase=phase), header))
        if body.numel():
            self._sent.append((self.group.send(body, to, tag + 1, phase=phase), body))

    def receive(self, message: Message) -> tuple[Tensor | None, ...]:
        """Wait for a message. Tensors whose gradient the sender wants require one here."""
        source, tag, phase = self.schedule.sender(message), self._tag(message), f"receiving {message}"
        header = torch.zeros(1 + TENSORS * FIELDS, dtype=torch.int64)
        self.group.receive_into(header, source, tag, phase=phase).wait()
        rows = header[1:].view(TENSORS, FIELDS)[: int(header[0])].tolist()
        empty = [
            None if row[0] < 0 else torch.empty(row[3 : 3 + row[2]], dtype=DTYPES[row[0]]) for row in rows
        ]
        sizes = [0 if tensor is None else tensor.numel() * tensor.element_size() for tensor in empty]
        if not sum(sizes):
            return tuple(self._wanting(tensor, row[1]) for tensor, row in zip(empty, rows, strict=True))
        body = torch.empty(sum(sizes), dtype=torch.uint8)
        self.group.receive_into(body, source, tag + 1, phase=phase).wait()
        found: list[Tensor | None] = []
        for tensor, part, row in zip(empty, body.split(sizes), rows, strict=True):
            if tensor is not None:  # a copy of its own: a part of the body may lie where its dtype may not
                tensor.view(-1).view(torch.uint8).copy_(part)
            found.append(self._wanting(tensor, row[1]))
        return tuple(found)

    def finish(self) -> None:
        """Wait until everything that was sent has been taken."""
        while self._sent:
            self._sent.pop(0)[0].wait()

    @staticmethod
    def _wanting(tensor: Tensor | None, wanted: int) -> Tensor | None:
        return tensor if tensor is None else tensor.requires_grad_(bool(wanted))

    def _tag(self, message: Message) -> int:
        """One pair of tags per channel."""
        kind = 2 * message.direction + (message.tensor == "gradient")
        return 2 * (kind * self.schedule.stages + message.stage)
