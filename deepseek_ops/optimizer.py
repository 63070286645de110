"""The optimizer step and what surrounds it: AdamW, gradient clipping, the parameter average (report 3.2.3, 3.3.3).

The report keeps the first and second moments in bf16, master weights and gradients in fp32, and an exponential
moving average of the parameters in host memory that is updated asynchronously after every step.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ._checks import ArgumentError, check_tensor, require
from ._registry import declare
from .reference import optimizer as reference

__all__ = ["CpuEma", "adamw_", "clip_grad_norm"]

_FLOATS = (torch.float32, torch.bfloat16)
_COPIES = ("q", "scale", "q_t", "scale_t")
_PIECE = 1 << 14  # elements; below ATen's threading grain: the worker never takes the training's cores

_adamw = declare(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] out, "
    "float[] weight_decay, float lr, float beta1, float beta2, float eps, int step, float grad_scale, "
    "Tensor? grad_scale_tensor, bool stochastic_rounding, int seed, int first_index) -> ()",
    reference=reference.adamw_,
    fake=lambda *args: None,
)

_adamw_quantize = declare(
    "adamw_quantize_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] out, "
    "Tensor(e!)[] q, Tensor(f!)[] scale, Tensor(g!)[] q_t, Tensor(h!)[] scale_t, "
    "float[] weight_decay, float lr, float beta1, float beta2, float eps, int step, float grad_scale, "
    "Tensor? grad_scale_tensor, bool stochastic_rounding, int seed, int first_index, bool pow2) -> ()",
    reference=reference.adamw_quantize_,
    fake=lambda *args: None,
)

Fp8Copies = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # q, scale, q_t, scale_t


def _fake_clip(grads: list[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    scalar = grads[0].new_empty((), dtype=torch.float32)
    return scalar, torch.empty_like(scalar)


_clip_grad_norm = declare(
    "clip_grad_norm(Tensor[] grads, float max_norm) -> (Tensor, Tensor)",
    reference=reference.clip_grad_norm,
    fake=_fake_clip,
)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.1,
    step: int,
    grad_scale: float | Tensor = 1.0,
    out: Sequence[Tensor] | None = None,
    fp8_out: Sequence[Fp8Copies | None] | None = None,
    fp8_pow2: bool = False,
    stochastic_rounding: bool = False,
    seed: int = 0,
    first_index: int = 0,
) -> None:
    """One AdamW step in place, for lists of tensors (any shapes and strides, empty ones too).

    params:       fp32 master weights, updated.
    grads:        fp32 or bf16, same shapes; read only.
    exp_avg, exp_avg_sq: fp32 or bf16 moments, updated. The update uses them before they are rounded to bf16.
    lr, beta1, beta2, eps: as published except eps, which the report does not give.
    weight_decay: decoupled; one number, or one per tensor (0 for the tensors that do not decay).
    step:         1 for the first step; bias correction is computed in double on the host.
    grad_scale:   multiplies every gradient (clipping, 1 / accumulation). An fp32 scalar tensor is read on its
                  device; if it is NaN or infinite the whole call changes nothing, which is how a non-finite
                  gradient is skipped without a host synchronisation (see `clip_grad_norm`).
    out:          bf16 model parameters that receive the new masters, rounded to nearest even.
    fp8_out:      for each tensor None, or ``(q, scale, q_t, scale_t)`` of a weight [N, K] or [G, N, K]: receive what
                  `quantize_128x128` makes of the new master and what `transpose_128x128` makes of that (None, None: not
                  wanted), in the step's own pass over memory. Where the step is skipped they receive copies of the
                  master as it is, so that they always hold its value after the call.
    fp8_pow2:     `quantize_128x128`'s pow2.
    stochastic_rounding: round bf16 moments stochastically (unbiased) instead of to nearest even. This matters for
                  beta2 close to 1, where one step's change of a moment is below half a bf16 ulp and is lost.
    seed, first_index: noise is a hash of (seed, step, position of the element in the concatenated list), so it does
                  not depend on how the list is cut; `first_index` is the position of this list's first element
                  (a ZeRO-1 shard passes its offset).

    Per element, each line one IEEE fp32 operation per operator, constants rounded from double::

        g = grad * grad_scale
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * (g * g)
        u = m / (sqrt(v) * (1 / sqrt(1 - beta2^step)) + eps) * (lr / (1 - beta1^step)) + (lr * weight_decay) * p
        p = p - u

    Raises `ArgumentError` before anything is modified.
    """
    count = len(params)
    lists = {"grads": grads, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if out is not None:
        lists["out"] = out
    for name, tensors in lists.items():
        require(len(tensors) == count, name, f"must have {count} tensors, as params", len(tensors))
    decays = [float(weight_decay)] * count if isinstance(weight_decay, (int, float)) else list(weight_decay)
    require(len(decays) == count, "weight_decay", f"must have {count} numbers, as params", len(decays))
    for i, decay in enumerate(decays):
        require(0.0 <= decay < math.inf, f"weight_decay[{i}]", "must be finite and not negative", decay)
    require(0.0 <= lr < math.inf, "lr", "must be finite and not negative", lr)
    require(0.0 <= beta1 < 1.0, "beta1", "must be in [0, 1)", beta1)
    require(0.0 <= beta2 < 1.0, "beta2", "must be in [0, 1)", beta2)
    require(0.0 < eps < math.inf, "eps", "must be finite and positive", eps)
    require(step >= 1, "step", "must be at least 1", step)
    require(0 <= seed < 1 << 63, "seed", "must be in [0, 2^63)", seed)
    require(first_index >= 0, "first_index", "must not be negative", first_index)
    scale_tensor = None
    if isinstance(grad_scale, Tensor):
        require(count == 0 or grad_scale.device == params[0].device, "grad_scale", "must be on the device of params", grad_scale.device)  # fmt: skip
        scale_tensor = check_tensor("grad_scale", grad_scale, dtype=torch.float32, shape=())
        grad_scale = 1.0
    else:
        require(math.isfinite(grad_scale), "grad_scale", "must be finite", grad_scale)
    for i, param in enumerate(params):
        check_tensor(f"params[{i}]", param, dtype=torch.float32, device=params[0].device)
        for name, tensors in lists.items():
            dtype = torch.bfloat16 if name == "out" else _FLOATS
            check_tensor(f"{name}[{i}]", tensors[i], dtype=dtype, shape=param.shape, device=param.device)
    copies = [] if fp8_out is None else _copies(params, fp8_out)
    if count == 0:
        return
    state = list(params), list(grads), list(exp_avg), list(exp_avg_sq), list(out or ())
    settings = (
        decays, float(lr), float(beta1), float(beta2), float(eps), step, float(grad_scale), scale_tensor,
        stochastic_rounding, seed, first_index,
    )  # fmt: skip
    if any(q.ndim != 1 for q, *_ in copies):
        _adamw_quantize(*state, *(list(part) for part in zip(*copies, strict=True)), *settings, fp8_pow2)
    else:
        _adamw(*state, *settings)


def _copies(params: Sequence[Tensor], fp8_out: Sequence[Fp8Copies | None]) -> list[tuple[Tensor, ...]]:
    """q, scale, q_t, scale_t of each parameter as the op takes them: an empty vector for what is not wanted."""
    require(
        len(fp8_out) == len(params), "fp8_out", f"must have {len(params)} entries, as params", len(fp8_out)
    )
    lists: list[tuple[Tensor, ...]] = []
    for i, (param, copies) in enumerate(zip(params, fp8_out, strict=True)):
        name, device = f"fp8_out[{i}]", param.device
        dtypes = (torch.float8_e4m3fn, torch.float32, torch.float8_e4m3fn, torch.float32)
        if copies is None:
            lists.append(tuple(torch.empty(0, dtype=dtype, device=device) for dtype in dtypes))
            continue
        require(len(copies) == 4, name, "must be q, scale, q_t, scale_t", f"{len(copies)} entries")
        require(
            param.ndim in (2, 3), f"params[{i}]", "must have 2 or 3 dimensions to be quantised", param.ndim
        )
        require(
            (copies[2] is None) == (copies[3] is None),
            name,
            "must have both q_t and scale_t or neither",
            "one of them",
        )
        *lead, rows, columns = param.shape
        row_tiles, column_tiles = -(-rows // 128), -(-columns // 128)
        shapes = ((rows, columns), (row_tiles, column_tiles), (columns, rows), (column_tiles, row_tiles))
        lists.append(
            tuple(
                torch.empty(0, dtype=dtype, device=device)
                if copy is None
                else check_tensor(f"{name}.{part}", copy, dtype=dtype, shape=(*lead, *shape), device=device)
                for part, copy, dtype, shape in zip(_COPIES, copies, dtypes, shapes, strict=True)
            )
        )
    return lists


def clip_grad_norm(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """L2 norm over all gradients and the factor that clips it; the gradients are not touched.

    grads:    tensors of any shape, fp32, bf16 or fp64, on one device.
    max_norm: positive; `math.inf` to measure only.

    Returns fp32 scalars on that device, without a host synchronisation: ``norm`` (fp64 sum of squares in an order
    that depends on the shapes alone, rounded once) and ``scale`` = max_norm / norm if norm > max_norm, else exactly
    1. When a gradient is Inf or NaN, norm is too and scale is NaN: give it to `adamw_`, which then skips the step.
    """
    require(max_norm > 0.0, "max_norm", "must be positive", max_norm)
    for i, grad in enumerate(grads):
        dtypes = (torch.float32, torch.bfloat16, torch.float64)
        check_tensor(f"grads[{i}]", grad, dtype=dtypes, device=grads[0].device)
    if not grads:
        return torch.zeros(()), torch.ones(())
    norm, scale = _clip_grad_norm(list(grads), float(max_norm))
    return norm, scale


class CpuEma:
    """Exponential moving average of parameters in host memory, updated off the training thread (report 3.2.3).

    ``shadow = decay * shadow + (1 - decay) * param`` in fp32, once per `update`. `update` copies the parameters into
    one of two host buffers and returns; a worker thread folds the buffers in, in order. The optimizer may overwrite
    the parameters as soon as `update` returns, and the result does not depend on timing. From a CUDA device the
    copy goes through pinned memory on a side stream, and the device's current stream waits for it (not the host).

    params: named fp32 or bf16 tensors, fp32 masters by preference: at a decay close to 1, bf16 hides small moves.
    decay:  in [0, 1); the report does not give it.

    An exception in the worker surfaces from the next call as a `RuntimeError`, and the average stays unusable.
    """

    def __init__(self, params: Mapping[str, Tensor], decay: float) -> None:
        require(0.0 <= decay < 1.0, "decay", "must be in [0, 1)", decay)
        self.decay = decay
        self._check(params)
        self._shadow = {
            n: p.detach().to("cpu", torch.float32, copy=True).contiguous() for n, p in params.items()
        }
        self._buffers: list[dict[str, Tensor]] = []
        self._pending: deque[Future[None]] = deque()
        self._updates = 0
        self._swapped = False
        self._stream: torch.cuda.Stream | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cpu-ema")

    @torch.no_grad()
    def update(self, params: Mapping[str, Tensor]) -> None:
        """Fold the present values of `params` in. Returns after the snapshot; blocks only if two are pending."""
        self._check(params)
        require(not self._swapped, "params", "must not be updated inside swap()", "an update")
        if len(self._pending) == 2:
            self._collect()
        if not self._buffers:
            self._buffers = [{n: _host_buffer(p) for n, p in params.items()} for _ in range(2)]
        buffer = self._buffers[0]
        self._buffers.reverse()
        copied = self._snapshot(params, buffer)
        self._updates += 1
        self._pending.append(self._worker.submit(self._fold, buffer, copied))

    def wait(self) -> None:
        """Block until every `update` has been folded in; raises what went wrong in the worker."""
        while self._pending:
            self._collect()

    def state_dict(self) -> dict[str, Tensor | dict[str, Tensor]]:
        """``{"updates": int64 scalar, "shadow": {name: fp32 tensor}}``, copies."""
        self.wait()
        shadow = {n: t.clone() for n, t in self._shadow.items()}
        return {"updates": torch.tensor(self._updates), "shadow": shadow}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue exactly from `state_dict()`; names and shapes must be this average's."""
        self.wait()
        shadow, updates = state.get("shadow"), state.get("updates")
        require(isinstance(shadow, Mapping), "shadow", "must be a mapping of tensors", type(shadow).__name__)
        check_tensor("updates", updates, dtype=torch.int64, shape=())
        self._check(shadow)  # type: ignore[arg-type]
        for name, tensor in shadow.items():  # type: ignore[attr-defined]
            check_tensor(f"shadow[{name!r}]", tensor, dtype=torch.float32)
        for name, tensor in shadow.items():  # type: ignore[attr-defined]
            self._shadow[name].copy_(tensor)
        self._updates = int(updates)  # type: ignore[call-overload]

    @contextlib.contextmanager
    def swap(self, params: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside the block `params` hold the average (rounded to their dtype); afterwards exactly what they held."""
        self._check(params)
        require(not self._swapped, "params", "must not be swapped twice", "a nested swap")
        self.wait()
        saved = {n: p.detach().clone() for n, p in params.items()}
        self._swapped = True
        try:
            with torch.no_grad():
                for name, param in params.items():
                    param.copy_(self._shadow[name])
            yield
        finally:
            with torch.no_grad():
                for name, param in params.items():
                    param.copy_(saved[name])
            self._swapped = False

    def _check(self, params: Mapping[str, Tensor]) -> None:
        shadow = getattr(self, "_shadow", None)
        if shadow is not None and params.keys() != shadow.keys():
            odd = sorted(params.keys() ^ shadow.keys())[:3]
            raise ArgumentError(
                f"params: must have the names of the average; got a difference in {', '.join(odd)}"
            )
        for name, param in params.items():
            shape = None if shadow is None else shadow[name].shape
            check_tensor(f"params[{name!r}]", param, dtype=_FLOATS, shape=shape)

    def _snapshot(self, params: Mapping[str, Tensor], buffer: dict[str, Tensor]) -> torch.cuda.Event | None:
        on_device = [p for p in params.values() if p.is_cuda]
        if not on_device:
            for name, param in params.items():
                buffer[name].copy_(param)
            return None
        device = on_device[0].device
        current = torch.cuda.current_stream(device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for name, param in params.items():
                buffer[name].copy_(param, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        current.wait_event(copied)  # the next optimizer step may not overtake the copy
        return copied

    def _fold(self, buffer: dict[str, Tensor], copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        with torch.no_grad():
            for name, shadow in self._shadow.items():
                for mean, value in zip(
                    shadow.view(-1).split(_PIECE), buffer[name].view(-1).split(_PIECE), strict=True
                ):
                    mean.mul_(self.decay).add_(value.float().mul(1.0 - self.decay))

    def _collect(self) -> None:
        try:
            self._pending[0].result()
        except Exception as error:  # kept in the queue: a broken average stays broken
            raise RuntimeError(f"CpuEma: the update in the background failed: {error}") from error
        self._pending.popleft()


def _host_buffer(param: Tensor) -> Tensor:
    return torch.empty(param.shape, dtype=param.dtype, pin_memory=param.is_cuda)
