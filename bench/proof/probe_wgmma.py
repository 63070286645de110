"""Cases for bench/probes/wgmma.cu: fragments, operand layouts, numerics of wgmma.mma_async (PTX ISA 9.7.15).

One launch runs `tiles` independent products D[64, n] = A[64, K] B[n, K]^T (+ C), one per block, each as `steps`
wgmmas on shared memory that is given byte by byte, so that every descriptor field is under test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .probes import Array, Case

E4M3, E5M2, BF16, F16 = range(4)  # hopper::Operand
K_MAJOR, MN_MAJOR = range(2)  # hopper::Major
SPANS = (0, 32, 64, 128)  # bytes of a swizzle pattern, by hopper::Swizzle
NAMES = ("e4m3", "e5m2", "bf16", "f16")
STEP = (32, 32, 16, 16)  # K of one wgmma
SIZE = (1, 1, 2, 2)  # bytes of an element
M = 64

# Instances that wgmma.cu compiles: (format, n, A in registers, A major, B major); keep both lists alike.
FRAGMENT_N = tuple(range(8, 257, 8))


# ---- number formats ------------------------------------------------------------------------------------------------


def encode(values: Array, form: int) -> Array:
    """Codes of values that the format holds exactly; AssertionError for others."""
    values = np.asarray(values, dtype=np.float64)
    if form == BF16:
        codes = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    elif form == F16:
        codes = values.astype(np.float16).view(np.uint16)
    else:
        table = decode_table(form)
        finite = np.flatnonzero(np.isfinite(table))
        order = finite[np.argsort(table[finite], kind="stable")]
        place = np.searchsorted(table[order], values)
        codes = order[np.minimum(place, len(order) - 1)].astype(np.uint8)
        codes = np.where(values == 0, 0, codes).astype(np.uint8)
    assert np.array_equal(decode(codes, form), values)
    return codes


def decode(codes: Array, form: int) -> Array:
    """float64 values of codes."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        if form == BF16:
            return (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        if form == F16:
            return codes.astype(np.uint16).view(np.float16).astype(np.float64)
    return decode_table(form)[codes]


def decode_table(form: int) -> Array:
    """The 256 values of an 8-bit format."""
    mantissa_bits, bias = (3, 7) if form == E4M3 else (2, 15)
    codes = np.arange(256)
    exponent = (codes & 127) >> mantissa_bits
    fraction = (codes & ((1 << mantissa_bits) - 1)) / 2.0**mantissa_bits
    value = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))
    if form == E4M3:
        value = np.where((codes & 127) == 127, np.nan, value)
    else:
        value = np.where(exponent == 31, np.where(fraction == 0, np.inf, np.nan), value)
    return np.where(codes >= 128, -value, value)


# ---- where elements lie --------------------------------------------------------------------------------------------


def swizzled(address: Array, span: int) -> Array:
    """Byte address under TMA's and wgmma's XOR pattern: 16-byte unit ^= 128-byte row, by as many bits as units."""
    units = max(span // 16, 1)
    return address ^ (((address >> 7) & (units - 1)) << 4)


@dataclass(frozen=True)
class Layout:
    """One operand in shared memory: R rows along M or N, K elements along the contraction.

    lbo, sbo, step: descriptor offsets and the advance of the start address per wgmma, in bytes.
    """

    form: int
    rows: int
    k: int
    major: int
    span: int

    def __post_init__(self) -> None:
        assert self.major == K_MAJOR or self.form in (BF16, F16)

    @property
    def _unit(self) -> int:
        """Elements of one contiguous run: a swizzle span, or 16 bytes without swizzle."""
        return max(self.span, 16) // SIZE[self.form]

    @property
    def bytes(self) -> int:
        """Of the image, a multiple of 1024."""
        along = self.k if self.major == K_MAJOR else self.rows
        units = -(-along // self._unit)
        other = self.rows if self.major == K_MAJOR else self.k
        return -(-units * self._unit * SIZE[self.form] * other // 1024) * 1024

    @property
    def lbo(self) -> int:
        """Leading-dimension byte offset."""
        if self.major == K_MAJOR:
            return self.rows * 16 if self.span == 0 else 16  # with a swizzle it is not used
        if self.span == 0:
            return self.rows * 16  # between groups of eight k
        return self.span * self.k  # between spans along M or N

    @property
    def sbo(self) -> int:
        """Stride-dimension byte offset: between groups of eight rows (K-major) or eight k (MN-major)."""
        if self.major == K_MAJOR or self.span:
            return 8 * max(self.span, 16)
        return 128  # MN-major without swizzle: between 8 x 8 matrices along M or N

    @property
    def step(self) -> int:
        """Bytes from the start of one wgmma's K to the next one's."""
        if self.major == K_MAJOR:
            return 32 if self.span else 2 * self.lbo
        return 2 * (self.sbo if self.span else self.lbo)

    def address(self, row: Array, k: Array) -> Array:
        """Byte address of an element. Within K-major, K must stay inside one span."""
        size = SIZE[self.form]
        if self.major == K_MAJOR:
            if self.span:
                assert self.k * size <= self.span
                return swizzled(row * self.span + k * size, self.span)
            return (k * size // 16) * self.lbo + row * 16 + k * size % 16
        if self.span:
            unit = self._unit
            return swizzled(row // unit * self.lbo + k * self.span + row % unit * size, self.span)
        return k // 8 * self.lbo + row // 8 * self.sbo + k % 8 * 16 + row % 8 * size

    def image(self, matrix: Array) -> Array:
        """uint8 image of codes [rows, k]."""
        assert matrix.shape == (self.rows, self.k)
        row, k = np.meshgrid(np.arange(self.rows), np.arange(self.k), indexing="ij")
        raw = np.zeros(self.bytes, np.uint8)
        at = self.address(row, k)
        codes = matrix.astype(np.uint8 if SIZE[self.form] == 1 else np.uint16)
        for byte in range(SIZE[self.form]):
            raw[at + byte] = np.right_shift(codes, 8 * byte) & 255
        return raw


def accumulator_index(n: int) -> tuple[Array, Array]:
    """(row, column) of D for accumulator i of thread t, both [128, n/2] (PTX ISA, "Register Fragments", D of wgmma)."""
    t, i = np.meshgrid(np.arange(128), np.arange(n // 2), indexing="ij")
    row = t // 32 * 16 + t % 32 // 4 + i // 2 % 2 * 8
    return row, i // 4 * 8 + t % 4 * 2 + i % 2


def a_register_index(form: int) -> tuple[Array, Array]:
    """(row, k) of A for element e of register r of thread t, both [128, 4, elements of a word]."""
    per_word = 4 // SIZE[form]
    t, r, e = np.meshgrid(np.arange(128), np.arange(4), np.arange(per_word), indexing="ij")
    return t // 32 * 16 + t % 32 // 4 + r % 2 * 8, t % 4 * per_word + r // 2 * 4 * per_word + e


def scatter(d: Array) -> Array:
    """Accumulators [.., 128, n/2] of the threads -> D [.., 64, n]."""
    n = d.shape[-1] * 2
    row, column = accumulator_index(n)
    result = np.zeros((*d.shape[:-2], M, n), d.dtype)
    result[..., row, column] = d
    return result


def gather(d: Array) -> Array:
    """D [.., 64, n] -> accumulators [.., 128, n/2]."""
    return np.ascontiguousarray(d[(..., *accumulator_index(d.shape[-1]))])


def make_case(
    name: str, a: Array, b: Array, form: int, layout_a: Layout | None, layout_b: Layout, c: Array | None = None,
    expected: Array | None = None,
) -> Case:  # fmt: skip
    """a codes [tiles, 64, K], b codes [tiles, n, K], c fp32 [tiles, 64, n] or None: the first wgmma clears.

    layout_a None: A comes from registers.
    """
    tiles, n, k = b.shape
    steps = k // STEP[form]
    if layout_a is None:
        row, column = a_register_index(form)
        registers = np.stack([a[:, row, column + s * STEP[form]] for s in range(steps)], axis=1)
        image_a = np.ascontiguousarray(registers.astype(np.uint8 if SIZE[form] == 1 else np.uint16))
        offsets_a = (0, 0, 0, 0, 0)
    else:
        image_a = np.stack([layout_a.image(tile) for tile in a])
        offsets_a = (layout_a.major, SPANS.index(layout_a.span), layout_a.lbo, layout_a.sbo, layout_a.step)
    image_b = np.stack([layout_b.image(tile) for tile in b])
    offsets_b = (layout_b.major, SPANS.index(layout_b.span), layout_b.lbo, layout_b.sbo, layout_b.step)
    start = np.zeros((tiles, 128, n // 2), np.float32) if c is None else gather(c.astype(np.float32))
    bytes_a = image_a[0].nbytes
    parameters = (
        form, n, int(layout_a is None), *offsets_a, *offsets_b, tiles, steps, int(c is not None), bytes_a, image_b[0].nbytes,
    )  # fmt: skip
    output = {"d": np.full((tiles, 128, n // 2), -12345.0, np.float32)}
    return Case(
        name,
        parameters,
        (image_a, image_b, start),
        output,
        {} if expected is None else {"d": gather(expected)},
    )


def _plain(form: int, rows: int, k: int) -> Layout:
    """The layout that kernels use: K-major, the widest swizzle that K fills."""
    span = min(128, k * SIZE[form])
    return Layout(form, rows, k, K_MAJOR, span)


# ---- fragments -----------------------------------------------------------------------------------------------------


def fragments() -> list[Case]:
    """D[m, n] = 256 m + n tells which accumulator is which; A = registers times identity tells which register is."""
    result = []
    for form, ns in ((E4M3, FRAGMENT_N), (BF16, (8, 64, 256)), (E5M2, (64,)), (F16, (64,))):
        for n in ns:
            result.append(_numbered(form, n))
    for form in (E4M3, BF16, E5M2, F16):
        result.append(_a_registers(form))
    return result


def _numbered(form: int, n: int) -> Case:
    """256 m + n as a sum of products of small digits, exact in every format and accumulator (14 significant bits)."""
    k = STEP[form]
    a, b = np.zeros((1, M, k)), np.zeros((1, n, k))
    m, j = np.arange(M), np.arange(n)
    a[0, :, 0], a[0, :, 1], a[0, :, 2], a[0, :, 3] = m // 4 * 4, m % 4, 1, 1
    b[0, :, 0], b[0, :, 1], b[0, :, 2], b[0, :, 3] = 256, 256, j // 8 * 8, j % 8
    expected = (256.0 * m[:, None] + j)[None].astype(np.float32)
    if form in (E4M3, E5M2):  # three or two mantissa bits: more digits
        a[0, :, :8] = np.stack(
            [m // 16 * 16, m // 4 % 4 * 4, m % 4, 0 * m, 0 * m + 1, 0 * m + 1, 0 * m + 1, 0 * m + 1], 1
        )
        b[0, :, :8] = np.stack(
            [
                0 * j + 256,
                0 * j + 256,
                0 * j + 256,
                0 * j,
                j // 64 * 64,
                j // 16 % 4 * 16,
                j // 4 % 4 * 4,
                j % 4,
            ],
            1,
        )
    return make_case(
        f"d-{NAMES[form]}-n{n}", encode(a, form), encode(b, form), form, _plain(form, M, k), _plain(form, n, k),
        expected=expected,
    )  # fmt: skip


def _a_registers(form: int) -> Case:
    """D = A I, A numbered in base 4 over several tiles: tile d holds digit d of the element's number."""
    k = STEP[form]
    number = np.arange(M * k).reshape(M, k)
    digits = [number // 4**d % 4 for d in range(6)]
    a = np.stack(digits).astype(np.float64)
    b = np.broadcast_to(np.eye(k), (len(digits), k, k))
    return make_case(
        f"a-{NAMES[form]}",
        encode(a, form),
        encode(b, form),
        form,
        None,
        _plain(form, k, k),
        expected=a.astype(np.float32),
    )


# ---- operands ------------------------------------------------------------------------------------------------------


def operands() -> list[Case]:
    """Small integers, so that every sum is exact and only the addresses are under test."""
    random = np.random.default_rng(7)
    result = []

    def add(form: int, n: int, k: int, a: tuple[int, int], b: tuple[int, int], tag: str = "") -> None:
        layouts = Layout(form, M, k, *a), Layout(form, n, k, *b)
        x, y = (random.integers(-3, 4, (1, rows, k)).astype(np.float64) for rows in (M, n))
        exact = np.einsum("tmk,tnk->tmn", x, y).astype(np.float32)
        majors = "".join("kn"[major] for major in (a[0], b[0]))
        name = f"{NAMES[form]}-{majors}-{a[1]}-{b[1]}-n{n}-k{k}{tag}"
        result.append(make_case(name, encode(x, form), encode(y, form), form, *layouts, expected=exact))

    for form in (E4M3, BF16):
        for span in SPANS:
            full = (span or 64) // SIZE[form]  # several wgmmas inside one span
            add(form, 64, full, (K_MAJOR, span), (K_MAJOR, span))
        add(form, 64, STEP[form], (K_MAJOR, 32), (K_MAJOR, 0))
        add(form, 256, 128 // SIZE[form], (K_MAJOR, 128), (K_MAJOR, 128))
        add(form, 8, 128 // SIZE[form], (K_MAJOR, 128), (K_MAJOR, 128))
    for span in SPANS:
        for n in (64, 128):
            add(BF16, n, 64, (K_MAJOR, 128), (MN_MAJOR, span))
        add(BF16, 64, 64, (MN_MAJOR, span), (K_MAJOR, 128))
        add(BF16, 64, 32, (MN_MAJOR, span), (MN_MAJOR, span))
    add(BF16, 64, 64, (MN_MAJOR, 128), (MN_MAJOR, 32))
    add(F16, 64, 64, (MN_MAJOR, 128), (MN_MAJOR, 128))
    return result


# ---- numerics ------------------------------------------------------------------------------------------------------

N = 32  # columns of the numerics tiles
Tile = tuple[Array, Array, Array]  # a codes [64, K], b codes [32, K], c fp32 [64, 32]


def numerics() -> list[Case]:
    """Sums that show every rule of the accumulator, and random ones that show rules nobody thought of."""
    result = []
    for form in (E4M3, BF16, E5M2, F16):
        for name, tiles in _numeric_tiles(form).items():
            a, b, c = (np.stack([tile[i] for tile in tiles]) for i in range(3))
            k = a.shape[-1]
            layouts = _plain(form, M, k), _plain(form, N, k)
            expected = model(a, b, c, form)
            result.append(make_case(f"{NAMES[form]}-{name}", a, b, form, *layouts, c=c, expected=expected))
    return result


def model(a: Array, b: Array, c: Array, form: int) -> Array | None:
    """deepseek_ops/reference/tensor_core.py, where it knows the format."""
    import torch

    from deepseek_ops.reference.tensor_core import tensor_core_accumulate

    if form not in (E4M3, BF16):
        return None
    dtype = torch.float8_e4m3fn if form == E4M3 else torch.bfloat16

    def tensor(codes: Array) -> torch.Tensor:
        raw = torch.from_numpy(np.ascontiguousarray(codes.astype(np.uint8 if form == E4M3 else np.int16)))
        return raw.view(dtype)

    out = tensor_core_accumulate(tensor(a), tensor(b), torch.from_numpy(c.astype(np.float32)))
    result: Array = out.numpy()
    return result


def _numeric_tiles(form: int) -> dict[str, list[Tile]]:
    random = np.random.default_rng(100 + form)
    k, size = STEP[form], SIZE[form]
    codes_type = np.uint8 if size == 1 else np.uint16
    wide = 8 if form == E4M3 else 12
    zero = np.zeros((M, N), np.float32)

    def nearest(values: Array) -> Array:
        """Codes near values: exactness is not wanted here."""
        if form == BF16:
            return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        if form == F16:
            return np.clip(values, -60000, 60000).astype(np.float16).view(np.uint16)
        table = decode_table(form)
        finite = np.flatnonzero(np.isfinite(table))
        order = finite[np.argsort(table[finite], kind="stable")]
        found: Array = order[np.clip(np.searchsorted(table[order], values), 0, len(order) - 1)].astype(
            np.uint8
        )
        return found

    def pair(make: Callable[[tuple[int, int]], Array], k: int = k) -> tuple[Array, Array]:
        return nearest(make((M, k))), nearest(make((N, k)))

    def normal(shape: tuple[int, int]) -> Array:
        return random.standard_normal(shape)

    def spread(shape: tuple[int, int]) -> Array:
        return random.standard_normal(shape) * 2.0 ** random.integers(-wide, wide // 2 + 1, shape)

    def any_finite(shape: tuple[int, int]) -> Array:
        if size == 1:
            codes = random.integers(0, 256, shape)
            return np.where(np.isfinite(decode_table(form)[codes]), decode_table(form)[codes], 0.0)
        return random.standard_normal(shape) * 2.0 ** random.integers(-14, 6, shape)

    def floats(scale: float = 1.0, spread_bits: int = 0) -> Array:
        power = 2.0 ** random.integers(-spread_bits, spread_bits + 1, (M, N))
        return (random.standard_normal((M, N)) * scale * power).astype(np.float32)

    tiles: dict[str, list[Tile]] = {
        "normal": [(*pair(normal), zero) for _ in range(2)],
        "normal-c": [(*pair(normal), floats(4)) for _ in range(2)],
        "chain": [(*pair(normal, 4 * k), zero)],  # four steps, the accumulator fed back
        "positive": [(*pair(lambda s: random.random(s), 4 * k), zero)],
        "spread": [(*pair(spread), floats(1, 12)) for _ in range(3)],
        "codes": [(*pair(any_finite), floats(1, 8)) for _ in range(2)],
        "c-large": [(*pair(normal), floats(2.0**14)), (*pair(normal), floats(2.0**40))],
        "c-small": [(*pair(normal), floats(2.0**-14)), (*pair(normal), floats(2.0**-60))],
        "c-cancels": [],
        "subnormal": [],
        "zeros": [],
        "special": [],
        "alignment": [],
        "overflow": [],
    }
    a, b = pair(normal)
    product = decode(a, form) @ decode(b, form).T
    tiles["c-cancels"] = [
        (a, b, (-product).astype(np.float32)),
        (a, b, (-product * (1 + 2**-12)).astype(np.float32)),
    ]
    smallest = {E4M3: 7, E5M2: 3, BF16: 127, F16: 1023}[form]
    sign = 1 << (8 * size - 1)

    def subnormal_codes(rows: int) -> Array:
        return (random.integers(0, smallest + 1, (rows, k)) | random.integers(0, 2, (rows, k)) * sign).astype(
            codes_type
        )

    tiny = np.float32(2.0**-149) * random.integers(0, 200, (M, N)).astype(np.float32)
    tiles["subnormal"] = [
        (subnormal_codes(M), subnormal_codes(N), zero),
        (subnormal_codes(M), nearest(normal((N, k))), floats(2.0**-20)),
        (subnormal_codes(M), subnormal_codes(N), tiny),
    ]
    none_a, none_b = np.zeros((M, k), codes_type), np.zeros((N, k), codes_type)
    minus_a = np.full((M, k), sign, codes_type)
    signed = np.where(random.random((M, N)) < 0.5, np.float32(-0.0), np.float32(0.0)).astype(np.float32)
    tiles["zeros"] = [
        (none_a, none_b, signed), (minus_a, none_b, signed), (minus_a, nearest(normal((N, k))), signed),
        (none_a, none_b, floats(1, 20)), (none_a, none_b, tiny),
    ]  # fmt: skip
    tiles["special"] = _special(form, random, nearest, normal, floats)
    tiles["alignment"] = _alignment(form)
    big = np.float32(3.4028235e38)
    top = {E4M3: 448.0, E5M2: 57344.0, BF16: 3.3895313892515355e38, F16: 65504.0}[form]
    high = encode(np.full((1, 1), top), form)[0, 0]
    full_a, full_b = np.full((M, k), high, codes_type), np.full((N, k), high, codes_type)
    tiles["overflow"] = [
        (full_a, full_b, zero),
        (full_a, full_b, np.full((M, N), big, np.float32)),
        ((full_a | sign).astype(codes_type), full_b, np.full((M, N), -big, np.float32)),
        ((full_a | sign).astype(codes_type), full_b, np.full((M, N), big, np.float32)),
    ]
    if size == 1:
        tiles["every-product"] = _every_product(form)
    return tiles


def _special(form: int, random: np.random.Generator, nearest: Any, normal: Any, floats: Any) -> list[Tile]:
    """NaN and infinity in A, B and C, alone and against each other."""
    k = STEP[form]
    nan = {E4M3: 0x7F, E5M2: 0x7E, BF16: 0x7FC0, F16: 0x7E00}[form]
    sign = 1 << (8 * SIZE[form] - 1)
    tiles = []
    a, b = nearest(normal((M, k))), nearest(normal((N, k)))
    a[3, 5], a[9, k - 1], b[4, 0], b[7, 2] = nan, nan | sign, nan, nan | sign
    tiles.append((a, b, floats()))
    c = floats()
    raw = c.view(np.uint32)
    raw[0, 0], raw[1, 1], raw[2, 2], raw[3, 3], raw[4, 4] = (
        0x7F800000,
        0xFF800000,
        0x7FC00000,
        0xFFC12345,
        0x7F800001,
    )
    tiles.append((nearest(normal((M, k))), nearest(normal((N, k))), c))
    if form != E4M3:
        infinity = {E5M2: 0x7C, BF16: 0x7F80, F16: 0x7C00}[form]
        a, b = nearest(normal((M, k))), nearest(normal((N, k)))
        a[0, 0], a[1, 1], b[0, 0], b[1, 2], b[2, 0] = infinity, infinity | sign, infinity, infinity | sign, 0
        a[2, 0], a[2, 1], b[3, 0], b[3, 1] = infinity, infinity, infinity, infinity | sign
        c = floats()
        c.view(np.uint32)[0, :4] = 0xFF800000
        tiles.append((a, b, c))
    return tiles


def _alignment(form: int) -> list[Tile]:
    """One large product and one small addend at every distance: where bits are cut, and which way."""
    k = STEP[form]
    codes_type = np.uint8 if SIZE[form] == 1 else np.uint16
    one, odd = encode(np.array([1.0, 1.875 if form == E4M3 else 1.75]), form)
    sign = 1 << (8 * SIZE[form] - 1)
    tiles = []
    for big, flip in ((one, 0), (odd, 0), (one, sign), (odd, sign)):
        a, b = np.zeros((M, k), codes_type), np.zeros((N, k), codes_type)
        c = np.zeros((M, N), np.float32)
        a[:, 0], b[:, 0] = big, big
        a[:, 1], b[:, 1] = odd | flip, 0
        reach = min(N, 9 if form == E4M3 else 14)
        for j in range(N):  # columns: the small factor falls by powers of two
            b[j, 1] = encode(np.array([2.0 ** -min(j, reach - 3)]), form)[0]
        for m in range(M):  # rows: C at every distance, both signs, all bits set
            c[m] = np.float32((2 - 2**-23) * 2.0 ** (16 - m) * (-1) ** m)
        tiles.append((a, b, c))
    return tiles


def _every_product(form: int) -> list[Tile]:
    """Each of 256 x 256 products of codes alone: 4 x 8 tiles of 64 x 32."""
    k = STEP[form]
    tiles = []
    zero = np.zeros((M, N), np.float32)
    for first in range(0, 256, M):
        for second in range(0, 256, N):
            a, b = np.zeros((M, k), np.uint8), np.zeros((N, k), np.uint8)
            a[:, 0], b[:, 0] = np.arange(first, first + M), np.arange(second, second + N)
            tiles.append((a, b, zero))
    return tiles
