"""Which dtypes kernels serve: what `takes` says is what they do, and other calls on CUDA tensors get the reference."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import deepseek_ops
from deepseek_ops import ArgumentError, _registry, activation, gemm, loss, moe, norm, optimizer, quantize
from deepseek_ops._native_arguments import takes

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
OFFSETS = torch.tensor([0, 3, 8], dtype=torch.int32)
LABELS = torch.zeros(8, dtype=torch.int64)


def draw(*shape, dtype):
    return torch.ones(shape, dtype=dtype)


CALLS = {
    "gemm": lambda d: gemm.gemm(draw(8, 16, dtype=d), draw(8, 16, dtype=d)),
    "gemm_grouped": lambda d: gemm.gemm_grouped(draw(8, 16, dtype=d), draw(2, 8, 16, dtype=d), OFFSETS),
    "wgrad": lambda d: gemm.wgrad(draw(16, 8, dtype=d), draw(16, 8, dtype=d)),
    "linear_cross_entropy": lambda d: loss.linear_cross_entropy(
        draw(8, 16, dtype=d), draw(24, 16, dtype=d), LABELS
    ),
    "swiglu_backward_quantize": lambda d: activation.swiglu_backward_quantize(
        draw(8, 128, dtype=d), draw(8, 256, dtype=d)
    ),
    "swiglu": lambda d: activation.swiglu(draw(8, 32, dtype=d)),
    "rms_norm": lambda d: norm.rms_norm(draw(8, 16, dtype=d), draw(16, dtype=d)),
    "route": lambda d: moe.route(draw(8, 16, dtype=d), draw(16, dtype=d), top_k=2),
    "permute": lambda d: moe.permute(draw(8, 16, dtype=d), LABELS[:, None], 4),
    "quantize_1x128": lambda d: quantize.quantize_1x128(draw(8, 128, dtype=d)),
    "clip_grad_norm": lambda d: optimizer.clip_grad_norm([draw(8, dtype=d)], 1.0),
}


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_what_takes_says_is_what_the_kernels_do(name, dtype, monkeypatch):
    """Where the public function itself allows a dtype, the kernel serves it if and only if `takes` says so."""
    reason = _registry.absent_reason("emulated")
    if reason:
        pytest.skip(f"backend emulated: {reason}")
    seen = []
    op = _registry.OPS[name]
    monkeypatch.setitem(
        op.kernels, "reference", lambda *args, run=op.kernels["reference"]: seen.append(args) or run(*args)
    )
    try:
        with deepseek_ops.backend("reference"):
            CALLS[name](dtype)
    except ArgumentError:
        return  # no backend serves it
    assert len(seen) == 1
    with deepseek_ops.backend("emulated"):
        if takes(name, seen[0]):
            CALLS[name](dtype)
        else:
            with pytest.raises(ArgumentError, match="must be"):
                CALLS[name](dtype)


@pytest.mark.parametrize(
    ("name", "dtype", "chosen"),
    [
        ("gemm", BF16, "cuda"),
        ("gemm", FP32, "reference"),
        ("rms_norm", FP32, "cuda"),
        ("rms_norm", FP64, "reference"),
    ],
)
def test_cuda_tensors_without_a_kernel_for_their_dtype_get_the_reference(name, dtype, chosen, monkeypatch):
    op = _registry.OPS[name]
    monkeypatch.setattr(_registry, "absent_reason", lambda backend: None)
    monkeypatch.setitem(op.kernels, "cuda", lambda *args: None)
    _registry._warn_no_kernel.cache_clear()
    with FakeTensorMode():
        x = torch.empty(8, 16, dtype=dtype, device="cuda")
    if chosen == "cuda":
        assert op._choose((x, x)) == "cuda"
    else:
        with pytest.warns(UserWarning, match="no CUDA kernel for this op and these dtypes"):
            assert op._choose((x, x)) == "reference"
    with deepseek_ops.backend("cuda"):  # asked for by name: it runs, or says what is wrong
        assert op._choose((x, x)) == "cuda"
