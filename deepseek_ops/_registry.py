"""The one place where ops are declared to torch.

An op is one declaration: schema, meaning (`reference`), shapes (`fake`), gradient (`save` and `backward`),
and the backends that implement it. From it we get `torch.ops.deepseek_ops.<name>`, fake tensors,
`torch.compile`, `torch.export` and `opcheck`.

Why autograd sits *outside* the op: a `torch.autograd.Function` around the op costs 6 us for a forward with
gradients and nothing without; `register_autograd` costs 6-14 us always (research/packaging.md section 2).
So calling an `Op` runs the plain op when no input needs a gradient, and the Function otherwise.

Backends: `reference` is pure PyTorch and always present. `cuda`, `emulated` and `checked` run the kernels of
`csrc/`: when a backend is first asked for, its native module is loaded and `_native_ops.attach` sets
`Op.kernels[backend]` of every op that it has a function for.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import _toolchain
from ._checks import ArgumentError

BACKENDS = ("reference", "emulated", "checked", "cuda")
LIBRARY = torch.library.Library("deepseek_ops", "FRAGMENT")
OPS: dict[str, Op] = {}

_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("deepseek_ops_backend", default=None)


class BackendError(RuntimeError):
    """The requested backend cannot run this op; the message says which, why, and how to get it."""


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the block on `name`: "reference", "emulated", "checked" or "cuda".

    Overrides the environment variable DEEPSEEK_OPS_BACKEND and the default choice (`cuda` for CUDA tensors on
    Hopper where a kernel exists, `reference` elsewhere). Raises `BackendError` at once if the backend is absent.
    The choice is per context (thread or task); autograd threads of a GPU see the default.
    """
    _require_known(name)
    reason = absent_reason(name)
    if reason:
        raise BackendError(f"backend {name!r} is absent: {reason}")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def _require_known(name: str) -> None:
    if name not in BACKENDS:
        raise ArgumentError(f"backend: must be one of {', '.join(BACKENDS)}; got {name!r}")


@functools.cache
def absent_reason(name: str) -> str | None:
    """Why a backend is not here, with how to get it; None when it is present."""
    if name == "reference":
        return None
    try:
        native = importlib.import_module(f"deepseek_ops._native.{name}")
    except ImportError as error:
        return _not_loaded(name, error)
    if not native.build_info()["kernels"]:
        return "the module is built, but it holds no kernels"
    from ._native_ops import attach  # here: it needs this module

    attach(name, native)
    if name == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device (or a torch build without CUDA)"
        if torch.cuda.get_device_capability() != (9, 0):
            return f"kernels are for sm_90a, this device is sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
    return None


def _not_loaded(name: str, error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError):
        problem = _toolchain.problem(name)
        again = "reinstall deepseek_ops" + (" with DEEPSEEK_OPS_CUDA=on" if name == "cuda" else "")
        return f"not built: {problem}; then {again}" if problem else f"not built, though it could be: {again}"
    if "GLIBCXX" in str(error) or "CXXABI" in str(error) or "libstdc++" in str(error):
        hint = "the C++ run-time library is missing or older than the compiler's: install libstdc++6, or reinstall here"
    else:
        hint = "it was built for another Python or machine: reinstall deepseek_ops here"
    return f"built, but it does not load ({error}); {hint}"


class Op:
    """One op of the library; create it with `declare`, call it like a function."""

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        save: Callable[..., None] | None,
        backward: Callable[..., Any] | None,
    ) -> None:
        self.schema = schema
        self.name = schema.split("(", 1)[0].strip()
        self.kernels: dict[str, Callable[..., Any]] = {"reference": reference}
        self.fake = fake
        LIBRARY.define(schema)
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(self.name, self._run, key)
        LIBRARY.impl(self.name, torch.library.fallthrough_kernel, "Autograd")  # gradients live in OpFunction
        torch.library.register_fake(f"deepseek_ops::{self.name}", fake, lib=LIBRARY)
        self.raw = getattr(torch.ops.deepseek_ops, self.name).default
        self._function = None if backward is None else _make_function(self, save, backward)

    def __call__(self, *args: Any) -> Any:
        if self._function is not None and torch.is_grad_enabled() and any(_needs_grad(a) for a in args):
            return self._function.apply(*args)
        return self.raw(*args)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        # Below autograd: gradients come from the declaration alone, never from tracing a reference.
        with torch.no_grad():
            return self.kernels[self._choose(args)](*args, **kwargs)

    def _choose(self, args: tuple[Any, ...]) -> str:
        name = _override.get() or os.environ.get("DEEPSEEK_OPS_BACKEND")
        if name:
            _require_known(name)
            if name not in self.kernels:
                reason = absent_reason(name)  # loads the module
                if name not in self.kernels:
                    reason = reason or f"it has no kernel for {self.name!r} yet"
                    raise BackendError(f"backend {name!r} cannot run {self.name!r}: {reason}")
            return name
        if any(t.is_cuda for t in _tensors(args)):
            if absent_reason("cuda") is None and "cuda" in self.kernels:
                return "cuda"
            _warn_no_kernel(self.name)
        return "reference"


def declare(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Op:
    """Declare one op.

    schema:    torch schema, e.g. ``"scale(Tensor x, float by) -> Tensor"``. Mutated arguments are ``Tensor(a!)``.
    reference: the meaning, in pure PyTorch; takes the schema's arguments positionally and returns fresh tensors
               (an output never aliases an input).
    fake:      the same signature on fake tensors: output shapes and dtypes only.
    save:      ``save(ctx, inputs, outputs)`` keeps what backward needs (``ctx.save_for_backward``), and marks
               non-differentiable outputs.
    backward:  ``backward(ctx, *grads)`` returns one gradient (or None) for each input.
    """
    op = Op(schema, reference, fake, save, backward)
    if op.name in OPS:
        raise RuntimeError(f"op {op.name!r} is declared twice")
    OPS[op.name] = op
    return op


def _tensors(args: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    """The tensors among the arguments, those in lists included."""
    for value in args:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, torch.Tensor))


def _needs_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _make_function(op: Op, save: Callable[..., None] | None, backward: Callable[..., Any]) -> Any:
    class OpFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            outputs = op.raw(*args)
            if save is not None:
                save(ctx, args, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    OpFunction.__name__ = OpFunction.__qualname__ = f"{op.name}_autograd"
    return OpFunction


@functools.cache
def _warn_no_kernel(name: str) -> None:
    reason = absent_reason("cuda") or "this op has no CUDA kernel yet"
    warnings.warn(
        f"deepseek_ops.{name} runs its PyTorch reference on CUDA tensors (slow): {reason}", stacklevel=4
    )
