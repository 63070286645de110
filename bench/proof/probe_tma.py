"""Cases for bench/probes/tma.cu: tensor copies by TMA and bulk copies (PTX ISA 9.7.9.25, cp.async.bulk.tensor)."""

from __future__ import annotations

import itertools

import numpy as np

from .probe_wgmma import SPANS, swizzled
from .probes import Array, Case

# hopper::Element, and what numpy calls it (bf16 travels as its bits)
ELEMENTS = ("u8", "u16", "u32", "s32", "u64", "s64", "f16", "bf16", "f32", "f64")
DTYPES = ("u1", "u2", "u4", "i4", "u8", "i8", "f2", "u2", "f4", "f8")
REDUCTIONS = ("add", "min", "max", "inc", "dec", "and", "or", "xor")  # hopper::Reduce

LOAD, STORE, MULTICAST, TENSOR_REDUCE, BULK_REDUCE, BULK_COPY = range(6)  # mode of tma.cu
CANARY = 0xA5


def _five(values: tuple[int, ...], fill: int) -> tuple[int, ...]:
    return (*values, *[fill] * (5 - len(values)))


def _parameters(
    mode: int, element: str, dims: tuple[int, ...], box: tuple[int, ...], at: tuple[int, ...], span: int = 0,
    nan_fill: bool = False, reduction: str = "add", cluster: int = 1,
) -> tuple[int, ...]:  # fmt: skip
    """Sizes run from the contiguous dimension on, as in the instruction."""
    return (
        mode, ELEMENTS.index(element), len(dims), *_five(dims, 1), *_five(box, 1), *_five(at, 0), SPANS.index(span),
        int(nan_fill), REDUCTIONS.index(reduction), cluster,
    )  # fmt: skip


def _size(element: str) -> int:
    return np.dtype(DTYPES[ELEMENTS.index(element)]).itemsize


def _numbered(element: str, dims: tuple[int, ...]) -> Array:
    """A tensor (slowest dimension first) whose bytes tell where they came from."""
    count = int(np.prod(dims))
    raw = np.random.default_rng(count).integers(0, 256, count * _size(element)).astype(np.uint8)
    if element in (
        "f16",
        "bf16",
        "f32",
        "f64",
    ):  # finite numbers only: copies must not depend on it, reductions do
        raw.reshape(-1, _size(element))[:, -1] &= 0x3F
    dtype = np.dtype(DTYPES[ELEMENTS.index(element)])
    result: Array = raw.view(dtype).reshape(tuple(reversed(dims)))
    return result


def _pitch(box: tuple[int, ...], size: int, span: int) -> int:
    """Bytes between rows of a box in shared memory: a swizzle wider than the box leaves the rest of its width unused.

    CUDA programming guide, "TMA swizzle": "if the swizzle width exceeds the inner dimension, ensure that the shared
    memory is allocated to accommodate the full swizzle width".
    """
    return max(box[0] * size, span)


def _box_index(box: tuple[int, ...], size: int, span: int) -> Array:
    """Byte address in shared memory of every element of the box, shaped slowest dimension first."""
    rows = np.arange(int(np.prod(box[1:]))) * _pitch(box, size, span)
    linear = rows[:, None] + np.arange(box[0]) * size
    return swizzled(linear, span).reshape(tuple(reversed(box)))


def _smem_bytes(box: tuple[int, ...], size: int, span: int) -> int:
    return -(-int(np.prod(box[1:])) * _pitch(box, size, span) // 1024) * 1024 + 1024


def _load(
    name: str, element: str, dims: tuple[int, ...], box: tuple[int, ...], at: tuple[int, ...], span: int = 0,
    nan_fill: bool = False,
) -> Case:  # fmt: skip
    tensor = _numbered(element, dims)
    size = _size(element)
    smem = np.full(_smem_bytes(box, size, span), CANARY, np.uint8)
    expected = smem.copy()
    if not nan_fill:  # which NaN fills is for silicon to say
        places = _box_index(box, size, span)
        for index in itertools.product(*(range(extent) for extent in places.shape)):
            source = [i + start for i, start in zip(index, reversed(at), strict=True)]
            inside = all(0 <= s < extent for s, extent in zip(source, tensor.shape, strict=True))
            value = tensor[tuple(source)].tobytes() if inside else bytes(size)
            expected[places[index] : places[index] + size] = np.frombuffer(value, np.uint8)
    return Case(
        name, _parameters(LOAD, element, dims, box, at, span, nan_fill), (tensor,), {"smem": smem},
        {} if nan_fill else {"smem": expected},
    )  # fmt: skip


def _store(
    name: str, element: str, dims: tuple[int, ...], box: tuple[int, ...], at: tuple[int, ...], span: int = 0
) -> Case:
    size = _size(element)
    image = np.random.default_rng(3).integers(0, 256, _smem_bytes(box, size, span)).astype(np.uint8)
    tensor = np.full(int(np.prod(dims)) * size, CANARY, np.uint8)
    expected = tensor.reshape(*reversed(dims), size).copy()
    places = _box_index(box, size, span)
    for index in itertools.product(*(range(extent) for extent in places.shape)):
        target = [i + start for i, start in zip(index, reversed(at), strict=True)]
        if all(0 <= t < extent for t, extent in zip(target, expected.shape[:-1], strict=True)):
            expected[tuple(target)] = image[places[index] : places[index] + size]
    return Case(
        name, _parameters(STORE, element, dims, box, at, span), (image,), {"tensor": tensor},
        {"tensor": expected.reshape(-1)},
    )  # fmt: skip


def tma_layout() -> list[Case]:
    """Loads and stores inside the tensor: every swizzle, element size, number of dimensions."""
    result = []
    for span in SPANS:
        for element in ("u8", "bf16", "f32", "u64"):
            width = (span or 64) // _size(element)
            result.append(
                _load(f"load-{element}-{span}", element, (2 * width, 40), (width, 24), (width, 9), span)
            )
            result.append(
                _store(f"store-{element}-{span}", element, (2 * width, 40), (width, 24), (width, 9), span)
            )
        half = (span or 64) // 4  # a box narrower than the span
        result.append(_load(f"load-narrow-{span}", "bf16", (2 * half, 32), (half, 16), (half, 8), span))
    sizes = ((256,), (32, 6), (32, 5, 4), (16, 5, 4, 3), (16, 4, 3, 3, 2))
    for dims in sizes:
        box = tuple(max(1, size // 2) if i else 16 for i, size in enumerate(dims))
        at = tuple(size - b for size, b in zip(dims, box, strict=True))
        result.append(_load(f"load-{len(dims)}d", "bf16", dims, box, at))
        result.append(_store(f"store-{len(dims)}d", "bf16", dims, box, at))
    result.append(_load("load-3d-128", "bf16", (64, 6, 4), (64, 3, 3), (0, 2, 1), 128))
    result.append(_store("store-3d-128", "bf16", (64, 6, 4), (64, 3, 3), (0, 2, 1), 128))
    data = np.random.default_rng(1).integers(0, 256, 4096).astype(np.uint8)
    result.append(
        Case(
            "bulk",
            _parameters(BULK_COPY, "u8", (4096,), (4096,), (0,)),
            (data,),
            {"out": np.zeros_like(data)},
            {"out": data},
        )
    )
    return result


def tma_bounds() -> list[Case]:
    """Boxes that stick out of the tensor, on every side and entirely; fill with zero and with NaN; clipped stores."""
    result = []
    places = {
        "left": (-8, 3),
        "right": (56, 3),
        "above": (16, -5),
        "below": (16, 19),
        "corner": (-16, -4),
        "far": (60, 22),
    }
    places |= {"outside": (64, 0), "outside-negative": (-32, 0), "far-negative": (0, -1000)}
    for element, span in (("u8", 32), ("bf16", 64), ("f32", 128), ("f32", 0)):
        for name, at in places.items():
            dims, box = (64, 24), (32, 8)
            tag = f"{element}-{span}-{name}"
            result.append(_load(f"load-{tag}", element, dims, box, at, span))
            if element in ("bf16", "f32"):
                result.append(_load(f"nan-{tag}", element, dims, box, at, span, nan_fill=True))
            result.append(_store(f"store-{tag}", element, dims, box, at, span))
    result.append(_load("nan-f16", "f16", (64, 24), (32, 8), (48, 20), 0, nan_fill=True))
    result.append(_load("load-half-outside", "bf16", (40, 24), (32, 8), (24, 0), 64))
    for rank in (3, 4, 5):
        sizes = (32, 4, 3, 3, 2)[:rank], (16, 2, 2, 2, 2)[:rank], (24, -1, 2, -1, 1)[:rank]
        result.append(_load(f"load-{rank}d", "bf16", *sizes))
        result.append(_load(f"nan-{rank}d", "bf16", *sizes, nan_fill=True))
    return result


def tma_multicast() -> list[Case]:
    """Each CTA of a cluster loads its slice of rows for all; every CTA dumps its shared memory."""
    result = []
    for cluster in (2, 4):
        for span in (0, 128):
            for partial in (False, True):  # partial: CTA r's slice goes to CTAs r and r + 1 only
                rows, width = 8 * cluster, 64
                tensor = _numbered("bf16", (width, rows))
                smem = np.full((cluster, rows * width * 2), CANARY, np.uint8)
                expected = smem.copy()
                index = _box_index((width, 8), 2, span)
                for r in range(cluster):
                    part = tensor[8 * r : 8 * r + 8].view(np.uint8).reshape(8, width, 2)
                    for target in [r, (r + 1) % cluster] if partial else range(cluster):
                        for byte in (0, 1):
                            expected[target, 8 * r * width * 2 + index + byte] = part[..., byte]
                parameters = _parameters(
                    MULTICAST, "bf16", (width, rows), (width, 8), (int(partial), 0), span, cluster=cluster
                )
                name = f"cluster{cluster}-{span}{'-partial' if partial else ''}"
                result.append(Case(name, parameters, (tensor,), {"smem": smem}, {"smem": expected}))
    return result


def _bf16(values: Array) -> Array:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _operand(element: str, seed: int) -> Array:
    """256 values in which rounding, subnormals, signed zeros, infinities and NaN occur."""
    random = np.random.default_rng(seed)
    if element in ("f16", "bf16", "f32", "f64"):
        values = (random.standard_normal(256) * 2.0 ** random.integers(-12, 13, 256)).astype(np.float32)
        special = np.array(
            [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 65504.0, 3.4e38, -3.4e38, 1e-40, -1e-40, 1e-38]
        )
        if seed % 2:
            values[:169] = np.repeat(special, 13).astype(np.float32)
        else:
            values[:169] = np.tile(special, 13).astype(np.float32)
        if element == "bf16":
            return _bf16(values)
        with np.errstate(over="ignore"):
            return values.astype(DTYPES[ELEMENTS.index(element)])
    return (
        random.integers(0, 256, 256 * _size(element)).astype(np.uint8).view(DTYPES[ELEMENTS.index(element)])
    )


def tma_reduce() -> list[Case]:
    """old <op> new at 256 places. Integer operations have an expected answer; silicon says how floats round."""
    tensor_ops = {
        "u32": ("add", "min", "max", "inc", "dec", "and", "or", "xor"), "s32": ("add", "min", "max"),
        "u64": ("add", "min", "max"), "s64": ("min", "max"), "f32": ("add",), "bf16": ("add", "min", "max"),
        "f16": ("add", "min", "max"),
    }  # fmt: skip
    bulk_ops = {  # what hopper::bulk_reduce has
        "u32": tensor_ops["u32"],
        "s32": tensor_ops["s32"],
        "u64": ("add",),
        "f32": ("add",),
        "f64": ("add",),
        "bf16": tensor_ops["bf16"],
        "f16": ("add",),
    }
    result = []
    for mode, table in ((TENSOR_REDUCE, tensor_ops), (BULK_REDUCE, bulk_ops)):
        for element, ops in table.items():
            for op in ops:
                old, new = _operand(element, 1), _operand(element, 2)
                name = f"{'tensor' if mode == TENSOR_REDUCE else 'bulk'}-{element}-{op}"
                expected = _reduce(old, new, op) if old.dtype.kind in "ui" and element != "bf16" else None
                parameters = _parameters(mode, element, (32, 8), (32, 8), (0, 0), reduction=op)
                result.append(
                    Case(
                        name, parameters, (new,), {"out": old}, {} if expected is None else {"out": expected}
                    )
                )
    return result


def _reduce(old: Array, new: Array, op: str) -> Array:
    """The PTX operations on integers; inc and dec wrap at the operand (red.inc, red.dec)."""
    one = old.dtype.type(1)
    results = {
        "add": lambda: old + new, "min": lambda: np.minimum(old, new), "max": lambda: np.maximum(old, new),
        "inc": lambda: np.where(old >= new, 0, old + one),
        "dec": lambda: np.where((old == 0) | (old > new), new, old - one),
        "and": lambda: old & new, "or": lambda: old | new, "xor": lambda: old ^ new,
    }  # fmt: skip
    with np.errstate(over="ignore"):
        answer: Array = results[op]().astype(old.dtype)
    return answer
