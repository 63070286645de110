"""RoPE and YaRN against complex arithmetic in fp64, published vectors, and Hugging Face's DeepSeek-V3."""

import cmath
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_ops import ArgumentError
from deepseek_ops import rope as module
from deepseek_ops.rope import (
    half_to_interleaved,
    interleaved_to_half,
    rope,
    softmax_scale,
    yarn_inv_freq,
    yarn_mscale,
)

POSITIONS = st.lists(st.integers(-5, 163840), max_size=9)


def data(positions, shape, dtype=torch.float32):
    x = torch.randn(len(positions), *shape, generator=torch.Generator().manual_seed(1))
    return x.to(dtype), torch.tensor(positions, dtype=torch.int64), yarn_inv_freq(shape[-1], factor=40.0)


@given(positions=POSITIONS, heads=st.sampled_from([None, 1, 3]), dim=st.sampled_from([2, 6, 64]))
def test_adjacent_pairs_are_complex_numbers(positions, heads, dim):
    x, pos, inv_freq = data(positions, (dim,) if heads is None else (heads, dim))
    y = rope(x, pos, inv_freq)
    assert y.shape == x.shape and y.dtype == x.dtype
    flat_x, flat_y = (
        x.view(len(positions), heads or 1, dim).tolist(),
        y.view(len(positions), heads or 1, dim).tolist(),
    )
    for t, position in enumerate(positions):
        for row_x, row_y in zip(flat_x[t], flat_y[t], strict=True):
            for i in range(dim // 2):
                angle = float(torch.tensor(float(position)) * inv_freq[i])  # one fp32 product
                want = complex(row_x[2 * i], row_x[2 * i + 1]) * cmath.exp(1j * angle)
                assert abs(want - complex(row_y[2 * i], row_y[2 * i + 1])) <= 1e-6 * (1 + abs(want))


def test_bf16_is_one_rounding_of_the_fp32_result():
    x, pos, inv_freq = data([0, 1, 4097, 131071], (3, 64), torch.bfloat16)
    assert torch.equal(rope(x, pos, inv_freq), rope(x.float(), pos, inv_freq).bfloat16())
    assert torch.equal(rope(x, pos, inv_freq)[0], x[0])  # position 0 is the identity


@pytest.mark.parametrize("shape", [(8,), (3, 8)])
def test_gradient_is_the_inverse_rotation(shape):
    x, pos, inv_freq = data([7, 0, 3, 100000], shape, torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: rope(t, pos, inv_freq), x)
    assert torch.autograd.gradcheck(lambda t: rope(t, pos, inv_freq, inverse=True), x)
    dy = torch.randn(x.shape, dtype=torch.float64)
    (dx,) = torch.autograd.grad(rope(x, pos, inv_freq), x, dy)
    assert torch.equal(dx, rope(dy, pos, inv_freq, inverse=True))
    torch.testing.assert_close(rope(rope(x, pos, inv_freq), pos, inv_freq, inverse=True), x)


def test_scores_depend_on_distance_only():
    inv_freq = yarn_inv_freq(64)
    q, k = torch.randn(2, 1, 64, dtype=torch.float64)
    at = [rope(torch.cat([q, k]), torch.tensor([p, p - 17]), inv_freq) for p in (17, 1017, 4000)]
    scores = torch.stack([pair[0] @ pair[1] for pair in at])
    torch.testing.assert_close(scores, scores[:1].expand(3), atol=1e-3, rtol=0)  # fp32 angles


def test_strided_and_empty_inputs():
    x, pos, inv_freq = data([5, 9], (3, 64))
    wide = torch.cat([x, x], -1)
    assert torch.equal(rope(wide[..., 64:], pos, inv_freq), rope(x, pos, inv_freq))
    assert torch.equal(
        rope(x.transpose(0, 1)[:2].transpose(0, 1), pos, inv_freq), rope(x[:, :2], pos, inv_freq)
    )
    assert rope(x[:0], pos[:0], inv_freq).shape == (0, 3, 64) and rope(x[:, :0], pos, inv_freq).shape == (
        2,
        0,
        64,
    )


def test_yarn_vectors_of_the_released_model():
    plain = yarn_inv_freq(64)
    yarn = yarn_inv_freq(64, 10000.0, 40.0, 4096, 32, 1)
    assert yarn.dtype == torch.float32 and yarn.shape == (32,)
    torch.testing.assert_close(
        plain.double(),
        torch.tensor([10000.0 ** (-i / 32) for i in range(32)], dtype=torch.float64),
        rtol=3e-7,
        atol=0,
    )
    assert torch.equal(yarn[:11], plain[:11])
    assert torch.equal(yarn[23:], plain[23:] / 40)
    between = (yarn / plain)[10:24]
    torch.testing.assert_close(
        between, 1 - (1 - 1 / 40) * torch.arange(14) / 13
    )  # a straight line in the index
    assert torch.equal(yarn_inv_freq(64, factor=1.0), plain)
    assert yarn_mscale(40) == pytest.approx(1.368888, abs=1e-6) and yarn_mscale(40, 0.707) < yarn_mscale(40)
    assert yarn_mscale(1) == 1.0 and yarn_mscale(0.5) == 1.0
    assert softmax_scale(192) == pytest.approx(0.0721688, abs=1e-7)
    assert softmax_scale(192, 40) == pytest.approx(0.1352338, abs=1e-7)
    assert softmax_scale(192, 40, 0.0) == softmax_scale(192)


def test_hugging_face_deepseek_v3_agrees():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32, "beta_slow": 1}
    yarn |= {"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}
    for parameters, ours in (
        ({"rope_type": "default", "rope_theta": 10000.0}, yarn_inv_freq(64)),
        (yarn, yarn_inv_freq(64, 10000.0, 40.0, 4096, 32, 1)),
    ):
        config = DeepseekV3Config(rope_parameters=parameters, max_position_embeddings=163840)
        rotary = hf.DeepseekV3RotaryEmbedding(config)
        torch.testing.assert_close(ours, rotary.inv_freq, rtol=3e-7, atol=0)
        assert (
            rotary.attention_scaling == 1.0
        )  # cos and sin carry no factor: mscale is in softmax_scale alone
        pos = torch.tensor([0, 1, 5, 999, 4095])
        q, k = torch.randn(5, 3, 64), torch.randn(5, 1, 64)
        cos, sin = rotary(q, pos[None])
        q_hf, k_hf = hf.apply_rotary_pos_emb_interleave(
            q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin
        )
        for x, want in ((q, q_hf), (k, k_hf)):
            have = interleaved_to_half(rope(x, pos, ours))
            torch.testing.assert_close(
                have, want[0].transpose(0, 1), atol=2e-3, rtol=0
            )  # angles differ by an ulp
            low = pos < 10
            torch.testing.assert_close(have[low], want[0].transpose(0, 1)[low], atol=3e-6, rtol=0)
        attention = hf.DeepseekV3Attention(config, 0)
        factor = parameters.get("factor", 1.0)
        assert attention.scaling == pytest.approx(softmax_scale(192, factor), rel=1e-12)


def test_layout_conversion():
    x = torch.tensor([0, 10, 1, 11, 2, 12])
    assert interleaved_to_half(x).tolist() == [0, 1, 2, 10, 11, 12]
    assert half_to_interleaved(interleaved_to_half(x)).tolist() == x.tolist()
    y = torch.randn(2, 3, 64, requires_grad=True)
    assert torch.equal(interleaved_to_half(half_to_interleaved(y)), y)
    assert interleaved_to_half(y).requires_grad
    for convert in (interleaved_to_half, half_to_interleaved):
        with pytest.raises(ArgumentError, match=r"^x: must have an even last dimension"):
            convert(torch.zeros(2, 3))


def test_opcheck_and_compile():
    x, pos, inv_freq = data([4, 0, 9], (2, 6))
    torch.library.opcheck(module._rope.raw, (x, pos, inv_freq, False))
    leaf = x.clone().requires_grad_()

    def loss(t):
        return (rope(t * 2, pos, inv_freq) * torch.arange(6)).square().sum()

    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf).backward()
    torch.testing.assert_close(leaf.grad, want)


def test_argument_errors():
    x, pos, inv_freq = data([4, 0, 9], (2, 6))
    for name, args in (
        ("x", (x.half(), pos, inv_freq)),
        ("x", (x[0, 0], pos, inv_freq)),
        ("x", (x[..., 1:], pos, inv_freq)),
        ("positions", (x, pos.int(), inv_freq)),
        ("positions", (x, pos[1:], inv_freq)),
        ("inv_freq", (x, pos, inv_freq.double())),
        ("inv_freq", (x, pos, inv_freq[1:])),
    ):
        with pytest.raises(ArgumentError, match=rf"^{name}: must"):
            rope(*args)
    for name, args in (
        ("dim", (7,)),
        ("dim", (0,)),
        ("base", (64, 1.0)),
        ("factor", (64, 1e4, 0.5)),
        ("factor", (64, 1e4, math.nan)),
        ("original_max", (64, 1e4, 40.0, 0)),
        ("beta_fast", (64, 1e4, 40.0, 4096, 1.0, 2.0)),
    ):
        with pytest.raises(ArgumentError, match=rf"^{name}: must"):
            yarn_inv_freq(*args)
    with pytest.raises(ArgumentError, match=r"^qk_dim"):
        softmax_scale(0)
