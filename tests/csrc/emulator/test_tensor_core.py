"""The emulator's tensor core against the PyTorch model, against fractions, and against itself at every level."""

from __future__ import annotations

import ctypes
import math
import struct
import time
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from deepseek_ops.reference.tensor_core import tensor_core_accumulate
from tests.csrc import building
from tests.csrc.emulator.planted import EMULATOR

DRIVER = Path(__file__).with_name("tensor_core_test.cpp")

E4M3, E5M2, BF16, F16 = range(4)  # hopper::Operand
NAMES = ("e4m3", "e5m2", "bf16", "f16")
PAIRS = ((E4M3, E4M3), (E5M2, E5M2), (E4M3, E5M2), (E5M2, E4M3), (BF16, BF16), (F16, F16))
LEVELS = ("scalar", "portable", "avx2", "avx512")
EXACT, FP32 = range(2)
MANTISSA = (3, 2, 7, 10)
EXPONENT = (4, 5, 8, 5)

pair_of_formats = pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{NAMES[p[0]]}-{NAMES[p[1]]}")


# ---- the library -----------------------------------------------------------------------------------------------


def build(source: Path, *extra: str) -> ctypes.CDLL:
    return building.library("tensor_core", [DRIVER, source], extra=extra, runtime=False)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build(EMULATOR / "tensor_core.cpp", *building.STRICT)


@pytest.fixture(autouse=True)
def default_level(request):
    yield
    if "library" in request.fixturenames:
        loaded = request.getfixturevalue("library")
        assert any(loaded.set_level(level) for level in (3, 2, 1))


def multiply(library, pair, a, b, c=None, mode=EXACT) -> np.ndarray:
    """fp32 bits [64, n] of one product; a, b codes, c fp32 bits or None for a cleared accumulator."""
    n = len(b)
    d = np.full((64, n), 0x7FBADBAD, np.uint32) if c is None else c.astype(np.uint32).copy()
    rows = [
        np.ascontiguousarray(x.astype(np.uint8 if f < BF16 else np.uint16))
        for x, f in zip((a, b), pair, strict=True)
    ]
    assert all(x.nbytes == 32 * len(x) for x in rows)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (*rows, d)]
    library.product(*pair, n, *pointers, int(c is not None), mode)
    return d


# ---- tiles -----------------------------------------------------------------------------------------------------


def steps(form: int) -> int:
    return 32 if form < BF16 else 16


def compose(form: int, sign, field, tail):
    return sign << (MANTISSA[form] + EXPONENT[form]) | field << MANTISSA[form] | tail


def codes(rng, form: int, rows: int, kind: str) -> np.ndarray:
    """Codes [rows, k] of one kind."""
    shape = (rows, steps(form))
    top, tails, bias = (1 << EXPONENT[form]) - 1, 1 << MANTISSA[form], (1 << (EXPONENT[form] - 1)) - 1
    sign, tail = rng.integers(0, 2, shape), rng.integers(0, tails, shape)
    finite_top = top if form == E4M3 else top - 1  # e4m3 has finite values in its last binade
    if kind == "any":
        field = rng.integers(0, top + 1, shape)
    elif kind == "special":  # in some rows
        rare = (rng.random((rows, 1)) < 0.3) & (rng.random(shape) < 0.1)
        field = np.where(rare, top, rng.integers(0, finite_top, shape))
        tail = np.where(rare, rng.choice([0, 0, tails - 1], shape), tail)
    elif kind == "subnormal":
        field = rng.integers(0, 2, shape)
    elif kind == "zeros":
        few = rng.random(shape) < 0.05
        field, tail = np.where(few, rng.integers(0, finite_top, shape), 0), np.where(few, tail, 0)
    elif kind == "full":  # one sign, largest significands: the sum is as large as it can be
        field, tail, sign = np.full(shape, bias), np.full(shape, tails - 1), np.zeros(shape, int)
    elif kind in ("tiny", "huge"):  # of a product of two, around the ends of the range
        middle, width = (-50, 15) if kind == "tiny" else (63, 4)
        field = np.clip(
            bias + middle + rng.integers(-width, width + 1, (rows, 1)) + rng.integers(-3, 4, shape),
            0,
            top - 1,
        )
    elif kind == "large":
        field = np.clip(finite_top - 1 - rng.integers(0, 31, shape), 0, None)
    elif kind == "wide":
        field = rng.integers(0, finite_top, shape)
    else:
        near = np.rint(rng.normal(-1, 1.5, shape)).astype(int)  # ordinary, cancel
        field = np.clip(bias + near, 0, top - 1)
    result = compose(form, sign, field, tail)
    if form == E4M3 and kind not in ("any", "special"):
        result = np.where((result & 127) == 127, result - 1, result)
    return result


def value_of(form: int, code: int) -> Fraction | float:
    """The value of a code; a float for infinities and NaN. form 4 is fp32."""
    mantissa, exponent_bits = (MANTISSA[form], EXPONENT[form]) if form < 4 else (23, 8)
    field = code >> mantissa & ((1 << exponent_bits) - 1)
    tail = code & ((1 << mantissa) - 1)
    sign = -1 if code >> (mantissa + exponent_bits) else 1
    last = field == (1 << exponent_bits) - 1
    if form == E4M3:
        if last and tail == 7:
            return math.nan
    elif last:
        return math.nan if tail else sign * math.inf
    bias = (1 << (exponent_bits - 1)) - 1
    size = Fraction(tail, 1 << mantissa) + (1 if field else 0)
    return sign * size * Fraction(2) ** (max(field, 1) - bias)


KINDS = (
    "any",
    "special",
    "ordinary",
    "cancel",
    "wide",
    "subnormal",
    "lopsided",
    "zeros",
    "full",
    "tiny",
    "huge",
)


def tile(seed: int, pair, n: int, kind: str):
    """a, b codes and c fp32 bits: each accumulator of another sort, some close to minus the sum of the products."""
    rng = np.random.default_rng([seed, *pair, n, KINDS.index(kind)])
    kinds = ("subnormal", "large") if kind == "lopsided" else (kind, kind)
    a, b = codes(rng, pair[0], 64, kinds[0]), codes(rng, pair[1], n, kinds[1])
    if kind == "cancel":  # products in pairs of opposite sign, some with another last bit
        a[:, 1::2] = a[:, ::2]
        flip = rng.random(b[:, ::2].shape) < 0.1
        b[:, 1::2] = b[:, ::2] ^ 1 << (MANTISSA[pair[1]] + EXPONENT[pair[1]]) ^ flip
    values = [decode(x, form) for x, form in zip((a, b), pair, strict=True)]
    with np.errstate(all="ignore"):
        dot = values[0] @ values[1].T
        close = (-dot * rng.choice([1, 1 + 2**-10, 1 - 2**-20, 0.5], dot.shape)).astype(np.float32)
        beside = (dot * 2.0 ** rng.integers(-30, 30, dot.shape)).astype(np.float32)
    any_bits = rng.integers(0, 1 << 32, dot.shape, dtype=np.uint32)
    sign = any_bits & np.uint32(1 << 31)
    sorts = [
        any_bits,
        close.view(np.uint32),
        beside.view(np.uint32),
        sign,  # zeros of both signs
        sign
        | (any_bits & np.uint32(0x7FFFFF)) >> rng.integers(0, 23, dot.shape, dtype=np.uint32),  # subnormal
        sign | np.uint32(0x7F000000) | (any_bits & np.uint32(0x7FFFFF)),  # largest finite
        np.where(
            any_bits & 6, beside.view(np.uint32), sign | np.uint32(0x7F800000) | (any_bits & np.uint32(1))
        ),
    ]
    if kind == "full":  # at the exponent of the products
        sorts.append(np.full(dot.shape, 0x3FFFFFFF, np.uint32))
    c = np.choose(rng.integers(0, len(sorts), dot.shape), sorts).astype(np.uint32)
    return a, b, c


@cache
def table_of(form: int) -> np.ndarray:
    return np.array([float(value_of(form, code)) for code in range(256)])


def decode(x, form: int) -> np.ndarray:
    """float64 values of codes."""
    if form < BF16:
        return table_of(form)[x]
    with np.errstate(invalid="ignore"):  # signalling NaN
        if form == BF16:
            return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return x.astype(np.uint16).view(np.float16).astype(np.float64)


# ---- the oracle in fractions -----------------------------------------------------------------------------------


def floor_log2(x: Fraction) -> int:
    guess = abs(x.numerator).bit_length() - x.denominator.bit_length()
    return guess if Fraction(2) ** guess <= abs(x) else guess - 1


@cache
def operand(form: int, code: int) -> tuple[Fraction | float, int]:
    """Value and exponent, not below the smallest of the format."""
    value = value_of(form, code)
    least = 2 - (1 << ((EXPONENT[form] if form < 4 else 8) - 1))
    return value, max(floor_log2(value), least) if isinstance(value, Fraction) and value else least


def oracle(pair, a, b, c: int) -> int:
    """fp32 bits of c + a . b, from the description of the model."""
    fraction_bits, mantissa_bits = (13, 13) if pair[0] < BF16 else (25, 23)
    left, right = [operand(pair[0], int(x)) for x in a], [operand(pair[1], int(x)) for x in b]
    addend = operand(4, c)
    if any(isinstance(v, float) for v, _ in (*left, *right, addend)):
        total = float(addend[0]) if isinstance(addend[0], float) else 0.0
        for (x, _), (y, _) in zip(left, right, strict=True):
            if isinstance(x, float) or isinstance(y, float):
                total += (
                    float(np.sign(float(x))) * float(y)
                    if isinstance(y, float)
                    else float(x) * float(np.sign(y))
                )
        return 0x7FFFFFFF if math.isnan(total) else 0x7F800000 if total > 0 else 0xFF800000
    terms = [(x * y, e + f) for (x, e), (y, f) in zip(left, right, strict=True)] + [addend]
    exponents = [e for value, e in terms if value]
    if not exponents:
        return 0
    unit = Fraction(2) ** (max(exponents) - fraction_bits)
    total = sum(math.trunc(value / unit) for value, _ in terms) * unit
    if total == 0:
        return 0
    exponent = floor_log2(total)
    if exponent > 127:
        return 0x7F800000 if total > 0 else 0xFF800000
    unit = Fraction(2) ** (max(exponent, -126) - mantissa_bits)
    result = math.trunc(total / unit) * unit  # an fp32 number
    return struct.unpack("<I", struct.pack("<f", float(result)))[0] if result else 0


@cache
def judged(pair, kind: str):
    """A tile with oracle results for some rows, with the accumulator and without."""
    n = 8
    a, b, c = tile(1, pair, n, kind)
    rows = range(0, 64, 7)
    with_c = [[oracle(pair, a[i], b[j], int(c[i, j])) for j in range(n)] for i in rows]
    without = [[oracle(pair, a[i], b[j], 0) for j in range(n)] for i in rows]
    return a, b, c, rows, np.array(with_c, np.uint32), np.array(without, np.uint32)


def agrees(library, pairs=PAIRS, kinds=KINDS) -> bool:
    for pair in pairs:
        for kind in kinds:
            a, b, c, rows, with_c, without = judged(pair, kind)
            if not np.array_equal(multiply(library, pair, a, b, c)[rows], with_c):
                return False
            if not np.array_equal(multiply(library, pair, a, b)[rows], without):
                return False
    return True


# ---- tests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_equals_the_fractions(library, level, kind):
    if not library.set_level(LEVELS.index(level)):
        pytest.skip(f"this machine has no {level}")
    assert agrees(library, kinds=(kind,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [E4M3, BF16], ids=["e4m3", "bf16"])
def test_chains_equal_the_pytorch_model(library, form, kind):
    pair = (form, form)
    tiles = [tile(seed, pair, 64, kind) for seed in range(4)]
    d = tiles[0][2]
    for a, b, _ in tiles:
        d = multiply(library, pair, a, b, d)
    cleared = multiply(library, pair, *tiles[0][:2])

    def tensor(x) -> torch.Tensor:
        if form == E4M3:
            return torch.from_numpy(x.astype(np.uint8)).view(torch.float8_e4m3fn)
        return torch.from_numpy(x.astype(np.uint16).view(np.int16)).view(torch.bfloat16)

    a, b = (tensor(np.concatenate([t[i] for t in tiles], axis=1)) for i in (0, 1))
    c = torch.from_numpy(tiles[0][2].view(np.int32)).view(torch.float32)
    model = tensor_core_accumulate(a, b, c)
    assert np.array_equal(model.view(torch.int32).numpy().view(np.uint32), d)
    first = tensor_core_accumulate(a[:, : steps(form)], b[:, : steps(form)])
    assert np.array_equal(first.view(torch.int32).numpy().view(np.uint32), cleared)


@pair_of_formats
def test_levels_give_the_same_bits(library, pair):
    levels = [i for i in range(len(LEVELS)) if library.set_level(i)]
    for seed, kind in enumerate(KINDS):
        for n in (8, 16, 24, 40, 64, 72, 128, 200, 256):
            a, b, c = tile(seed + 10, pair, n, kind)
            results = []
            for level in levels:
                library.set_level(level)
                results.append((multiply(library, pair, a, b), multiply(library, pair, a, b, c)))
            for other in results[1:]:
                assert np.array_equal(results[0], other), (kind, n)


@pair_of_formats
def test_a_small_product_after_a_large_one(library, pair):
    """Nothing of a wider tile is left in the columns beyond n."""
    a, b, c = tile(3, pair, 256, "any")
    multiply(library, pair, a, b, c)
    a, b, c = tile(3, pair, 8, "ordinary")
    first = multiply(library, pair, a, b, c)
    assert library.set_level(0)
    assert np.array_equal(first, multiply(library, pair, a, b, c))


@pair_of_formats
@pytest.mark.parametrize("level", LEVELS[1:])
def test_fp32_mode_is_a_chain_of_fp32_operations(library, pair, level):
    if not library.set_level(LEVELS.index(level)):
        pytest.skip(f"this machine has no {level}")
    for kind in ("ordinary", "cancel", "huge", "tiny", "special"):
        a, b, c = tile(4, pair, 40, kind)
        with np.errstate(invalid="ignore"):
            x, y = (decode(v, form).astype(np.float32) for v, form in zip((a, b), pair, strict=True))
        expected = c.view(np.float32).copy()
        with np.errstate(all="ignore"):
            for k in range(steps(pair[0])):
                expected += x[:, k : k + 1] * y[:, k]
        got = multiply(library, pair, a, b, c, FP32).view(np.float32)
        nan = np.isnan(expected)
        assert np.array_equal(np.isnan(got), nan)
        assert np.array_equal(got.view(np.uint32)[~nan], expected.view(np.uint32)[~nan]), kind


def test_levels_of_this_machine(library):
    best = library.level()
    assert LEVELS[best] != "scalar"
    assert library.set_level(1) and library.level() == 1
    for level in range(best + 1):
        assert library.set_level(level) and library.level() == level
    for level in range(best + 1, len(LEVELS)):
        assert not library.set_level(level) and library.level() == best


# What is planted, and the formats that must show it.
PLANTED = {
    "a bit more of every fp8 term": (
        "kFraction = kNarrow ? 13 : 25",
        "kFraction = kNarrow ? 14 : 25",
        (E4M3, E5M2),
    ),
    "a bit less of every bf16 term": (
        "kFraction = kNarrow ? 13 : 25",
        "kFraction = kNarrow ? 13 : 24",
        (BF16, F16),
    ),
    "one more mantissa bit": ("(total) & ~0x3ff", "(total) & ~0x1ff", (E4M3, E5M2)),
    "16-bit sums rounded": ("~((int64_t{1} << 29) - 1)", "~int64_t{0}", (BF16, F16)),
    "16-bit sum in 32 bits": ("sum[h][r][v] +=", "sum[0][r][v] +=", (BF16, F16)),
    "exponents of subnormals": ("std::max(field, 1) - f.bias()", "field - f.bias()", (E4M3, E5M2)),
    "exponents of bf16 subnormals": ("std::max(field, 1) - 1 +", "field - 1 +", (BF16,)),
    "zeros have an exponent": ("zero ? 0 : std::max(field, 1) - 1", "std::max(field, 1) - 1", (BF16,)),
    "fp8 zeros have an exponent": (
        "x.significand ? x.exponent - f.least()",
        "true ? x.exponent - f.least()",
        (E4M3,),
    ),
    "negative zero": ("(c & 0x7fffffff) == 0 ? Ints{} : c", "c", (E4M3, BF16)),
    "accumulator not cut": ("if (kNarrow) c &= ~0x3ff", "", (E4M3, E5M2)),
    "small exponents": ("127 - 100", "127 - 200", (BF16,)),
    "large exponents": ("127 + 125", "127 + 200", (BF16,)),
    "special accumulators": ("(c_exponent == 255) |", "", (E4M3, BF16)),
    "special rows of a": (" | of.a_special[i + r]", "", (E4M3, E5M2, BF16, F16)),
    "special rows of b": ("| *reinterpret_cast<const Ints*>(&of.b_special[at])", "", (E4M3, E5M2, BF16, F16)),
    "accumulator ignored in the alignment": (
        "exponent > c_exponent ? exponent : c_exponent",
        "exponent",
        (E4M3, BF16),
    ),
    "a term lost": (
        "k < (h + 1) * kSteps / kHalves",
        "k < (h + 1) * kSteps / kHalves - 1",
        (E4M3, E5M2, BF16, F16),
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_seen(name, tmp_path):
    right, wrong, forms = PLANTED[name]
    text = (EMULATOR / "tensor_core.cpp").read_text()
    assert text.count(right) == 1, "the planted error no longer fits the source"
    (tmp_path / "tensor_core.cpp").write_text(text.replace(right, wrong))
    library = build(tmp_path / "tensor_core.cpp", "-O0", "-w", f"-I{EMULATOR}")  # quick to compile
    assert library.set_level(1)
    for form in forms:
        assert not agrees(library, pairs=((form, form),)), NAMES[form]


@pytest.mark.parametrize(("form", "limit_us"), [(E4M3, 18), (BF16, 54)], ids=["e4m3", "bf16"])
def test_speed(library, form, limit_us):
    """m64n128 on this machine; the limit is four times the goal, because machines and their neighbours differ."""
    best_level = library.level()
    a, b, _ = tile(0, (form, form), 128, "ordinary")
    rows = [np.ascontiguousarray(x.astype(np.uint8 if form < BF16 else np.uint16)) for x in (a, b)]
    d = np.zeros((64, 128), np.float32)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (*rows, d)]
    best = math.inf
    for _ in range(50):
        start = time.perf_counter()
        for _ in range(4):
            library.product(form, form, 128, *pointers, 0, EXACT)
        best = min(best, (time.perf_counter() - start) / 4 * 1e6)
    print(f"m64n128 {NAMES[form]}: {best:.1f} us at level {LEVELS[best_level]}")
    if LEVELS[best_level] == "avx512":
        assert best < 4 * limit_us
