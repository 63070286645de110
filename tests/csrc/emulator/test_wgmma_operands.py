"""Matrix descriptors, operands in shared memory and register fragments, against the PTX ISA's tables.

The model of the layouts here is the ISA's own table of canonical layouts, evaluated as CuTe evaluates it: nested
shapes and strides in elements, the swizzle applied to the byte address. The emulator's code knows no such thing.
"""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import numpy as np
import pytest

from tests.csrc import building
from tests.csrc.emulator.planted import EMULATOR

DRIVER = Path(__file__).with_name("wgmma_operands_test.cpp")

E4M3, E5M2, BF16, F16 = range(4)  # hopper::Operand
K_MAJOR, MN_MAJOR = range(2)  # hopper::Major
NONE, B32, B64, B128 = range(4)  # hopper::Swizzle
NAMES = ("none", "32B", "64B", "128B")
CODE = {NONE: 0, B128: 1, B64: 2, B32: 3}  # bits 62-63 of a descriptor
UNITS = {NONE: 1, B32: 2, B64: 4, B128: 8}  # 16-byte units of a span
BEGIN, END = 1024, 1024 + 200 * 1024

every_swizzle = pytest.mark.parametrize("swizzle", [NONE, B32, B64, B128], ids=NAMES)


def build(source: Path, *extra: str) -> ctypes.CDLL:
    loaded = building.library("wgmma_operands", [DRIVER, source], extra=extra, runtime=False)
    loaded.gather.restype = ctypes.c_char_p
    loaded.encode.restype = ctypes.c_uint64
    loaded.touches.restype = loaded.swizzle_address.restype = ctypes.c_uint32
    return loaded


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build(EMULATOR / "wgmma_operands.cpp", *building.STRICT)


# ---- the model ---------------------------------------------------------------------------------------------------


def descriptor(start: int, leading: int, stride: int, swizzle: int, base: int = 0) -> int:
    """By the table "Matrix descriptor format"."""
    fields = [(x & 0x3FFFF) >> 4 for x in (start, leading, stride)]
    return fields[0] | fields[1] << 16 | fields[2] << 32 | base << 49 | CODE[swizzle] << 62


def cute(shape, stride, index: int) -> int:
    """Offset of a column-major index into one mode of a CuTe layout."""
    offset = 0
    for size, step in zip(shape, stride, strict=True):
        offset += index % size * step
        index //= size
    return offset


def swizzle_address(address: int, swizzle: int, pattern_start: int = 0) -> int:
    """Swizzle<B, 4, 3>: B bits from bit 7 on go into the bits from 4 on, counted from the pattern's start."""
    bits = {NONE: 0, B32: 1, B64: 2, B128: 3}[swizzle]
    inside = address - pattern_start
    return pattern_start + (inside ^ (inside >> 7 & ((1 << bits) - 1)) << 4)


def element_address(row, k, size, major, swizzle, start, leading, stride, pattern_start=0) -> int:
    """Byte address of an element by the table "Canonical Layouts"; offsets in bytes."""
    t, units, many = 16 // size, UNITS[swizzle], 64
    lbo, sbo = leading // size, stride // size
    if major == MN_MAJOR and swizzle == NONE:
        modes = ((t, 1, many), (1, t, sbo)), ((8, many), (t, lbo))
    elif major == MN_MAJOR:
        modes = ((t, units, many), (1, t, lbo)), ((8, many), (units * t, sbo))
    elif swizzle == NONE:
        modes = ((8, many), (t, sbo)), ((t, many), (1, lbo))
    else:
        modes = ((8, many), (units * t, sbo)), ((t, many), (1, t))
    offset = cute(*modes[0], row) + cute(*modes[1], k)
    return swizzle_address(start + offset * size, swizzle, pattern_start)


def expected(memory, rows, size, major, swizzle, start, leading, stride, pattern_start=0):
    """uint8 [rows, 32] and the set of 16-byte chunks."""
    result, chunks = np.zeros((rows, 32), np.uint8), set()
    for row, k in itertools.product(range(rows), range(32 // size)):
        at = element_address(row, k, size, major, swizzle, start, leading, stride, pattern_start)
        result[row, k * size : (k + 1) * size] = memory[at - BEGIN : at - BEGIN + size]
        chunks.add(at // 16 * 16)
    return result, chunks


@pytest.fixture(scope="module")
def memory() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, END - BEGIN, dtype=np.uint8)


def gather(library, memory, bits, operand, major, rows, listen=True, begin=BEGIN, end=END):
    """(error text, uint8 [rows, 32], chunks told)."""
    out = np.full((rows + 1, 32), 0xA5, np.uint8)
    inside = memory[begin - BEGIN :]
    text = library.gather(
        ctypes.c_void_p(inside.ctypes.data), begin, end, ctypes.c_uint64(bits), operand, major, rows,
        ctypes.c_void_p(out.ctypes.data), int(listen),
    )  # fmt: skip
    assert (out[rows] == 0xA5).all()
    told = np.zeros(4096, np.uint32)
    count = library.touches(ctypes.c_void_p(told.ctypes.data), told.size)
    chunks = told[: 2 * count].reshape(-1, 2)
    assert (chunks[:, 1] == 16).all()
    return text.decode(), out[:rows], chunks[:, 0].tolist()


def geometries(size: int, major: int, swizzle: int, rows: int):
    """(leading, stride, offset of the start in its atom): as kernels have them, and other legal ones."""
    span = 16 * UNITS[swizzle]
    if major == K_MAJOR and swizzle == NONE:
        return [(rows * 16, 128, 0), (128, 256, 0), (16, 512, 32), (4096 + 16, 128 + 16, 48)]
    if major == K_MAJOR:
        return [(16, 8 * span, advance) for advance in range(0, span - 31, 32)] + [
            (0, 8 * span + 256, 0),
            (48, 16 * span, span - 32),
            (16, 8 * span + 16, 0),
        ]
    if swizzle == NONE:
        return [(rows * 16, 128, 0), (128, 256, 0), (2048 + 16, 144, 16)]
    spans = -(-rows * 2 // span)
    more = [
        (spans * span * 16, 8 * span, 16 * span),
        (8 * span, 8 * spans * span, 0),
        (16 * span + 16, 8 * span + 32, 0),
    ]
    inside = [(16 * span, 8 * span, span - rows * 2)] if rows * 2 < span else []
    return [(16 * span, 8 * span, 0), *more, *inside]


CASES = [(o, K_MAJOR) for o in range(4)] + [(o, MN_MAJOR) for o in (BF16, F16)]


# ---- descriptors and swizzle -------------------------------------------------------------------------------------


def test_descriptors_hold_what_the_table_says(library):
    rng = np.random.default_rng(1)
    for swizzle in (NONE, B32, B64, B128):
        for _ in range(50):
            start, leading, stride = (int(x) * 16 for x in rng.integers(0, 1 << 14, 3))
            base = int(rng.integers(0, 8))
            bits = library.encode(start, leading, stride, base, swizzle)
            assert bits == descriptor(start, leading, stride, swizzle, base)
            fields = (ctypes.c_uint32 * 5)()
            library.decode(ctypes.c_uint64(bits), fields)
            assert tuple(fields) == (start, leading, stride, base, swizzle)
    assert library.encode(0x43FFF0 | 15, 0, 0, 0, NONE) == 0x3FFF  # (x & 0x3FFFF) >> 4


@every_swizzle
def test_swizzle(library, swizzle):
    repeat = {NONE: 1, B32: 256, B64: 512, B128: 1024}[swizzle]
    got = [library.swizzle_address(a, swizzle) for a in range(8192)]
    assert got == [swizzle_address(a, swizzle) for a in range(8192)]
    assert sorted(got) == list(range(8192))  # a bijection, and its own inverse
    assert [got[x] for x in got] == list(range(8192))
    assert all(got[a + repeat] == got[a] + repeat for a in range(8192 - repeat))


def test_the_table_of_the_128_byte_swizzle(library):
    """PTX ISA, "Tensor swizzling modes", 128B: chunk c of row r lies at c ^ r. Rows as the ISA prints them."""
    table = ["01234567", "10325476", "23016745", "32107654", "45670123", "54761032", "67452301", "76543210"]
    for row, line in enumerate(table):
        for chunk, number in enumerate(line):
            assert library.swizzle_address(row * 128 + int(number) * 16, B128) == row * 128 + chunk * 16


# ---- operands ----------------------------------------------------------------------------------------------------


@every_swizzle
@pytest.mark.parametrize(("operand", "major"), CASES)
def test_operands_equal_the_canonical_layouts(library, memory, operand, major, swizzle):
    check_operands(library, memory, operand, major, swizzle, (8, 16, 24, 64, 72, 256))


def check_operands(library, memory, operand, major, swizzle, row_counts):
    size = 1 if operand < BF16 else 2
    for rows in row_counts:
        for leading, stride, inside in geometries(size, major, swizzle, rows):
            start = 16384 + inside
            bits = descriptor(start, leading, stride, swizzle)
            text, got, told = gather(library, memory, bits, operand, major, rows)
            assert text == ""
            want, chunks = expected(memory, rows, size, major, swizzle, start, leading, stride)
            assert np.array_equal(got, want), (rows, leading, stride, inside)
            assert set(told) == chunks
            assert len(told) == rows * 2  # each chunk once
            silent = gather(library, memory, bits, operand, major, rows, listen=False)
            assert silent[0] == "" and np.array_equal(silent[1], want) and silent[2] == []


@pytest.mark.parametrize("swizzle", [B32, B64, B128], ids=NAMES[1:])
def test_a_tile_as_tma_writes_it(library, swizzle):
    """The k-advance idiom: rows of one span, swizzled by address; step s starts 32 bytes further on."""
    span, rows, start = 16 * UNITS[swizzle], 128, 8192
    tile = np.random.default_rng(2).integers(0, 256, (rows, span), dtype=np.uint8)
    memory = np.zeros(END - BEGIN, np.uint8)
    for row, column in itertools.product(range(rows), range(0, span, 16)):
        at = swizzle_address(start + row * span + column, swizzle) - BEGIN
        memory[at : at + 16] = tile[row, column : column + 16]
    for step in range(span // 32):
        bits = descriptor(start, 16, 8 * span, swizzle) + 2 * step  # hopper::advance by 32 bytes
        text, got, _ = gather(library, memory, bits, E4M3, K_MAJOR, rows)
        assert text == "" and np.array_equal(got, tile[:, 32 * step : 32 * step + 32])


def test_mn_major_tiles_as_tma_writes_them(library):
    """bf16 [k, rows] with rows contiguous, boxes of one 128-byte span of rows by 64 of k; four steps of k = 16."""
    rows, ks, start = 128, 64, 16384
    tile = np.random.default_rng(3).integers(0, 1 << 16, (ks, rows), dtype=np.uint16)
    memory = np.zeros(END - BEGIN, np.uint8)
    for box, k, chunk in itertools.product(range(rows // 64), range(ks), range(8)):
        at = swizzle_address(start + box * ks * 128 + k * 128 + chunk * 16, B128) - BEGIN
        first = box * 64 + chunk * 8
        memory[at : at + 16] = tile[k, first : first + 8].view(np.uint8)
    for step in range(4):
        bits = descriptor(start + step * 16 * 128, ks * 128, 8 * 128, B128)
        text, got, _ = gather(library, memory, bits, BF16, MN_MAJOR, rows)
        assert text == "" and np.array_equal(got.view(np.uint16), tile[16 * step : 16 * step + 16].T)


@pytest.mark.parametrize("swizzle", [B32, B64, B128], ids=NAMES[1:])
@pytest.mark.parametrize("major", [K_MAJOR, MN_MAJOR])
def test_base_offset_moves_the_pattern(library, memory, major, swizzle):
    """base offset = (pattern start >> 7) & 7, where the pattern does not start at a multiple of its repeat."""
    span = 16 * UNITS[swizzle]
    for rows_off in range(1, UNITS[swizzle]):
        pattern_start = 16384 + 128 * rows_off
        base = pattern_start >> 7 & 7
        geometry = (16, 8 * span) if major == K_MAJOR else (16 * span, 8 * span)
        bits = descriptor(pattern_start, *geometry, swizzle, base)
        text, got, told = gather(library, memory, bits, BF16, major, 64)
        want, chunks = expected(memory, 64, 2, major, swizzle, pattern_start, *geometry, pattern_start)
        assert text == "" and np.array_equal(got, want) and set(told) == chunks
        unmoved = gather(library, memory, bits & ~(7 << 49), BF16, major, 64)[1]
        assert not np.array_equal(unmoved, want)


def test_examples_of_the_isa():
    """The model against the ISA's worked examples of bf16 MN-major (figures 168 to 170): element -> element offset."""
    exact = {
        NONE: (((8, 1, 2), (1, 8, 64)), ((8, 2), (8, 128)), 128, 64),
        B32: (((8, 2, 2), (1, 8, 128)), ((8, 2), (16, 256)), 128, 256),
        B64: (((8, 4, 2), (1, 8, 256)), ((8, 2), (32, 512)), 256, 512),
    }
    for swizzle, (rows, ks, leading, stride) in exact.items():
        for row, k in itertools.product(range(np.prod(rows[0])), range(16)):
            linear = 2 * (cute(*rows, row) + cute(*ks, k))
            got = element_address(row, k, 2, MN_MAJOR, swizzle, 0, 2 * leading, 2 * stride)
            assert got == swizzle_address(linear, swizzle)


@every_swizzle
@pytest.mark.parametrize("major", [K_MAJOR, MN_MAJOR])
def test_bounds(library, memory, major, swizzle):
    """The window may be exactly as large as what is read, and not 16 bytes smaller at either end."""
    span = 16 * UNITS[swizzle]
    start = 16384
    geometry = (64 * 16, 128) if swizzle == NONE else (16 * span, 8 * span)
    bits = descriptor(start, *geometry, swizzle)
    _, chunks = expected(memory, 64, 2, major, swizzle, start, *geometry)
    low, high = min(chunks), max(chunks) + 16
    assert gather(library, memory, bits, BF16, major, 64, begin=low, end=high)[0] == ""
    for begin, end in ((low + 16, high), (low, high - 16), (low, high - 1), (low + 1, high)):
        text, _, told = gather(library, memory, bits, BF16, major, 64, begin=begin, end=end)
        assert "outside of the block's" in text
        assert all(begin <= at and at + 16 <= end for at in told)  # nothing outside was told, or read


def test_a_descriptor_that_wraps_stays_outside(library, memory):
    text, _, _ = gather(library, memory, descriptor(0x3FFF0, 0x3FFF0, 0x3FFF0, NONE), E4M3, K_MAJOR, 256)
    assert "outside of the block's" in text
    text, _, _ = gather(library, memory, descriptor(0, 16, 1024, B128, 7), E4M3, K_MAJOR, 8)
    assert "outside of the block's" in text


LEGAL = (16384, 16, 1024, B128)


@pytest.mark.parametrize("bit", [14, 15, 30, 31, 46, 47, 48, *range(52, 62)])
def test_reserved_bits(library, memory, bit):
    assert "reserved bits" in gather(library, memory, descriptor(*LEGAL) | 1 << bit, E4M3, K_MAJOR, 64)[0]


def test_illegal_descriptors(library, memory):
    def text(bits, operand=BF16, major=K_MAJOR, rows=64):
        return gather(library, memory, bits, operand, major, rows)[0]

    assert text(descriptor(*LEGAL)) == ""
    for operand in (E4M3, E5M2):
        assert "K-major only" in text(descriptor(*LEGAL), operand, MN_MAJOR)
    assert "without a swizzle" in text(descriptor(16384, 1024, 128, NONE, base=1))
    for rows in (0, 4, 12, 264):
        assert "rows" in text(descriptor(*LEGAL), rows=rows)
    # A step that leaves its span of bytes.
    for swizzle, inside in ((B128, 112), (B64, 48), (B32, 16)):
        span = 16 * UNITS[swizzle]
        assert "swizzle atom" in text(descriptor(16384 + inside, 16, 8 * span, swizzle))
        assert text(descriptor(16384 + inside - 16, 16, 8 * span, swizzle)) == ""
        assert "swizzle atom" in text(descriptor(16384 + 16, 1024, 8 * span, swizzle), major=MN_MAJOR)
    assert text(descriptor(16384 + 112, 1024, 1024, B128), major=MN_MAJOR, rows=8) == ""
    assert "swizzle atom" in text(descriptor(16384 + 112, 1024, 1024, B128), major=MN_MAJOR, rows=16)


# ---- fragments ---------------------------------------------------------------------------------------------------


def pairs(function, *arguments, count=2):
    out = (ctypes.c_uint32 * count)()
    function(*arguments, out)
    return tuple(out)


@pytest.mark.parametrize("n", [8, 64, 256])
def test_accumulator_fragments(library, n):
    """Figure of D: warp w has rows 16w on; d0 d1 side by side, d2 d3 eight rows on, d4 eight columns on."""
    seen = {}
    for t, i in itertools.product(range(128), range(n // 2)):
        seen[pairs(library.accumulator, t, i)] = (t, i)
    assert set(seen) == set(itertools.product(range(64), range(n)))
    # Columns 0-7 as the figure prints them: T0:{d0,d1} T1:{d0,d1} ... in row 0, T4 in row 1, T0:{d2,d3} in row 8.
    for row, column in itertools.product(range(64), range(n)):
        warp, inside = divmod(row, 16)
        thread = warp * 32 + inside % 8 * 4 + column % 8 // 2
        register = column // 8 * 4 + (inside >= 8) * 2 + column % 2
        assert seen[row, column] == (thread, register)


@pytest.mark.parametrize("size", [1, 2])
def test_a_fragments(library, size):
    """Figures of A for k = 32 (a0-a3 | a4-a7 eight rows on | a8-a11 sixteen bytes on | a12-a15) and k = 16."""
    per_word = 4 // size
    seen = {}
    for t, word, element in itertools.product(range(128), range(4), range(per_word)):
        row, k = pairs(library.a_element, t, word, element, size)
        seen[row, k] = (t, word, element)
        for byte in range(size):
            assert pairs(library.a_byte, t, word, element * size + byte) == (row, k * size + byte)
    assert set(seen) == set(itertools.product(range(64), range(32 // size)))
    for (row, k), (t, word, element) in seen.items():
        index = word * per_word + element  # a0, a1, ... of the figure
        group, lane = t % 32 // 4, t % 4
        assert row == t // 32 * 16 + group + 8 * (index // per_word % 2)
        assert k == lane * per_word + index % per_word + 16 // size * (index // (2 * per_word))


@pytest.mark.parametrize("matrices", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_fragments(library, matrices, transposed):
    """ldmatrix: lane 4r + c holds elements 2c, 2c + 1 of row r; with .trans of column r."""
    seen = set()
    for lane, register, half in itertools.product(range(32), range(matrices), range(2)):
        matrix, row, column = pairs(library.matrix, lane, register, half, int(transposed), count=3)
        row, column = (column, row) if transposed else (row, column)
        assert (matrix, row, column) == (register, lane // 4, lane % 4 * 2 + half)
        seen.add((matrix, row, column))
    assert len(seen) == matrices * 64


def test_ldmatrix_reads_what_wgmma_wants_of_a(library):
    """x4 on the four 8x8 quarters of 16 rows by 16 k of bf16, in the order rows, then k, is A in registers."""
    for lane, register, half in itertools.product(range(32), range(4), range(2)):
        matrix, row, column = pairs(library.matrix, lane, register, half, 0, count=3)
        assert pairs(library.a_element, lane, register, half, 2) == (
            matrix % 2 * 8 + row,
            matrix // 2 * 8 + column,
        )


# ---- planted errors ----------------------------------------------------------------------------------------------

PLANTED = {
    "leading and stride exchanged": ("field(16), field(32)", "field(32), field(16)"),
    "codes of 64B and 32B exchanged": ("Swizzle::b64, Swizzle::b32}", "Swizzle::b32, Swizzle::b64}"),
    "no swizzle": ("swizzled(address - displaced, m.swizzle) + displaced", "address"),
    "base offset ignored": ("m.base_offset * 128", "0"),
    "base offset the other way": ("swizzled(address - displaced, m.swizzle) + displaced", "swizzled(address + displaced, m.swizzle) - displaced"),
    "swizzle of the offset": ("physical(m, m.start_address + offset)", "m.start_address + swizzled(offset, m.swizzle)"),
    "K-major pitch": ("row % 8 * span", "row % 8 * 128"),
    "interleaved rows": ("group * m.stride_byte_offset", "group * m.leading_byte_offset"),
    "spans of rows": ("group / chunks * m.leading_byte_offset", "group / chunks * m.stride_byte_offset"),
    "groups of k": ("k / 8 * m.stride_byte_offset", "k / 8 * m.leading_byte_offset"),
    "end of the window": ("|| end - address < kChunk", ""),
    "start of the window": ("address < begin ||", ""),
    "silent reads": ("if (touch) touch(context, address, kChunk)", ""),
    "reserved bits": ("bits & kReserved", "false"),
    "steps that leave the span": ("inside + run > span", "false"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_seen(name, memory, tmp_path):
    right, wrong = PLANTED[name]
    text = (EMULATOR / "wgmma_operands.cpp").read_text()
    assert text.count(right) == 1, "the planted error no longer fits the source"
    (tmp_path / "wgmma_operands.cpp").write_text(text.replace(right, wrong))
    library = build(tmp_path / "wgmma_operands.cpp", "-O0", "-w", f"-I{EMULATOR}")  # quick to compile

    def everything():
        test_descriptors_hold_what_the_table_says(library)
        for swizzle, major in itertools.product((NONE, B32, B64, B128), (K_MAJOR, MN_MAJOR)):
            check_operands(library, memory, BF16, major, swizzle, (8, 72))
            test_bounds(library, memory, major, swizzle)
            if swizzle != NONE:
                test_base_offset_moves_the_pattern(library, memory, major, swizzle)
        test_reserved_bits(library, memory, 14)
        test_illegal_descriptors(library, memory)

    with pytest.raises(AssertionError):
        everything()
