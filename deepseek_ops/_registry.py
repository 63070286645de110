"""The one place where ops are declared to torch.

An op is one declaration: schema, meaning (`reference`), shapes (`fake`), gradient (`save` and `backward`),
and the backends that implement it. From it we get `torch.ops.deepseek_ops.<name>`, fake tensors,
`torch.compile`, `torch.export` and `opcheck`.

Why autograd sits *outside* the op: a `torch.autograd.Function` around the op costs 6 us for a forward with
gradients and nothing without; `register_autograd` costs 6-14 us always (research/packaging.md section 2).
So calling an `Op` runs the plain op when no input needs a gradient, and the Function otherwise.

Why a call may skip torch's dispatcher: it costs 5 us for an op written in Python, which is more than the arithmetic of
a decoding step's smaller ops. Where the dispatcher could only choose the CPU kernel (plain CPU tensors, and nobody
who wants to see the op: `_unobserved`), the kernel is called directly; the result is the same by construction.

Backends: `reference` is pure PyTorch and always present. `cuda`, `emulated` and `checked` run the kernels of
`csrc/`: when a backend is first asked for, its native module is loaded and `_native_ops.attach` sets
`Op.kernels[backend]` of every op that it has a function for.

`modelled` is the reference with the bits that the kernels give: where a kernel's accumulation, order of a sum or
elementary function rounds differently from the fast PyTorch expression, `reference/modelled/` says the same in the
kernel's own steps. It is what kernels are compared with bit for bit; other ops run their reference.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from . import _toolchain
from ._checks import ArgumentError

BACKENDS = ("reference", "modelled", "emulated", "checked", "cuda")
LIBRARY = torch.library.Library("deepseek_ops", "FRAGMENT")
OPS: dict[str, Op] = {}
NO_KEYWORDS: Mapping[str, Any] = {}

_override: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar(
    "deepseek_ops_backend", default=()
)


class BackendError(RuntimeError):
    """The requested backend cannot run this op; the message says which, why, and how to get it."""


@contextlib.contextmanager
def backend(name: str, *others: str) -> Iterator[None]:
    """Run every op inside the block on `name`: "reference", "modelled", "emulated", "checked" or "cuda".

    An op that has no kernel there, or none for the dtypes it is called with, raises; with `others` it runs on the first
    of them that has one. ``backend("checked", "reference")`` so runs a whole model whose attention has no kernel yet.
    DEEPSEEK_OPS_BACKEND=checked,reference is the same for a process. Where tensors lie decides nothing here.

    Overrides that environment variable and the default choice (`cuda` for CUDA tensors on Hopper where a kernel exists,
    `reference` elsewhere). Raises `BackendError` at once if one of them is absent. The choice is per context (thread or
    task); autograd threads of a GPU see the default.
    """
    for each in (name, *others):
        _require_known(each)
        reason = absent_reason(each)
        if reason:
            raise BackendError(f"backend {each!r} is absent: {reason}")
    token = _override.set((name, *others))
    try:
        yield
    finally:
        _override.reset(token)


def _require_known(name: str) -> None:
    if name not in BACKENDS:
        raise ArgumentError(f"backend: must be one of {', '.join(BACKENDS)}; got {name!r}")


def wanted_backends() -> tuple[str, ...]:
    """The backends that the user asked for, by context or environment, first choice first; none: the default."""
    return _override.get() or _in_environment(os.environ.get("DEEPSEEK_OPS_BACKEND", ""))


@functools.cache
def _in_environment(value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(",")) if value else ()
    for name in names:
        _require_known(name)
    return names


@functools.cache
def absent_reason(name: str) -> str | None:
    """Why a backend is not here, with how to get it; None when it is present."""
    if name in ("reference", "modelled"):
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
        modelled: Callable[..., Any] | None = None,
    ) -> None:
        self.schema = schema
        self.name = schema.split("(", 1)[0].strip()
        self.kernels: dict[str, Callable[..., Any]] = {
            "reference": reference,
            "modelled": modelled or reference,
        }
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
        return self.plain(*args)

    def plain(self, *args: Any) -> Any:
        """The op without its gradient: what `raw` does, without the dispatcher where that decides nothing."""
        if _unobserved() and _all_plain(args):
            return self._call(self._chosen(args) or "reference", args)
        return self.raw(*args)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._choose(args), args, kwargs)

    def _call(self, backend: str, args: tuple[Any, ...], kwargs: Mapping[str, Any] = NO_KEYWORDS) -> Any:
        kernel = self.kernels[backend]
        if not torch.is_grad_enabled():
            return kernel(*args, **kwargs)
        # Below autograd: gradients come from the declaration alone, never from tracing a reference.
        with torch.no_grad():
            return kernel(*args, **kwargs)

    def _chosen(self, args: tuple[Any, ...]) -> str | None:
        """Which of the backends that the user asked for runs the op; None if they asked for none."""
        names = wanted_backends()
        for name in names:
            if name not in self.kernels and absent_reason(name):  # loads the module
                raise BackendError(self._why_not(name))
            if name in self.kernels and (len(names) == 1 or self._takes(name, args)):
                return name
        if names:
            raise BackendError("; ".join(self._why_not(name) for name in names))
        return None

    def _takes(self, name: str, args: tuple[Any, ...]) -> bool:
        """Whether a backend that has the op serves these dtypes."""
        if name in ("reference", "modelled"):
            return True
        from ._native_arguments import takes  # here: it needs the references

        return takes(self.name, args)

    def _why_not(self, name: str) -> str:
        reason = absent_reason(name)
        if name in self.kernels:
            reason = reason or "its kernel does not serve these dtypes"
        return f"backend {name!r} cannot run {self.name!r}: {reason or f'it has no kernel for {self.name!r} yet'}"

    def _choose(self, args: tuple[Any, ...]) -> str:
        name = self._chosen(args)
        if name:
            return name
        if any(t.is_cuda for t in tensors_of(args)):
            if absent_reason("cuda") is None and "cuda" in self.kernels and self._takes("cuda", args):
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
    modelled: Callable[..., Any] | None = None,
) -> Op:
    """Declare one op.

    schema:    torch schema, e.g. ``"scale(Tensor x, float by) -> Tensor"``. Mutated arguments are ``Tensor(a!)``.
    reference: the meaning, in pure PyTorch; takes the schema's arguments positionally and returns fresh tensors
               (an output never aliases an input).
    fake:      the same signature on fake tensors: output shapes and dtypes only.
    save:      ``save(ctx, inputs, outputs)`` keeps what backward needs (``ctx.save_for_backward``), and marks
               non-differentiable outputs.
    backward:  ``backward(ctx, *grads)`` returns one gradient (or None) for each input.
    modelled:  the reference with the kernel's bits, where the two differ (reference/modelled/).
    """
    op = Op(schema, reference, fake, save, backward, modelled)
    if op.name in OPS:
        raise RuntimeError(f"op {op.name!r} is declared twice")
    OPS[op.name] = op
    return op


def _plain_keys() -> frozenset[int]:
    """Dispatch keys of ordinary CPU tensors, as bits: with autograd, and made in inference mode."""
    with torch.inference_mode():
        inference = torch.empty(0, device="cpu")
    with torch.inference_mode(False):
        ordinary = torch.empty(0, device="cpu")
    return frozenset(torch._C._dispatch_keys(tensor).raw_repr() for tensor in (ordinary, inference))


_PLAIN_KEYS = _plain_keys()
_dispatch_keys = torch._C._dispatch_keys
_PLAIN_VALUES = frozenset((int, float, bool, str, type(None), torch.dtype))


def _all_plain(args: tuple[Any, ...]) -> bool:
    """Whether the dispatcher would take these arguments to the CPU kernel as they are.

    Other devices and layouts, conjugated and negated views, functorch's wrappers and subclasses with a dispatch of
    their own have other keys; subclasses that only have `__torch_function__` have another type. Lists are left to
    the dispatcher.
    """
    for value in args:
        kind = type(value)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            if _dispatch_keys(value).raw_repr() not in _PLAIN_KEYS:
                return False
        elif kind not in _PLAIN_VALUES:
            return False
    return True


def runs_reference(*tensors: torch.Tensor) -> bool:
    """Whether every op on these tensors would run its reference now, without a gradient and without an observer.

    A loop that calls many ops on small tensors may then call `deepseek_ops.reference` itself, until something changes:
    the functions are the same, and the 3 to 5 us that an op spends on arguments and dispatch are saved.
    """
    names = wanted_backends()
    return (
        (not names or names[0] == "reference")
        and not torch.is_grad_enabled()
        and _unobserved()
        and _all_plain(tensors)
    )


def _unobserved() -> bool:
    """Whether nothing asks to see ops go by: no compiler, tracer, mode (fake tensors), functorch or profiler."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def tensors_of(args: Iterable[Any]) -> Iterator[torch.Tensor]:
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
            outputs = op.plain(*args)
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
    reason = absent_reason("cuda") or "there is no CUDA kernel for this op and these dtypes"
    warnings.warn(
        f"deepseek_ops.{name} runs its PyTorch reference on CUDA tensors (slow): {reason}", stacklevel=4
    )
