"""Tensor maps and the geometry of TMA against a model written from the documents, one element at a time."""

from __future__ import annotations

import ctypes
import itertools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.csrc import building
from tests.csrc.building import ROOT
from tests.csrc.emulator.planted import EMULATOR

SOURCE = Path(__file__).with_name("tensor_map_test.cpp")

# In the order of hopper::Element, hopper::Reduce.
ELEMENTS = ("u8", "u16", "u32", "s32", "u64", "s64", "f16", "bf16", "f32", "f64")
BYTES = dict(zip(ELEMENTS, (1, 2, 4, 4, 8, 8, 2, 2, 4, 8), strict=True))
FLOATS = ("f16", "bf16", "f32", "f64")
REDUCTIONS = ("add", "min", "max", "inc", "dec", "and", "or", "xor")
SPANS = (0, 32, 64, 128)  # in the order of hopper::Swizzle
LOAD, STORE, REDUCE = range(3)
OOB_NAN = b"\xf7\x7f"


class FlatSpec(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p),
        ("sizes", ctypes.c_uint64 * 5),
        ("strides_bytes", ctypes.c_uint64 * 4),
        ("box", ctypes.c_uint32 * 5),
        ("element_strides", ctypes.c_uint32 * 5),
        ("element", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("swizzle", ctypes.c_int32),
        ("promotion", ctypes.c_int32),
        ("fill", ctypes.c_int32),
    )


def typed(library: ctypes.CDLL) -> ctypes.CDLL:
    for name in ("make_map", "make_map_2d", "make_map_shape", "decode_map", "copy_box", "legal"):
        if hasattr(library, name):
            getattr(library, name).restype = ctypes.c_char_p
    if hasattr(library, "load_nanoseconds"):
        library.load_nanoseconds.restype = ctypes.c_double
    return library


@pytest.fixture(scope="module")
def emulated() -> ctypes.CDLL:
    parts = [EMULATOR / f"{name}.cpp" for name in ("tensor_map", "reduction")]
    return typed(building.library("tensor_map", [SOURCE, *parts], extra=building.STRICT, runtime=False))


@pytest.fixture(scope="module")
def device() -> ctypes.CDLL:
    """make_tensor_map as the GPU build has it. Loading it proves that it needs no libcuda."""
    return typed(building.device_library("tensor_map_device", SOURCE))


@pytest.fixture(params=["emulated", "device"])
def target(request) -> ctypes.CDLL:
    return request.getfixturevalue(request.param)


def aligned(count: int, alignment: int = 128) -> np.ndarray:
    room = np.zeros(count + alignment, np.uint8)
    start = -room.ctypes.data % alignment
    return room[start : start + count]


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def numbers(values, count: int = 5, default: int = 0) -> tuple[int, ...]:
    return (*values, *[default] * (count - len(values)))


# ---- the model ---------------------------------------------------------------------------------------------


@dataclass
class Tensor:
    """A tensor with padding and canaries, and the map of it. Dimensions run from the contiguous one on."""

    element: str
    sizes: tuple[int, ...]
    box: tuple[int, ...]
    span: int = 0
    steps: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()  # units of 16 bytes behind each row, matrix, ...
    nan: bool = False
    seed: int = 1
    strides: list[int] = field(init=False)
    memory: np.ndarray = field(init=False)
    inside: np.ndarray = field(init=False)  # which bytes of the memory belong to the tensor
    map: np.ndarray = field(init=False)

    def __post_init__(self):
        self.width = BYTES[self.element]
        self.steps = self.steps or (1,) * len(self.sizes)
        padding = numbers(self.padding, 4)
        extent, self.strides = self.sizes[0] * self.width, []
        for i in range(1, len(self.sizes)):
            self.strides.append(-(-extent // 16) * 16 + 16 * padding[i - 1])
            extent = self.strides[-1] * self.sizes[i]
        self.before = 256
        self.memory = aligned(extent + 2 * self.before)
        self.memory[:] = np.random.default_rng(self.seed).integers(0, 256, self.memory.size)
        places = np.zeros((1,), np.int64)
        for size, stride in zip(self.sizes, (self.width, *self.strides), strict=True):
            places = places[..., None] + np.arange(size) * stride
        self.inside = np.zeros(self.memory.size, bool)
        self.inside[(self.before + places.reshape(-1, 1) + np.arange(self.width)).reshape(-1)] = True

    def spec(self) -> FlatSpec:
        s = FlatSpec()
        s.base = self.memory.ctypes.data + self.before
        s.sizes[:] = numbers(self.sizes)
        s.strides_bytes[:] = numbers(self.strides, 4)
        s.box[:] = numbers(self.box)
        s.element_strides[:] = numbers(self.steps, 5, 1)
        s.element, s.rank = ELEMENTS.index(self.element), len(self.sizes)
        s.swizzle, s.promotion, s.fill = SPANS.index(self.span), 3, int(self.nan)
        return s

    def made(self, library: ctypes.CDLL) -> Tensor:
        self.map = aligned(128)
        assert library.make_map(ctypes.byref(self.spec()), pointer(self.map)) == b""
        return self

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(-(-b // s) for b, s in zip(self.box, self.steps, strict=True))

    @property
    def box_bytes(self) -> int:
        return math.prod(self.counts) * self.width

    def pairs(self, at, address: int):
        """For every element of the box: where in shared memory, and where in `memory` or None."""
        pitch = max(self.counts[0] * self.width, self.span)
        rows = itertools.product(*(range(count) for count in reversed(self.counts[1:])))
        for number, outer in enumerate(rows):
            outer = tuple(reversed(outer))
            for i in range(self.counts[0]):
                coordinates = [a + k * s for a, k, s in zip(at, (i, *outer), self.steps, strict=True)]
                shared = swizzle(address + number * pitch + i * self.width, self.span)
                if all(0 <= c < size for c, size in zip(coordinates, self.sizes, strict=True)):
                    offset = sum(c * s for c, s in zip(coordinates, (self.width, *self.strides), strict=True))
                    yield shared, self.before + offset
                else:
                    yield shared, None

    def loaded(self, at, shared: np.ndarray, address: int) -> np.ndarray:
        result = shared.copy()
        fill = np.frombuffer(OOB_NAN * 8 if self.nan else bytes(16), np.uint8)[: self.width]
        for place, source in self.pairs(at, address):
            value = fill if source is None else self.memory[source : source + self.width]
            result[place : place + self.width] = value
        return result

    def stored(self, at, shared: np.ndarray, address: int) -> np.ndarray:
        result = self.memory.copy()
        for place, target in self.pairs(at, address):
            if target is not None:
                result[target : target + self.width] = shared[place : place + self.width]
        return result

    def copy(self, library, mode: int, at, shared: np.ndarray, address: int, op: int = 0) -> str:
        coordinates = (ctypes.c_int32 * 5)(*numbers(at))
        text = library.copy_box(
            pointer(self.map),
            mode,
            op,
            len(at),
            coordinates,
            pointer(shared),
            ctypes.c_uint32(address),
            ctypes.c_uint64(shared.size),
        )
        return text.decode()


def swizzle(address: int, span: int) -> int:
    """The guide's tables: in line y of 128 bytes, 16-byte chunk x goes to chunk x ^ (y mod span / 16)."""
    y, x, byte = address // 128, address % 128 // 16, address % 16
    return y * 128 + (x ^ (y % (span // 16) if span else 0)) * 16 + byte


def window(tensor: Tensor, address: int, seed: int = 2) -> np.ndarray:
    pitch = max(tensor.counts[0] * tensor.width, tensor.span)
    size = address + math.prod(tensor.counts[1:]) * pitch + 128
    shared = aligned(size, 1024)
    shared[:] = np.random.default_rng(seed).integers(0, 256, size)
    return shared


def check_both_ways(library, tensor: Tensor, at, address: int = 1024) -> None:
    tensor.made(library)
    shared, memory = window(tensor, address), tensor.memory.copy()
    expected = tensor.loaded(at, shared, address)
    assert tensor.copy(library, LOAD, at, shared, address) == ""
    assert np.array_equal(shared, expected)
    assert np.array_equal(tensor.memory, memory), "a load writes no tensor"
    assert library.map_box_bytes(pointer(tensor.map)) == tensor.box_bytes

    # Stored again by the same map, the tensor is what it was.
    assert tensor.copy(library, STORE, at, shared, address) == ""
    assert np.array_equal(tensor.memory, memory)

    # Other bytes reach the tensor's own elements only.
    shared = window(tensor, address, seed=3)
    untouched, expected = shared.copy(), tensor.stored(at, shared, address)
    assert tensor.copy(library, STORE, at, shared, address) == ""
    assert np.array_equal(tensor.memory, expected)
    assert np.array_equal(tensor.memory[~tensor.inside], memory[~tensor.inside])
    assert np.array_equal(shared, untouched), "a store writes no shared memory"


# ---- geometry ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_every_swizzle_and_element(emulated, span, element):
    columns = (span or 48) // BYTES[element]
    tensor = Tensor(element, (columns * 2 + 3, 21), (columns, 17), span)
    check_both_ways(emulated, tensor, (columns // 2, 3))


@pytest.mark.parametrize("span, row", [(span, row) for span in SPANS[1:] for row in range(16, span, 16)])
def test_rows_shorter_than_the_span_take_a_whole_span(emulated, span, row):
    tensor = Tensor("u8", (200, 20), (row, 11), span)
    check_both_ways(emulated, tensor, (5, 4))
    assert emulated.map_shared_extent(pointer(tensor.map)) == 11 * span


@pytest.mark.parametrize("address", range(1024, 2048, 128))
@pytest.mark.parametrize("span", (32, 64, 128))
def test_the_pattern_follows_the_absolute_address(emulated, span, address):
    check_both_ways(emulated, Tensor("bf16", (span, 12), (span // 2, 9), span), (3, 1), address)


PLACES = {
    "inside": (16, 8),
    "left": (-5, 3),
    "right": (59, 3),
    "above": (16, -5),
    "below": (16, 19),
    "corner": (-31, -7),
    "far corner": (63, 23),
    "one past": (64, 0),
    "one below": (0, 24),
    "whole box left": (-32, 0),
    "far": (2**31 - 1, 0),
    "farthest": (-(2**31), -(2**31)),
    "last": (2**31 - 1, 2**31 - 1),
}


@pytest.mark.parametrize("nan", (False, True))
@pytest.mark.parametrize("element", ("bf16", "f32", "f64"))
@pytest.mark.parametrize("at", PLACES.values(), ids=PLACES)
def test_over_the_edges(emulated, at, element, nan):
    box = (32, 8) if element == "bf16" else (16, 8)
    check_both_ways(emulated, Tensor(element, (64, 24), box, 64 if element != "f64" else 128, nan=nan), at)


def test_a_tensor_smaller_than_the_box(emulated):
    for at in ((0, 0), (-7, -3), (-12, -8)):
        check_both_ways(emulated, Tensor("bf16", (5, 3), (32, 16), 64, nan=True), at)


@pytest.mark.parametrize("element", FLOATS)
def test_the_nan_fill_is_nan(emulated, element):
    tensor = Tensor(element, (16,), (16,), nan=True).made(emulated)
    shared = window(tensor, 128)
    assert tensor.copy(emulated, LOAD, (100,), shared, 128) == ""
    filled = shared[128 : 128 + 16 * tensor.width]
    if element == "bf16":
        filled = (filled.view(np.uint16).astype(np.uint32) << 16).view(np.uint8)
    kind = {"f16": np.float16, "bf16": np.float32, "f32": np.float32, "f64": np.float64}[element]
    assert np.isnan(filled.view(kind)).all()


@st.composite
def copies(draw):
    element = draw(st.sampled_from(ELEMENTS))
    width = BYTES[element]
    rank = draw(st.integers(1, 5))
    span = draw(st.sampled_from(SPANS))
    unit = max(16 // width, 1)
    inner = unit * draw(st.integers(1, max((span or 96) // 16, 1)))
    box = (inner, *(draw(st.integers(1, (7, 4, 3, 3)[i])) for i in range(rank - 1)))
    steps = (1, *(draw(st.sampled_from((1, 1, 2, 3, 8))) for _ in range(rank - 1)))
    sizes = tuple(draw(st.integers(1, 2 * b + 5)) for b in box)
    padding = tuple(draw(st.integers(0, 2)) for _ in range(rank - 1))
    at = tuple(draw(st.integers(-b - 2, s + 2)) for b, s in zip(box, sizes, strict=True))
    nan = element in FLOATS and draw(st.booleans())
    address = 128 * draw(st.integers(0, 16))
    return Tensor(element, sizes, box, span, steps, padding, nan, seed=draw(st.integers(0, 99))), at, address


@given(copies())
def test_any_copy(emulated, case):
    check_both_ways(emulated, *case)


@pytest.mark.parametrize("rank", range(1, 6))
def test_element_strides(emulated, rank):
    steps = (1, 2, 3, 8, 2)[:rank]
    tensor = Tensor(
        "f32", (20, 9, 8, 11, 5)[:rank], (8, 5, 4, 9, 3)[:rank], 0, steps, (1, 0, 2, 1)[: rank - 1]
    )
    check_both_ways(emulated, tensor, (3, -1, 2, 1, 1)[:rank])
    assert tensor.counts == (8, 3, 2, 2, 2)[:rank]


def test_a_stride_of_zero_repeats_a_row(emulated):
    tensor = Tensor("u8", (64, 1), (64, 4))
    tensor.sizes, tensor.strides = (64, 4), [0]
    tensor.made(emulated)
    shared = window(tensor, 0)
    assert tensor.copy(emulated, LOAD, (0, 0), shared, 0) == ""
    assert np.array_equal(shared[:256].reshape(4, 64), np.tile(tensor.memory[256:320], (4, 1)))


def test_the_largest_sizes(emulated):
    """Coordinates are 32-bit: most of such a tensor is out of reach, the first elements are not."""
    tensor = Tensor("u8", (64, 2), (16, 2))
    spec = tensor.spec()
    spec.sizes[:] = (2**32, 2**32, 0, 0, 0)
    tensor.map = aligned(128)
    assert emulated.make_map(ctypes.byref(spec), pointer(tensor.map)) == b""
    shared = window(tensor, 0)
    assert tensor.copy(emulated, LOAD, (48, 0), shared, 0) == ""
    assert np.array_equal(shared[:32].reshape(2, 16), tensor.memory[256:384].reshape(2, 64)[:, 48:])


def test_the_three_ways_to_make_a_map_agree(emulated):
    tensor = Tensor("bf16", (100, 40), (64, 8), 128, padding=(1,)).made(emulated)
    numbers = [ctypes.c_uint64(x) for x in (40, 100, tensor.strides[0])]
    for make in (emulated.make_map_2d, emulated.make_map_shape):
        other = aligned(128)
        base = ctypes.c_void_p(tensor.memory.ctypes.data + tensor.before)
        assert make(base, ELEMENTS.index("bf16"), *numbers, 8, 64, 3, pointer(other)) == b""
        assert np.array_equal(other, tensor.map)
        text = make(base, ELEMENTS.index("bf16"), *numbers, 8, 72, 3, pointer(other)).decode()
        assert "box[0]: must be at most the 128-byte span of the swizzle; got 144 bytes" in text
    text = emulated.make_map_shape(
        base, 0, ctypes.c_int64(-1), ctypes.c_int64(64), ctypes.c_int64(64), 8, 64, 0, pointer(other)
    ).decode()
    assert "sizes[1]: must be 1 to 2^32 elements" in text


def test_speed(emulated):
    """A 128 x 128-byte box is 1024 pieces: 0.6 us inside, 1.3 us over a corner, so the limit leaves room."""
    tensor = Tensor("u8", (256, 256), (128, 128), 128).made(emulated)
    shared = window(tensor, 0)
    times = {}
    for name, at in (("inside", (64, 64)), ("ragged", (200, 200))):
        coordinates = (ctypes.c_int32 * 5)(*numbers(at))
        times[name] = emulated.load_nanoseconds(pointer(tensor.map), coordinates, pointer(shared), 200)
    print({name: f"{time:.0f} ns" for name, time in times.items()})
    assert times["inside"] < 20_000
    assert np.array_equal(shared, tensor.loaded((200, 200), shared, 0))


# ---- refusals ----------------------------------------------------------------------------------------------


def change(**changes):
    """A good spec (bf16, 128 x 64, box 64 x 8, 128-byte swizzle) with `field=value` or `field=(i, value)`."""
    tensor = Tensor("bf16", (128, 64), (64, 8), 128)
    spec = tensor.spec()
    for name, value in changes.items():
        if isinstance(value, tuple):
            getattr(spec, name)[value[0]] = value[1]
        else:
            setattr(spec, name, value)
    return tensor, spec


GOOD = 1 << 20
REFUSALS = {
    "rank 0": ({"rank": 0}, "rank: must be 1 to 5; got 0"),
    "rank 6": ({"rank": 6}, "rank: must be 1 to 5; got 6"),
    "base null": ({"base": None}, "base: must not be null: TMA has no empty tensors; got a null pointer"),
    "base": ({"base": GOOD + 8}, f"base: must be a multiple of 16 bytes; got {GOOD + 8:#x}"),
    "size 0": ({"sizes": (0, 0)}, "sizes[0]: must be 1 to 2^32 elements; got 0"),
    "size": ({"sizes": (1, 2**32 + 1)}, "sizes[1]: must be 1 to 2^32 elements; got 4294967297"),
    "stride": (
        {"strides_bytes": (0, 264)},
        "strides_bytes[0]: must be a multiple of 16 bytes (pad the rows); got 264",
    ),
    "stride long": (
        {"strides_bytes": (0, 2**40)},
        "strides_bytes[0]: must be less than 2^40 bytes; got 1099511627776",
    ),
    "box 0": ({"box": (1, 0)}, "box[1]: must be 1 to 256 elements; got 0"),
    "box": ({"box": (1, 257)}, "box[1]: must be 1 to 256 elements; got 257"),
    "box row": ({"box": (0, 12)}, "box[0]: must be a multiple of 16 bytes; got 24 bytes (12 elements)"),
    "span 128": (
        {"box": (0, 72)},
        "box[0]: must be at most the 128-byte span of the swizzle; got 144 bytes (72 elements)",
    ),
    "span 64": (
        {"swizzle": 2},
        "box[0]: must be at most the 64-byte span of the swizzle; got 128 bytes (64 elements)",
    ),
    "span 32": (
        {"swizzle": 1, "box": (0, 24)},
        "box[0]: must be at most the 32-byte span of the swizzle; got 48 bytes (24 elements)",
    ),
    "step 0": ({"element_strides": (1, 0)}, "element_strides[1]: must be 1 to 8 elements; got 0"),
    "step": ({"element_strides": (1, 9)}, "element_strides[1]: must be 1 to 8 elements; got 9"),
    "step of rows": (
        {"element_strides": (0, 2)},
        "element_strides[0]: must be 1: TMA cannot stride along dimension 0; got 2",
    ),
    "fill": (
        {"element": 1, "fill": 1},
        "fill: can be nan only for floating-point elements; got integer elements of 2 bytes",
    ),
    "element": ({"element": 10}, "element: must be a member of Element; got 10"),
    "swizzle": ({"swizzle": 4}, "swizzle: must be a member of Swizzle; got 4"),
    "promotion": ({"promotion": 4}, "promotion: must be a member of L2Promotion; got 4"),
    "fill member": ({"fill": 2}, "fill: must be a member of Fill; got 2"),
}


@pytest.mark.parametrize("changes, message", REFUSALS.values(), ids=REFUSALS)
def test_every_limit_has_a_sentence_on_both_targets(target, changes, message):
    _, spec = change(**changes)
    text = target.make_map(ctypes.byref(spec), pointer(aligned(128))).decode()
    assert text == f"invalid_argument: tensor map {message}"


def test_a_box_must_fit_shared_memory(target):
    tensor = Tensor("u8", (256,) * 2 + (4,), (256, 256, 4))
    text = target.make_map(ctypes.byref(tensor.spec()), pointer(aligned(128))).decode()
    assert text.endswith(
        "box: must fit the 232448 bytes of shared memory that a block can have; got 262144 bytes"
    )


def test_the_limits_themselves_are_allowed(emulated):
    for changes in (
        {"sizes": (0, 2**32)},
        {"sizes": (1, 1)},
        {"strides_bytes": (0, 2**40 - 16)},
        {"strides_bytes": (0, 0)},
        {"box": (1, 256)},
        {"box": (0, 8)},
        {"element_strides": (1, 8)},
        {"fill": 1},
        {"promotion": 0},
    ):
        _, spec = change(**changes)
        assert emulated.make_map(ctypes.byref(spec), pointer(aligned(128))) == b"", changes


def test_the_device_target_says_that_there_is_no_driver(device):
    _, spec = change()
    text = device.make_map(ctypes.byref(spec), pointer(aligned(128))).decode()
    if text == "":
        return  # a GPU is here: the driver took it
    assert text.startswith("runtime_error: tensor map: no CUDA driver"), text
    assert device.make_map(ctypes.byref(spec), pointer(aligned(128))).decode() == text, "asks again"


def test_garbage_is_no_map(emulated):
    tensor = Tensor("bf16", (128, 64), (64, 8), 128).made(emulated)
    assert emulated.decode_map(pointer(tensor.map)) == b""
    for bit in range(128 * 8):
        broken = aligned(128)
        broken[:] = tensor.map
        broken[bit // 8] ^= 1 << bit % 8
        text = emulated.decode_map(pointer(broken)).decode()
        if bit // 8 < 8:
            assert "was not made by make_tensor_map: it starts with 0x" in text
        else:
            assert "has changed since make_tensor_map made it" in text, bit
    assert "all zeros: it was left out" in emulated.decode_map(pointer(aligned(128))).decode()
    assert "is not at a multiple of 64 bytes" in emulated.decode_map(pointer(aligned(256)[32:])).decode()
    assert "is not at a multiple of 64 bytes" in emulated.decode_map(None).decode()
    noise = aligned(128)
    noise[:] = np.random.default_rng(0).integers(0, 256, 128)
    assert "was not made by" in emulated.decode_map(pointer(noise)).decode()


def test_an_instruction_must_match_its_map(emulated):
    tensor = Tensor("bf16", (128, 64), (64, 8), 128).made(emulated)
    shared = window(tensor, 1024)
    for at in ((0,), (0, 0, 0)):
        text = tensor.copy(emulated, LOAD, at, shared, 1024)
        assert text == f"the instruction has {len(at)} coordinate(s), the tensor map has rank 2"
    for address in (1025, 1040, 1088):
        text = tensor.copy(emulated, LOAD, (0, 0), shared, address)
        assert text == f"the box's address in shared memory, {address:#x}, is not a multiple of 128 bytes"


# ---- reductions --------------------------------------------------------------------------------------------

KINDS = dict(
    zip(ELEMENTS, ("u1", "u2", "u4", "i4", "u8", "i8", "f2", "u2", "f4", "f8"), strict=True)
)  # bf16 as bits
EVERYWHERE = {
    "add": {"u32", "s32", "u64", "f32", "f64", "f16", "bf16"},
    "min": {"u32", "s32", "u64", "s64", "f16", "bf16"},
    "inc": {"u32"},
    "and": {"u32", "s32", "u64", "s64"},
}  # PTX ISA 9.7.9.25.4.2, table of .global
GROUP = {
    "add": "add",
    "min": "min",
    "max": "min",
    "inc": "inc",
    "dec": "inc",
    "and": "and",
    "or": "and",
    "xor": "and",
}


def reduced(
    library, op: str, element: str, old: np.ndarray, new: np.ndarray, flush: bool = False
) -> np.ndarray:
    result = old.copy()
    library.reduce_bytes(
        REDUCTIONS.index(op),
        ELEMENTS.index(element),
        pointer(result),
        pointer(new),
        ctypes.c_uint64(old.nbytes),
        int(flush),
    )
    return result


def bf16_value(bits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaN
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def bf16_nearest(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bf16, ties to even: by looking among all of them."""
    codes = np.arange(0x7F81, dtype=np.uint16)
    grid = bf16_value(codes)
    grid[-1] = 2.0**128  # where infinity would lie if exponents went on
    size = np.minimum(np.abs(values), 2.0**128)
    high = np.clip(np.searchsorted(grid, size), 1, len(grid) - 1)
    low = high - 1
    to_low, to_high = size - grid[low], grid[high] - size
    up = (to_high < to_low) | ((to_high == to_low) & (high % 2 == 0))
    code = np.where(np.isnan(values), 0x7FFF, codes[np.where(up, high, low)])
    return (code | np.where(np.signbit(values) & ~np.isnan(values), 0x8000, 0)).astype(np.uint16)


def test_what_exists_is_what_the_isa_lists(emulated):
    for instruction, (op, element) in itertools.product(range(3), itertools.product(REDUCTIONS, ELEMENTS)):
        exists = element in EVERYWHERE[GROUP[op]]
        if instruction == 0 and op in ("min", "max"):  # red, atom: the 16-bit types only as vectors
            exists = exists and element not in FLOATS
        if instruction == 2:  # 9.7.9.25.5.3: no f64
            exists = exists and element != "f64"
        text = emulated.legal(instruction, REDUCTIONS.index(op), ELEMENTS.index(element)).decode()
        assert (text == "") == exists, (instruction, op, element, text)
        if text:
            name = ("red/atom", "cp.reduce.async.bulk", "cp.reduce.async.bulk.tensor")[instruction]
            assert text.startswith(f"{name} has no {op} of {element}, only of "), text


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("element", ("u32", "s32", "u64", "s64"))
def test_integers(emulated, op, element):
    kind = np.dtype(KINDS[element])
    limits = np.iinfo(kind)
    special = np.array([0, 1, 2, limits.max, limits.max - 1, limits.min, limits.min + 1, 7], kind)
    random = np.random.default_rng(0).integers(limits.min, limits.max, 500, kind, endpoint=True)
    old, new = np.repeat(special, 8), np.tile(special, 8)
    old, new = np.concatenate([old, random]), np.concatenate([new, random[::-1]])
    one = kind.type(1)
    with np.errstate(over="ignore"):
        expected = {
            "add": old + new,
            "min": np.minimum(old, new),
            "max": np.maximum(old, new),
            "inc": np.where(old >= new, 0, old + one),
            "dec": np.where((old == 0) | (old > new), new, old - one),
            "and": old & new,
            "or": old | new,
            "xor": old ^ new,
        }[op].astype(kind)
    if op in ("inc", "dec") and element != "u32":
        return
    assert np.array_equal(reduced(emulated, op, element, old, new), expected)


SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 1e-38, 3.4e38, -3.4e38, 65504, 6e-8]
)


def operands(kind, count: int = 20000) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    with np.errstate(over="ignore"):
        special = SPECIAL.astype(kind)
        values = (random.standard_normal(count) * 2.0 ** random.integers(-14, 15, count)).astype(kind)
        near = (values * (1 + random.integers(-2, 3, count) / 128)).astype(kind)
    n = len(SPECIAL)
    # All pairs of special values; near cancellation; and unlike sizes, among them ties.
    old = np.concatenate([np.repeat(special, n), values, values])
    return old, np.concatenate([np.tile(special, n), -near, np.roll(values, 1)])


@pytest.mark.parametrize("element", ("f32", "f64", "f16"))
def test_sums_round_to_nearest_even_and_keep_subnormals(emulated, element):
    old, new = operands(np.dtype(KINDS[element]))
    with np.errstate(all="ignore"):
        expected = old + new  # of numpy: f16 by way of f32 and its own rounding
    result = reduced(emulated, "add", element, old, new)
    assert np.array_equal(result, expected, equal_nan=True)
    assert np.array_equal(np.signbit(result)[~np.isnan(result)], np.signbit(expected)[~np.isnan(expected)])
    canonical = {"f32": 0x7FFFFFFF, "f16": 0x7FFF}
    if element in canonical:
        bits = result.view(np.uint32 if element == "f32" else np.uint16)
        assert set(bits[np.isnan(result)].tolist()) == {canonical[element]}


def test_subnormals_flush_where_the_isa_says_so(emulated):
    """PTX ISA 9.7.9.25.4.2 for add.f32: inputs and results, to a zero of their sign."""
    tiny = np.float32(1e-40)
    old = np.array([tiny, -tiny, -tiny, 1.5e-38, 1, -1.5e-38, np.inf, 2e-38], np.float32)
    new = np.array([tiny, tiny, -tiny, -1.2e-38, -tiny, 1.2e-38, -tiny, -tiny], np.float32)
    flushed = reduced(emulated, "add", "f32", old, new, flush=True)
    expected = np.array([0.0, 0.0, -0.0, 0.0, 1, -0.0, np.inf, 2e-38], np.float32)
    assert np.array_equal(flushed.view(np.uint32), expected.view(np.uint32))
    assert np.array_equal(reduced(emulated, "add", "f32", old, new), old + new)


def test_bf16_sums(emulated):
    old, new = (bf16_nearest(x.astype(np.float64)) for x in operands(np.float32))
    with np.errstate(all="ignore"):
        expected = bf16_nearest(bf16_value(old) + bf16_value(new))
    # -0 + x: the sign of an exact zero comes from the float64 sum, which has IEEE's rule
    assert np.array_equal(reduced(emulated, "add", "bf16", old, new), expected)


def test_bf16_sums_of_torch(emulated):
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(5).integers(0, 1 << 16, (2, 50000)).astype(np.uint16)
    a, b = (torch.from_numpy(x.copy().view(np.int16)).view(torch.bfloat16) for x in bits)
    expected = (a + b).view(torch.int16).numpy().view(np.uint16)
    result = reduced(emulated, "add", "bf16", bits[0].copy(), bits[1].copy())
    nan = np.isnan(bf16_value(expected))
    assert np.array_equal(result[~nan], expected[~nan])
    assert (result[nan] == 0x7FFF).all()


@pytest.mark.parametrize("element", ("f16", "bf16"))
@pytest.mark.parametrize("op", ("min", "max"))
def test_minimum_and_maximum_of_floats(emulated, element, op):
    """All pairs of some codes: a number beats NaN, NaN and NaN make the canonical NaN, -0 is less than +0."""
    special = [0, 0x8000, 1, 0x8001, 0x7C00, 0xFC00, 0x7F80, 0xFF80, 0x7FFF, 0xFFFF, 0x7FC0]
    codes = np.array([*special, *np.random.default_rng(1).integers(0, 1 << 16, 200)], np.uint16)
    old, new = np.repeat(codes, len(codes)), np.tile(codes, len(codes))
    value = bf16_value if element == "bf16" else lambda x: x.view(np.float16).astype(np.float64)
    a, b = value(old), value(new)
    with np.errstate(invalid="ignore"):
        a_wins = np.where(a == b, np.signbit(a) == (op == "min"), (a < b) == (op == "min"))
    a_wins = np.where(np.isnan(a), False, np.where(np.isnan(b), True, a_wins))
    expected = np.where(np.isnan(a) & np.isnan(b), 0x7FFF, np.where(a_wins, old, new)).astype(np.uint16)
    kind = np.dtype(KINDS[element])
    result = reduced(emulated, op, element, old.view(kind), new.view(kind)).view(np.uint16)
    assert np.array_equal(result, expected)


def test_f16_takes_every_value_through(emulated):
    """x + 0 is x for all 65536 codes but the NaN."""
    codes = np.arange(1 << 16, dtype=np.uint16)
    result = reduced(emulated, "add", "f16", codes.view(np.float16), np.full(1 << 16, -0.0, np.float16))
    nan = np.isnan(codes.view(np.float16))
    assert np.array_equal(result.view(np.uint16)[~nan], codes[~nan])


def test_an_atomic_returns_what_was_there(emulated):
    memory, value, old = np.array([5, 9], np.uint32), np.array([7], np.uint32), np.zeros(1, np.uint32)
    emulated.atomic_bytes(
        REDUCTIONS.index("add"), ELEMENTS.index("u32"), pointer(memory), pointer(value), pointer(old), 0
    )
    assert memory.tolist() == [12, 9] and old.tolist() == [5]
    emulated.atomic_bytes(
        REDUCTIONS.index("max"), ELEMENTS.index("u32"), pointer(memory), pointer(value), None, 0
    )
    assert memory.tolist() == [12, 9]


@pytest.mark.parametrize("element, op", (("f32", "add"), ("s32", "min"), ("bf16", "max"), ("u64", "xor")))
def test_a_tensor_reduction_is_a_store_that_reduces(emulated, element, op):
    tensor = Tensor(element, (50, 9), (32 // BYTES[element], 4), 32, (1, 2), (1,)).made(emulated)
    address, at = 1152, (45, -1)
    shared, memory = window(tensor, address), tensor.memory.copy()
    expected = memory.copy()
    kind = np.dtype(KINDS[element])
    for place, target_byte in tensor.pairs(at, address):
        if target_byte is not None:
            old = memory[target_byte : target_byte + tensor.width].copy().view(kind)
            new = shared[place : place + tensor.width].copy().view(kind)
            expected[target_byte : target_byte + tensor.width] = reduced(
                emulated, op, element, old, new
            ).view("u1")
    assert tensor.copy(emulated, REDUCE, at, shared, address, REDUCTIONS.index(op)) == ""
    assert np.array_equal(tensor.memory, expected)
    assert not np.array_equal(expected, memory)


def test_the_driver_is_never_linked():
    header = (ROOT / "csrc/hopper/tensor_map.h").read_text()
    assert not re.search(r"(?<!PFN_)\bcuTensorMapEncodeTiled\s*\(", header), "a call would need -lcuda"
