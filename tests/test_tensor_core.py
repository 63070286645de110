"""The tensor-core model against an independent scalar oracle, planted cases, and the laws it must obey."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_ops.reference.tensor_core import (
    fma,
    matmul_promoted,
    matmul_unpromoted,
    tensor_core_accumulate,
    tensor_core_step,
)

from . import oracle_tensor_core as oracle

E4M3 = torch.float8_e4m3fn
BF16 = torch.bfloat16
FORMATS = {E4M3: (oracle.e4m3, 32, 13, 13), BF16: (oracle.bf16, 16, 25, 23)}


def e4m3(codes: torch.Tensor) -> torch.Tensor:
    return codes.to(torch.uint8).view(E4M3)


def bf16(codes: torch.Tensor) -> torch.Tensor:
    return (codes - (codes >= 1 << 15).long() * (1 << 16)).to(torch.int16).view(BF16)


def fp32(codes: torch.Tensor) -> torch.Tensor:
    return (codes - (codes >= 1 << 31).long() * (1 << 32)).to(torch.int32).view(torch.float32)


def bits(x: torch.Tensor) -> list:
    return (x.contiguous().view(torch.int32).long() & 0xFFFFFFFF).tolist()


def expected(a_codes: torch.Tensor, b_codes: torch.Tensor, c_codes: torch.Tensor, dtype: torch.dtype) -> list:
    decode, k, fraction, mantissa = FORMATS[dtype]
    rows = [[decode(x) for x in row] for row in a_codes.tolist()]
    columns = [[decode(x) for x in row] for row in b_codes.tolist()]
    result = []
    for i, row in enumerate(rows):
        result.append([])
        for j, column in enumerate(columns):
            acc = int(c_codes[i, j])
            for start in range(0, len(row), k):
                part = slice(start, start + k)
                acc = oracle.step(row[part], column[part], acc, fraction, mantissa)
            result[-1].append(acc)
    return result


def random_codes(
    generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, kind: str
) -> torch.Tensor:
    def draw(high: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    if dtype == E4M3:
        if kind == "any":
            return draw(256)
        exponent = (
            draw(3) if kind == "small" else 13 + draw(2) if kind == "wide" else draw(15)
        )  # small: subnormals and zeros are common
        return draw(2) << 7 | exponent << 3 | draw(8)
    if kind == "any":
        return draw(1 << 16)
    # small: below the fp32 range, or (times wide) in it with subnormal operands
    low, span = {"small": (0, 4), "wide": (225, 29), "ordinary": (110, 40)}[kind]
    return draw(2) << 15 | (low + draw(span)) << 7 | draw(128)


@pytest.mark.parametrize("dtype", [E4M3, BF16], ids=["e4m3", "bf16"])
@pytest.mark.parametrize("kind", ["ordinary", "small", "wide", "any"])
def test_steps_match_the_scalar_oracle(dtype, kind):
    generator = torch.Generator().manual_seed(5)
    make = e4m3 if dtype == E4M3 else bf16
    k = FORMATS[dtype][1]
    for width in (1, 7, k, 2 * k + 3):
        a = random_codes(generator, (12, width), dtype, "small" if kind == "wide" else kind)
        b = random_codes(generator, (12, width), dtype, kind)
        a[:3], b[0] = 0, 0x80 if dtype == E4M3 else 0x8000  # zero rows: nothing decides the alignment
        a[3:6] &= ~0x7F
        c = torch.randint(0, 1 << 32, (12, 12), generator=generator)
        if kind != "any":
            c = torch.randint(0, 2, c.shape, generator=generator) << 31 | (c & 0x7FFFFF)
            c |= torch.randint(100, 140, c.shape, generator=generator) << 23
        c[:, 0], c[:, 1], c[0, 2:6] = 0, 1 << 31, torch.tensor([1, 0x7FFFFF, 0x80000001, 0x00800000])
        result = tensor_core_accumulate(make(a), make(b), fp32(c))
        assert bits(result) == expected(a, b, c, dtype)


@given(st.data())
def test_one_e4m3_step_matches_the_oracle_on_drawn_bits(data):
    width = data.draw(st.integers(1, 32))
    codes = st.lists(st.integers(0, 255), min_size=width, max_size=width)
    a, b = (torch.tensor([data.draw(codes)]) for _ in range(2))
    c = torch.tensor([[data.draw(st.one_of(st.integers(0, 2**32 - 1), st.integers(0x3F000000, 0x42000000)))]])
    assert bits(tensor_core_step(e4m3(a), e4m3(b), fp32(c))) == expected(a, b, c, E4M3)


def step_of(products: list[float], c: float) -> float:
    """One e4m3 step whose products are exactly these (each an e4m3 value times 1)."""
    a = torch.tensor([products]).to(E4M3)
    assert a.float().tolist() == [products]
    return tensor_core_step(a, torch.ones_like(a, dtype=torch.float32).to(E4M3), torch.tensor([[c]])).item()


def test_planted_alignments():
    # 256 = 2^8: terms are cut below 2^(8 - 13) = 1/32.
    assert step_of([256.0, 0.03125], 0.0) == 256.03125
    assert step_of([256.0, 0.0625 - 0.015625], 0.0) == 256.03125  # 3/64 loses its last bit
    assert step_of([256.0, -0.015625], 0.0) == 256.0  # toward zero, not down
    assert step_of([-256.0, 0.015625, 0.015625], 0.0) == -256.0  # cut one by one, before they are added
    assert step_of([256.0, -256.0, 0.015625], 0.0) == 0.0  # the largest exponent rules even when it cancels
    assert step_of([256.0, 256.0, 0.03125], 0.0) == 512.0  # the sum is cut again, below its own leading bit
    assert step_of([0.001953125], 0.0) == 0.001953125  # the smallest subnormal
    # The accumulator is a term like any other: it is cut, and it decides the alignment when it is the largest.
    assert step_of([0.0], 1 + 2**-13 + 2**-14) == 1 + 2**-13
    assert step_of([0.015625], 2.0**8) == 256.0


def test_products_are_aligned_by_their_operands_exponents():
    # 1.5 * 1.5 = 2.25 counts as 2^0, so the 2^-13 of its neighbour survives the alignment. (Normalised to 2^1 it
    # would be cut at 2^-12.) The -1.5 brings the sum below 1, where the result has room for it.
    a = torch.tensor([[1.5, 2.0**-6, -1.5]]).to(E4M3)
    b = torch.tensor([[1.5, 2.0**-6 * 0.5, 1.0]]).to(E4M3)
    assert tensor_core_step(a, b, torch.zeros(1, 1)).item() == 0.75 + 2.0**-13


def test_zeros_do_not_align_and_sum_to_plus_zero():
    tiny = 2.0**-140
    assert step_of([0.0, -0.0], tiny) == 0.0  # below 2^-126 the kept bits end at 2^-139
    assert step_of([0.0], 2.0**-139) == 2.0**-139
    zero = tensor_core_step(
        *(torch.tensor([[-0.0]]).to(E4M3), torch.tensor([[1.0]]).to(E4M3)), torch.tensor([[-0.0]])
    )
    assert bits(zero) == [[0]]


@pytest.mark.parametrize(
    ("a", "b", "c", "want"),
    [
        ([float("inf")], [1.0], 0.0, 0x7F800000),
        ([float("inf")], [-1.0], 0.0, 0xFF800000),
        ([float("inf")], [0.0], 0.0, 0x7FFFFFFF),
        ([float("inf"), float("inf")], [1.0, -1.0], 0.0, 0x7FFFFFFF),
        ([float("inf")], [1.0], -float("inf"), 0x7FFFFFFF),
        ([1.0], [1.0], float("nan"), 0x7FFFFFFF),
        ([2.0**100], [2.0**100], 0.0, 0x7F800000),
        ([2.0**100], [-(2.0**100)], 0.0, 0xFF800000),
    ],
)
def test_infinities_nans_and_overflow(a, b, c, want):
    c = torch.tensor([[c]])
    assert bits(tensor_core_step(torch.tensor([a]).to(BF16), torch.tensor([b]).to(BF16), c)) == [[want]]


def test_overflow_in_one_step_stays_for_the_next():
    a = torch.zeros(1, 32, dtype=BF16)
    a[0, 0] = a[0, 16] = 2.0**100
    assert tensor_core_accumulate(a, a, None).item() == float("inf")
    b = a.clone()
    b[0, 16] = -(2.0**100)  # a finite product of the next step does not undo it, nor make a NaN
    assert tensor_core_accumulate(a, b, None).item() == float("inf")


def test_nan_of_one_row_stays_in_its_row():
    a = torch.randn(4, 32).to(E4M3)
    a.view(torch.uint8)[2, 5] = 0xFF
    result = tensor_core_step(a, torch.randn(3, 32).to(E4M3), torch.zeros(4, 3))
    assert result[2].isnan().all() and result[[0, 1, 3]].isfinite().all()
    assert bits(result)[2] == [0x7FFFFFFF] * 3


def test_scales_multiply_exactly_and_powers_of_two_only_shift():
    torch.manual_seed(0)
    a, b = torch.randn(5, 64).to(E4M3), torch.randn(6, 64).to(E4M3)
    plain = tensor_core_accumulate(a, b)
    shifted = tensor_core_accumulate(a, b, None, torch.full((5, 6), 2.0**-20))
    assert torch.equal(shifted, plain * 2.0**-20)
    # One product: 1.25 * s is cut to 13 bits below its exponent, floor(log2 s) - not rounded to fp32 in between.
    one, s = torch.tensor([[1.25]]).to(E4M3), torch.tensor([[1 + 2**-13 + 2**-14 + 2**-23]])
    exact = 1.25 * s.item()
    assert (
        tensor_core_accumulate(one, torch.tensor([[1.0]]).to(E4M3), None, s).item()
        == int(exact * 2**13) / 2**13
    )
    zero_scale = tensor_core_accumulate(a, b, torch.ones(5, 6), torch.zeros(5, 6))
    assert torch.equal(zero_scale, torch.ones(5, 6))


def test_batches_and_chunks_do_not_change_bits():
    torch.manual_seed(1)
    a, b = torch.randn(3, 2, 70, 40).to(E4M3), torch.randn(3, 2, 90, 40).to(E4M3)
    c = torch.randn(3, 2, 70, 90)
    whole = tensor_core_accumulate(a, b, c)
    for i in range(3):
        for j in range(2):
            row = tensor_core_accumulate(a[i, j, 33:34], b[i, j, 20:25], c[i, j, 33:34, 20:25])
            assert torch.equal(whole[i, j, 33:34, 20:25], row)
    steps = tensor_core_step(a[..., :32], b[..., :32], c)
    assert torch.equal(tensor_core_step(a[..., 32:], b[..., 32:], steps), whole)


def test_a_step_refuses_more_than_its_k():
    with pytest.raises(ValueError, match="at most 32"):
        tensor_core_step(torch.zeros(1, 33).to(E4M3), torch.zeros(1, 33).to(E4M3), torch.zeros(1, 1))


def test_empty_operands():
    a, b = torch.zeros(0, 32).to(E4M3), torch.zeros(4, 32).to(E4M3)
    assert tensor_core_accumulate(a, b).shape == (0, 4)
    c = torch.randn(2, 4)
    assert torch.equal(tensor_core_accumulate(torch.zeros(2, 0).to(E4M3), torch.zeros(4, 0).to(E4M3), c), c)


# fp32 fused multiply-add

finite32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def check_fma(x: float, y: float, z: float) -> None:
    got = bits(fma(torch.tensor([x]), torch.tensor([y]), torch.tensor([z])))[0]
    want = oracle.fma(x, y, z)
    if want == 0:
        got &= 0x7FFFFFFF  # the sign of an exact zero has its own test
    elif want == 1 << 31:
        assert got == want
    assert got == want, (x, y, z)


@given(finite32, finite32, finite32)
def test_fma_rounds_once(x, y, z):
    check_fma(x, y, z)


@given(
    st.integers(1 << 23, (1 << 24) - 1),
    st.integers(1 << 23, (1 << 24) - 1),
    st.integers(-80, 80),
    st.booleans(),
)
def test_fma_rounds_once_near_ties(x, y, shift, negative):
    z = float(x) * 2.0**shift * (-1 if negative else 1)
    check_fma(float(x), float(y) * 2.0**-24, z)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_fma_where_two_roundings_differ(sign):
    # The last place of z is 2^-35 (and odd), and x * y = 2^-36 - 2^-82 just misses half of it. float64 rounds the
    # sum onto the tie, from where a second rounding to fp32 goes up to the even neighbour.
    x, y, z = 1 + 2.0**-23, sign * (1 - 2.0**-23) * 2.0**-36, sign * (2.0**-12 + 2.0**-35)
    check_fma(x, y, z)
    assert fma(*(torch.tensor([v]) for v in (x, y, z))).item() == z
    assert torch.tensor(x * y + z, dtype=torch.float64).float().item() != z
    # 0.63 of a last place of float64 below the tie: the float64 sum is odd already and must not move onto the tie.
    x, y = 1 + 405 * 2.0**-23, sign * (1 - 405 * 2.0**-23) * 2.0**-36
    check_fma(x, y, z)


def test_fma_zero_signs_infinities_and_overflow():
    def of(x, y, z):
        return bits(fma(torch.tensor([x]), torch.tensor([y]), torch.tensor([z])))[0]

    assert of(-1.0, 0.0, -0.0) == 1 << 31 and of(1.0, 0.0, -0.0) == 0 and of(1.0, 1.0, -1.0) == 0
    assert of(3e38, 2.0, 0.0) == 0x7F800000 and of(-3e38, 2.0, 1.0) == 0xFF800000
    assert of(float("inf"), 1.0, 5.0) == 0x7F800000
    assert fma(torch.tensor([float("inf")]), torch.tensor([1.0]), torch.tensor([-float("inf")])).isnan().all()


# Whole products


def test_promoted_product_is_slices_and_fmas():
    torch.manual_seed(2)
    m, n, k = 3, 5, 300  # two slices and a tail of 44
    a, b = torch.randn(m, k).to(E4M3), torch.randn(n, k).to(E4M3)
    scale_a, scale_b = torch.rand(3, m) + 0.5, torch.rand(3, n) + 0.5
    result = matmul_promoted(a, scale_a, b, scale_b)
    a_codes, b_codes = a.view(torch.uint8).long(), b.view(torch.uint8).long()
    zero = torch.zeros(m, n, dtype=torch.long)
    acc = torch.zeros(m, n)
    for i in range(3):
        part = slice(128 * i, 128 * i + 128)
        p = fp32(torch.tensor(expected(a_codes[:, part], b_codes[:, part], zero, E4M3)))
        for r in range(m):
            for col in range(n):
                s = (scale_a[i, r] * scale_b[i, col]).item()
                acc[r, col] = fp32(torch.tensor([oracle.fma(p[r, col].item(), s, acc[r, col].item())])).item()
    assert torch.equal(result, acc)


def test_unpromoted_product_with_unit_scales_is_the_plain_chain():
    torch.manual_seed(3)
    a, b = torch.randn(4, 300).to(E4M3), torch.randn(6, 300).to(E4M3)
    ones = torch.ones(3, 4), torch.ones(3, 6)
    codes = a.view(torch.uint8).long(), b.view(torch.uint8).long()
    want = expected(*codes, torch.zeros(4, 6, dtype=torch.long), E4M3)
    assert bits(matmul_unpromoted(a, ones[0], b, ones[1])) == want


def test_bf16_steps_need_no_promotion():
    torch.manual_seed(4)
    a, b = torch.rand(16, 4096).to(BF16), torch.rand(16, 4096).to(BF16)
    exact = a.double() @ b.double().T
    assert ((tensor_core_accumulate(a, b).double() - exact).abs() / exact).max() < 3e-5
