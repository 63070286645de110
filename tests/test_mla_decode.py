"""mla_decode and the paged latent cache: fp64 and byte-level oracles, garbage, neighbours, absorbed = naive."""

import itertools
import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_ops import ArgumentError, attention
from deepseek_ops.attention import cache_token_bytes, cache_write_, mla_attention, mla_decode
from deepseek_ops.reference import attention as reference
from deepseek_ops.reference.latent_cache import read_tokens

GARBAGE = 2147480000  # a page number that would fault if it were ever used


def e4m3_value(code):
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    value = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
    return -value if sign else value


def token_oracle(token, latent_dim, rope_dim):
    """The floats of one FP8 token, byte by byte."""
    raw = bytes(token.tolist())
    groups = -(-latent_dim // 128)
    scales = struct.unpack_from(f"<{groups}f", raw, latent_dim)
    latent = [e4m3_value(raw[i]) * scales[i // 128] for i in range(latent_dim)]
    halves = struct.unpack_from(f"<{rope_dim}H", raw, latent_dim + 4 * groups)
    return latent, [struct.unpack("<f", struct.pack("<I", h << 16))[0] for h in halves], scales


def bounds(sizes):
    return torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)


class Batch:
    """Requests with random pages of a cache that is NaN wherever no token of theirs lies."""

    def __init__(
        self, lengths, counts, heads=2, dc=16, dr=8, page=16, dtype=torch.float32, fp8=False, seed=0
    ):
        g = torch.Generator().manual_seed(seed)
        self.lengths, self.counts, self.dc, self.heads = lengths, counts, dc, heads
        blocks = [-(-n // page) for n in lengths]
        order = torch.randperm(sum(blocks) + 3, generator=g).tolist()
        self.table = torch.full((len(lengths), max([*blocks, 0]) + 2), GARBAGE, dtype=torch.int32)
        if fp8:
            self.cache = torch.full((len(order), page, cache_token_bytes(dc, dr)), 0xFF, dtype=torch.uint8)
        else:
            self.cache = torch.full((len(order), page, dc + dr), torch.nan, dtype=dtype)
        self.tokens = []
        for r, n in enumerate(lengths):
            pages = [order.pop() for _ in range(blocks[r])]
            self.table[r, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            latent = torch.randn(n, dc, generator=g).to(dtype)
            k_pe = torch.randn(n, dr, generator=g).to(dtype)
            slots = torch.tensor([pages[i // page] * page + i % page for i in range(n)], dtype=torch.int64)
            cache_write_(self.cache, latent, k_pe, slots)
            if fp8:
                stored = [token_oracle(self.cache[s // page, s % page], dc, dr)[:2] for s in slots.tolist()]
                latent = torch.tensor([s[0] for s in stored]).view(n, dc)
                k_pe = torch.tensor([s[1] for s in stored]).view(n, dr)
            self.tokens.append(torch.cat([latent, k_pe], 1).double())
        self.q = torch.randn(sum(counts), heads, dc + dr, generator=g).to(dtype)

    def run(self, scale=0.2, requests=None, invariant=False):
        requests = range(len(self.lengths)) if requests is None else requests
        cu = bounds(self.counts).tolist()
        return mla_decode(
            torch.cat([self.q[:0], *(self.q[cu[r] : cu[r + 1]] for r in requests)]),
            self.cache,
            self.table[list(requests)],
            torch.tensor([self.lengths[r] for r in requests], dtype=torch.int32),
            bounds([self.counts[r] for r in requests]),
            softmax_scale=scale,
            latent_dim=self.dc,
            batch_invariant=invariant,
        )

    def oracle(self, scale=0.2, dtype=torch.float64):
        out = torch.zeros(self.q.shape[0], self.heads, self.dc, dtype=dtype)
        lse = torch.full(self.q.shape[:2], -torch.inf, dtype=torch.float64)
        rows = [
            (r, n - c + i + 1)
            for r, (n, c) in enumerate(zip(self.lengths, self.counts, strict=True))
            for i in range(c)
        ]
        for t, (r, seen) in enumerate(rows):
            if seen > 0:
                keys = self.tokens[r][:seen].to(dtype)
                scores = self.q[t].to(dtype) @ keys.T * scale
                out[t] = scores.softmax(1) @ keys[:, : self.dc]
                lse[t] = (self.q[t].double() @ keys.double().T * scale).logsumexp(1)
        return out, lse

    def check(self):
        out, lse = self.run()
        want, want_lse = self.oracle()
        assert out.dtype == self.q.dtype and out.shape == want.shape and lse.dtype == torch.float32
        assert not out.isnan().any()
        torch.testing.assert_close(lse.double(), want_lse, atol=3e-6, rtol=1e-6)
        plain, _ = self.oracle(dtype=self.q.dtype)
        if out.numel():
            error, allowed = (x.double().sub(want).square().mean().sqrt() for x in (out, plain))
            assert error <= 2 * allowed + (1e-6 if self.q.dtype == torch.float32 else 1e-5)
        return out, lse


REQUESTS = st.lists(
    st.tuples(st.sampled_from([0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 65, 140]), st.integers(0, 8)), max_size=6
)


@given(requests=REQUESTS, heads=st.sampled_from([1, 2, 3, 16]), fp8=st.booleans(), seed=st.integers(0, 5))
def test_ragged_requests_match_the_oracle(requests, heads, fp8, seed):
    lengths, counts = [n for n, _ in requests], [c for _, c in requests]
    Batch(lengths, counts, heads=heads, fp8=fp8, seed=seed).check()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("dc", "dr"), [(512, 64), (64, 16), (130, 2), (3, 1), (128, 0)])
def test_dimensions_and_bf16(dc, dr, fp8):
    Batch(
        [70, 1, 0, 129], [1, 1, 2, 4], heads=4, dc=dc, dr=dr, page=64, dtype=torch.bfloat16, fp8=fp8
    ).check()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    ("lengths", "count"), [([33] * 4, 1), ([20, 30, 17], 1), ([32, 32], 2), ([1, 5, 2], 3), ([16], 1)]
)
def test_requests_of_as_many_pages_are_one_batch(lengths, count, fp8, monkeypatch):
    """Without groups, with or without masks: against the oracle, and request by request."""
    batch = Batch(lengths, [count] * len(lengths), fp8=fp8)
    calls, decode = [], reference._decode
    monkeypatch.setattr(reference, "_decode", lambda *args: calls.append(args[3]) or decode(*args))
    out, lse = batch.check()
    assert calls == [lengths]
    alone, alone_lse = batch.run(invariant=True)
    assert calls[1:] == [[length] for length in lengths]
    torch.testing.assert_close(out, alone, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse, alone_lse, atol=2e-6, rtol=2e-6)


def test_requests_of_length_zero_give_zero_and_minus_infinity():
    batch = Batch([0, 5, 0, 3], [2, 1, 0, 6])
    out, lse = batch.check()
    empty = [0, 1, 3, 4, 5]  # the two of request 0; three of request 3, whose 6 queries have 3 cached tokens
    assert (out[empty] == 0).all() and (lse[empty] == -torch.inf).all()
    seen = [2, 6, 7, 8]
    assert lse[seen].isfinite().all() and (out[seen] != 0).all()
    none = Batch([], [])
    assert none.run()[0].shape == (0, 2, 16)


@given(
    requests=REQUESTS.filter(len), dtype=st.sampled_from([torch.float32, torch.bfloat16]), fp8=st.booleans()
)
def test_a_result_does_not_depend_on_the_batch_bit_for_bit(requests, dtype, fp8):
    batch = Batch([n for n, _ in requests], [c for _, c in requests], heads=3, dtype=dtype, fp8=fp8)
    out, lse = batch.run(invariant=True)
    cu = bounds(batch.counts).tolist()
    for r in range(len(requests)):
        alone, alone_lse = batch.run(requests=[r], invariant=True)
        assert torch.equal(alone, out[cu[r] : cu[r + 1]]) and torch.equal(alone_lse, lse[cu[r] : cu[r + 1]])
    reverse = list(reversed(range(len(requests))))
    parts = [out[cu[r] : cu[r + 1]] for r in reverse]
    assert torch.equal(batch.run(requests=reverse, invariant=True)[0], torch.cat(parts))


@pytest.mark.parametrize("fp8", [False, True])
def test_speculative_tokens_equal_one_by_one(fp8):
    batch = Batch([77], [5], heads=4, fp8=fp8)
    together, lse = batch.run()
    for i in range(5):
        one, one_lse = mla_decode(
            batch.q[i : i + 1],
            batch.cache,
            batch.table,
            torch.tensor([77 - 4 + i], dtype=torch.int32),
            bounds([1]),
            softmax_scale=0.2,
            latent_dim=16,
        )
        torch.testing.assert_close(one[0], together[i], atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(one_lse[0], lse[i], atol=2e-6, rtol=2e-6)


def test_absorbed_equals_naive():
    """W_UK moved to the query and W_UV to the output: the same numbers as training attention with up-projection."""
    g = torch.Generator().manual_seed(4)
    heads, nope, value, dc, dr, page = 3, 10, 6, 16, 4, 8
    lengths = [21, 5]
    w_uk = torch.randn(heads, nope, dc, generator=g, dtype=torch.float64) / 4
    w_uv = torch.randn(heads, value, dc, generator=g, dtype=torch.float64) / 4
    latent, k_pe = (torch.randn(26, d, generator=g, dtype=torch.float64) for d in (dc, dr))
    q = torch.randn(26, heads, nope + dr, generator=g, dtype=torch.float64)
    scale = (nope + dr) ** -0.5

    k_nope = torch.einsum("hnc,tc->thn", w_uk, latent)
    v = torch.einsum("hvc,tc->thv", w_uv, latent)
    naive, naive_lse = mla_attention(q, k_nope, k_pe, v, bounds(lengths), softmax_scale=scale)

    cache = torch.full((9, page, dc + dr), torch.nan, dtype=torch.float64)
    table = torch.tensor([[4, 1, 8], [2, GARBAGE, GARBAGE]], dtype=torch.int32)
    slots = [int(table[0, t // page]) * page + t % page for t in range(21)] + [2 * page + t for t in range(5)]
    cache_write_(cache, latent, k_pe, torch.tensor(slots))
    last = [*range(18, 21), 25]  # three speculative tokens of the first request, one of the second
    q_latent = torch.einsum("thn,hnc->thc", q[last, :, :nope], w_uk)
    absorbed, lse = mla_decode(
        torch.cat([q_latent, q[last, :, nope:]], 2),
        cache,
        table,
        torch.tensor(lengths, dtype=torch.int32),
        bounds([3, 1]),
        softmax_scale=scale,
        latent_dim=dc,
    )
    torch.testing.assert_close(torch.einsum("thc,hvc->thv", absorbed, w_uv), naive[last])
    torch.testing.assert_close(lse, naive_lse[last])


def test_token_bytes():
    assert cache_token_bytes(512, 64) == 656
    assert cache_token_bytes(64, 16) == 100 and cache_token_bytes(130, 0) == 138


@given(
    dc=st.sampled_from([1, 64, 128, 130, 512]),
    exponent=st.integers(-130, 110),
    seed=st.integers(0, 20),
    flat=st.booleans(),
)
def test_fp8_token_bytes_match_a_search_over_all_codes(dc, exponent, seed, flat):
    """Each scale is the smallest power of two with amax / scale <= 448, each code the nearest, even on ties."""
    g = torch.Generator().manual_seed(seed)
    latent = torch.ones(1, dc) if flat else torch.randn(1, dc, generator=g)
    latent = (latent.double() * 2.0**exponent).float()
    latent[0, dc // 2] = 0.0
    k_pe = torch.randn(1, 4, generator=g)
    cache = torch.zeros(1, 1, cache_token_bytes(dc, 4), dtype=torch.uint8)
    cache_write_(cache, latent, k_pe, torch.tensor([0]))
    _, rope_part, scales = token_oracle(cache[0, 0], dc, 4)
    assert rope_part == k_pe[0].bfloat16().tolist()
    for group, scale in enumerate(scales):
        x = latent[0, 128 * group : 128 * group + 128].tolist()
        amax = max(map(abs, x))
        if amax == 0:
            assert scale == 1.0
            continue
        amax = max(amax, 2.0**-118)
        assert math.frexp(scale)[0] == 0.5 and amax / scale <= 448 < amax / (scale / 2)
        codes = cache[0, 0, 128 * group : 128 * group + len(x)].tolist()
        table = {c: e4m3_value(c) for c in range(256) if c & 0x7F != 0x7F}
        for value, code in list(zip(x, codes, strict=True))[:: max(len(x) // 8, 1)]:
            best = min(abs(table[c] - value / scale) for c in table)
            assert abs(table[code] - value / scale) == best
            ties = [c for c in table if abs(table[c] - value / scale) == best and c >> 7 == code >> 7]
            assert len(ties) == 1 or code % 2 == 0


def test_fp8_not_a_number_stays_in_its_token_and_tile():
    latent = torch.ones(3, 256)
    latent[1, 5], latent[1, 6] = torch.inf, -torch.nan
    cache = torch.zeros(2, 4, cache_token_bytes(256, 2), dtype=torch.uint8)
    cache_write_(cache, latent, torch.ones(3, 2), torch.tensor([6, 1, 3]))
    tokens = read_tokens(cache, torch.tensor([[0, 1]]), torch.tensor([[[7]]]), 256, torch.float32)[0]
    assert (tokens[7] == 0).all()
    assert tokens[1].isnan().nonzero().flatten().tolist() == [5, 6]
    torch.testing.assert_close(tokens[[6, 3]], torch.ones(2, 258), atol=0, rtol=0)
    assert (
        (cache[0, 0] == 0).all()
        and (cache[1, 0] == 0).all()
        and (cache[0, 1, 128:256] == cache[1, 2, 128:256]).all()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cache_write_skips_minus_one_and_keeps_the_rest(dtype):
    latent, k_pe = torch.randn(5, 6).to(dtype), torch.randn(5, 2).to(dtype)
    whole = torch.zeros(2, 3, 4, 8, dtype=dtype)  # layers x blocks x page x line; one layer is a strided view
    cache = whole.transpose(0, 1)[:, 1]
    cache_write_(cache, latent, k_pe, torch.tensor([11, -1, 0, 5, -1]))
    want = torch.zeros(12, 8, dtype=dtype)
    for slot, token in ((11, 0), (0, 2), (5, 3)):
        want[slot] = torch.cat([latent[token], k_pe[token]])
    assert torch.equal(whole[1].flatten(0, 1), want) and (whole[0] == 0).all()
    before = whole.clone()
    cache_write_(cache, latent, k_pe, torch.full((5,), -1))
    cache_write_(cache, latent[:0], k_pe[:0], torch.empty(0, dtype=torch.int64))
    for slots in ([12, 0, 1, 2, 3], [-2, 0, 1, 2, 3]):
        with pytest.raises(ArgumentError, match=r"^slot_mapping: must be in \[-1, 12\)"):
            cache_write_(cache, latent, k_pe, torch.tensor(slots))
    assert torch.equal(whole, before)


def test_opcheck_and_compile():
    batch = Batch([9, 3], [2, 1])
    lengths, cu = torch.tensor(batch.lengths, dtype=torch.int32), bounds(batch.counts)
    torch.library.opcheck(
        attention._mla_decode.raw, (batch.q, batch.cache, batch.table, lengths, cu, 0.2, 16, False)
    )
    for cache in (torch.zeros(2, 4, 8), torch.zeros(2, 4, cache_token_bytes(6, 2), dtype=torch.uint8)):
        args = (cache, torch.randn(3, 6), torch.randn(3, 2), torch.tensor([1, -1, 7]))
        torch.library.opcheck(attention._cache_write_.raw, args)

    def step(q, latent, k_pe, cache, slots):
        cache_write_(cache, latent, k_pe, slots)
        return mla_decode(q * 2, cache, batch.table, lengths, cu, softmax_scale=0.2, latent_dim=16)

    slot = int(batch.table[1, 0]) * 16 + 2
    latent, k_pe = torch.randn(1, 16), torch.randn(1, 8)
    one, two = batch.cache.clone(), batch.cache.clone()
    want = step(batch.q, latent, k_pe, one, torch.tensor([slot]))
    have = torch.compile(step, fullgraph=True, backend="aot_eager")(
        batch.q, latent, k_pe, two, torch.tensor([slot])
    )
    assert all(torch.equal(a, b) for a, b in zip(want, have, strict=True)) and torch.equal(
        one.nan_to_num(), two.nan_to_num()
    )
    assert not torch.equal(one.nan_to_num(), batch.cache.nan_to_num())


def test_argument_errors():
    batch = Batch([9, 3], [2, 1])
    good = {
        "q": batch.q,
        "cache": batch.cache,
        "block_table": batch.table,
        "cache_seqlens": torch.tensor([9, 3], dtype=torch.int32),
        "cu_seqlens_q": bounds([2, 1]),
        "softmax_scale": 0.2,
        "latent_dim": 16,
    }
    wrong = {
        "q": [batch.q.half(), batch.q[0]],
        "cache": [
            batch.cache.double(),
            batch.cache[..., 1:],
            batch.cache[0],
            batch.cache[:, :0],
            batch.cache.view(torch.uint8),
        ],
        "block_table": [batch.table.long(), batch.table[0]],
        "cache_seqlens": [
            good["cache_seqlens"].long(),
            good["cache_seqlens"][1:],
            torch.tensor([-1, 3], dtype=torch.int32),
            torch.tensor([9, 49], dtype=torch.int32),
        ],
        "cu_seqlens_q": [bounds([2, 1, 0]), bounds([2, 9]), bounds([2, 1]).flip(0), bounds([2, 1]).long()],
        "softmax_scale": [math.nan, -1.0],
        "latent_dim": [0, 25],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ArgumentError, match=rf"^{name}: "):
                mla_decode(**(good | {name: value}))
    latent, k_pe, slots = torch.zeros(2, 16), torch.zeros(2, 8), torch.tensor([0, 1])
    for name, args in (
        ("latent", (batch.cache, latent.half(), k_pe, slots)),
        ("k_pe", (batch.cache, latent, k_pe[1:], slots)),
        ("cache", (batch.cache, latent, k_pe[:, 1:], slots)),
        ("cache", (batch.cache.bfloat16(), latent, k_pe, slots)),
        ("slot_mapping", (batch.cache, latent, k_pe, slots.int())),
        ("slot_mapping", (batch.cache, latent, k_pe, slots[1:])),
    ):
        with pytest.raises(ArgumentError, match=rf"^{name}: "):
            cache_write_(*args)
    for name, args in (("latent_dim", (0, 64)), ("rope_dim", (512, -1))):
        with pytest.raises(ArgumentError, match=rf"^{name}: "):
            cache_token_bytes(*args)
