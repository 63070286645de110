"""Benchmarks without a GPU: shapes, floors (as the READMEs of csrc have them), lines, and a rehearsal on small shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from bench import (
    activation,
    bf16_gemm,
    decode,
    fp8_gemm,
    grouped,
    loss,
    moe,
    norm,
    optimizer,
    quantize,
    wgrad,
)
from bench.proof import families, memory_bound
from bench.proof.families.gemm import GROUPED_SHAPES
from bench.proof.revision import ROOT
from bench.proof.rows import difference, line
from bench.proof.vendor import VendorOperands, exact_product, slices
from deepseek_ops._registry import absent_reason

from .rehearsal import rehearsal

COMMANDS = (activation, bf16_gemm, decode, fp8_gemm, grouped, loss, moe, norm, optimizer, quantize, wgrad)


# ---- shapes and floors -----------------------------------------------------------------------------------------------


def test_sizes_of_groups() -> None:
    for case in grouped.cases(quick=False):
        sizes = case.sizes
        assert len(sizes) == case.groups and min(sizes) >= 1
        assert 0 <= case.groups * case.rows - sum(sizes) <= case.groups
        assert (len(set(sizes)) == 1) == (case.kind != "zipf")
    assert len({case.name for case in grouped.cases(quick=False)}) == len(grouped.cases(quick=False)) == 108


def test_floors_of_the_readme() -> None:
    for kind, groups, rows, n, k, flops, moved in (
        ("uniform", 8, 4096, 4096, 7168, 1014, 155),
        ("uniform", 8, 4096, 7168, 2048, 507, 137),
        ("uniform", 32, 128, 4096, 7168, 127, 209),
        ("masked", 32, 20, 4096, 7168, 20, 198),
    ):
        floor = grouped.floor_us(grouped.Case(kind, groups, rows, n, k), 4800, 132)
        assert (round(floor["flops"]), round(floor["bytes"])) == (flops, moved)


def test_shapes_of_the_proof_are_cases() -> None:
    names = {case.name for case in grouped.cases(quick=False)}
    assert {grouped.Case(*shape).name for shapes in GROUPED_SHAPES.values() for shape in shapes} <= names


@pytest.mark.parametrize(
    ("module", "kernel", "shape", "per_element"),
    [
        (quantize, "quantize_1x128", (4096, 7168), 3.03), (quantize, "quantize_1x128_128x1", (4096, 7168), 4.06),
        (quantize, "transpose_128x128", (4096, 7168), 2.00), (quantize, "requantize_128x1", (4096, 7168), 2.06),
        (quantize, "pack_e5m6", (4096, 7168), 3.53), (quantize, "unpack_e5m6", (4096, 7168), 3.53),
        (quantize, "requantize_e5m6_128x1", (4096, 7168), 2.56), (quantize, "dequantize_128x1", (4096, 7168), 3.03),
        (norm, "rms_norm", (4096, 7168), 4.00), (norm, "rms_norm_quantize", (4096, 7168), 3.03),
        (norm, "rms_norm_residual_quantize", (4096, 7168), 7.03),
        (activation, "swiglu_quantize", (4096, 2048), 5.03), (activation, "swiglu_backward", (4096, 2048), 10.0),
        # dy and gate_up 6, row and column codes of two gradients 4.125, the activation's 1.03
        (activation, "swiglu_backward_quantize", (4096, 2048), 11.16),
    ],
)  # fmt: skip
def test_floors_per_element(
    module: ModuleType, kernel: str, shape: tuple[int, int], per_element: float
) -> None:
    """research/gemm-quant.md 7.2 and csrc/quantize/README.md, from the shapes of the op's own outputs."""
    case = module.case(kernel, *shape)
    assert case.floor_bytes / (shape[0] * shape[1]) == pytest.approx(per_element, rel=3e-3)


def test_floors_of_the_moe_plumbing() -> None:
    """A token's row is read once and written 8 times, with its index, or gathered with its weight."""
    row, slots = 7168 * 2, 8
    for kernel, each in (
        ("permute", (1 + slots) * row + slots * 16), ("unpermute", (1 + slots) * row + slots * 12),
        ("unpermute_backward", (1 + 2 * slots) * row + slots * 16), ("route_backward", 3 * 1024 + slots * 12),
    ):  # fmt: skip
        assert moe.case(kernel, 4096).floor_bytes == pytest.approx(4096 * each, rel=1e-3)


def test_floor_of_the_step() -> None:
    step, copies, clip = optimizer.cases_of("x", [(1000, 3), (7,)])
    assert (step.floor_bytes, clip.floor_bytes) == (22 * 3007, 4 * 3007)
    assert copies.floor_bytes == 22 * 3000 + 20 * 7


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_without_a_gpu_it_says_so(
    module: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = absent_reason("cuda") or "this test hides the GPU"
    monkeypatch.setattr("bench.proof.rows.absent_reason", lambda name: reason)
    assert module.main(["--quick"]) == 0
    out = capsys.readouterr().out
    assert (
        out.startswith("no GPU to measure on: backend 'cuda' is absent here")
        and "floors in microseconds" in out
    )
    names = [case.name for case in module.cases(quick=True)]
    assert names and all(name in out for name in names) and len(out.splitlines()) == 2 + len(names)
    with pytest.raises(SystemExit):
        module.main(["--only", "poetry"])


# ---- rows --------------------------------------------------------------------------------------------------------


def test_a_line() -> None:
    ours = {"median_us": 10.0, "tflops": 800.0, "gbps": 9.0, "correct": True}
    row = {
        "kernel": "k", "shape": "s", "floor_us": {"flops": 5.0, "bytes": 7.0},
        "candidates": {"ours": ours, "x": {"median_us": 12.0}, "y": {"absent": "no y"}},
    }  # fmt: skip
    assert line(row) == "k s 10.0 us, 800 TFLOP/s, floor 7.0 us, 1.20x x"
    row["candidates"]["ours"] = {**ours, "correct": False}
    assert line(row).endswith("WRONG")
    assert line({"kernel": "k", "shape": "s", "candidates": {"ours": {"absent": "why"}}}) == "k s absent: why"


def test_difference_of_every_bit() -> None:
    x = torch.tensor([1.0, -0.0, float("nan"), float("inf")])
    assert difference(x, x.clone()) == ""
    assert difference((x, x), (x, x.abs())) == "output 1 differs in 1 of 4 elements"
    assert difference(x, x.double()).startswith("the result is torch.float32 (4,) instead of torch.float64")
    assert "NaN or Inf elsewhere" in difference(x, x.nan_to_num(3.0, posinf=float("inf")))
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == "the result differs"


def test_difference_up_to_rounding() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    some, many, far = x.clone(), x * 1.01, x.clone()
    some[:9] *= 1.01
    far[5] = 100.0
    assert difference(some, x, share=1e-3) == ""
    assert difference(some, x) == "the result differs in 9 of 10000 elements"
    assert "elements" in difference(many, x, share=1e-3) and "of its norm" in difference(far, x, share=1e-3)
    assert difference(x.float() * (1 + 2**-20), x.float(), share=1e-3) == ""
    assert "of its norm" in difference(x.float() * (1 + 2**-12), x.float(), share=1e-3)


# ---- baselines -------------------------------------------------------------------------------------------------------


def test_vendor_operands_have_the_layout_of_cublaslt() -> None:

    a = torch.randn(5, 640).to(torch.float8_e4m3fn)
    b = torch.randn(200, 640).to(torch.float8_e4m3fn)
    scale_a, scale_b = torch.rand(5, 8), torch.rand(2, 5)
    vendor = VendorOperands.of(a, scale_a, b, scale_b)
    assert (
        vendor.a.shape == (8, 640)
        and vendor.a[:5].float().equal(a.float())
        and not vendor.a[5:].float().any()
    )
    assert vendor.scale_a.shape == (8, 5) and vendor.scale_a.stride() == (1, 8)
    assert vendor.scale_b.shape == (8, 2) and vendor.scale_b.stride() == (1, 8)
    assert vendor.scale_b[:5].equal(scale_b.T) and bool((vendor.scale_b[5:] == 1).all())
    assert [(a.shape, b.shape) for _, (a, b) in slices()] == [((128, 128), (128, 128))] * 4


def test_the_judge_of_products_takes_padded_scales() -> None:
    """Rows are padded to 4 in our layout of scales."""
    a, b = torch.randn(3, 200).to(torch.float8_e4m3fn), torch.randn(130, 200).to(torch.float8_e4m3fn)
    scale_a, scale_b = torch.full((2, 4), 2.0), torch.full((2, 2), 3.0)
    assert torch.equal(exact_product(a, scale_a, b, scale_b), 6 * a.double() @ b.double().T)


# ---- a rehearsal -----------------------------------------------------------------------------------------------------

SMALL = {
    "gemm": {"SHAPES": {g: [(5, 136, 272)] for g in ("large", "short-k", "decode")},
             "GROUPED_SHAPES": {"grouped": [("uniform", 3, 5, 136, 144)], "ragged": [("zipf", 3, 5, 136, 144)],
                                "masked": [("masked", 3, 5, 136, 144)]}},
    "decode": {"SHAPES": [(1, 136, 272)], "MASKED_SHAPES": [(3, 2, 8, 136, 144)]},
    "wgrad": {"SHAPES": [(136, 144, 256)], "GROUPED_SHAPES": [(2, 136, 144, 256)]},
    "moe": {"TOKENS": [9]}, "quantize": {"SHAPES": [(300, 256)]}, "norm": {"SHAPES": [(9, 256)]},
    "activation": {"SHAPES": [(140, 128)]}, "optimizer": {"SHAPES": {"layer": [(3, 5), (2049,)], "vectors": [(7,)]}},
}  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family on shapes that a CPU has time for; bandwidth counts from the first byte on."""
    for name, shapes in SMALL.items():
        for constant, value in shapes.items():
            monkeypatch.setattr(f"bench.proof.families.{name}.{constant}", value)
    monkeypatch.setattr(bf16_gemm, "DENSE", [(5, 8, 64)] * 4)
    monkeypatch.setattr(bf16_gemm, "FEW_ROWS", [])
    monkeypatch.setattr(bf16_gemm, "GROUPED", [(2, 5, 8, 64)])
    for constant, value in (("WIDTH", 32), ("CLASSES", 300), ("TOKENS", [40])):
        monkeypatch.setattr(loss, constant, value)
    for constant, value in (("EXPERTS", 64), ("HIDDEN", 256)):
        monkeypatch.setattr(moe, constant, value)
    monkeypatch.setattr(norm, "SAMPLE", (20, 256))
    monkeypatch.setattr(activation, "SAMPLE", (130, 128))


BENCHMARKS = [s for s in families.all_steps() if s.name.startswith("bench-")]


@pytest.mark.parametrize("step", BENCHMARKS, ids=lambda step: step.name)
def test_every_benchmark_feeds_its_claims(
    step, small: None, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows hold what the claims of the step ask for: a name misspelt on either side would leave a claim unproven for ever."""
    run = step.run.func if hasattr(step.run, "func") else step.run
    with rehearsal("modelled", (memory_bound, *COMMANDS)):
        data = step.run(tmp_path)
    assert data["nominal_gbps"] == 3352 and data["summary"], run
    for row in data["rows"]:
        assert row["candidates"]["ours"].get("correct") is True, (row, data["summary"])
        row["input_bytes"] = 1 << 30  # as large as claims of bandwidth ask
        row["candidates"]["ours"]["gbps"] = 1e5
        for name in ("cublaslt", "deepgemm", "cublas", "torch", "eager"):  # those that a CPU lacks
            if name in row["candidates"]:
                row["candidates"][name] = {"median_us": 20.0}
    claims = [claim for claim in families.all_claims() if claim.step == step.name]
    assert claims
    for claim in claims:
        assert claim.judge(data)[0] is True, (claim.name, claim.judge(data))


@pytest.mark.parametrize("family", ["norm", "activation", "optimizer", "moe", "gemm"])
def test_gpu_tests_rehearse(family: str) -> None:
    """Those that take seconds; docs/how-to-prove.md says how to rehearse all."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu and not large"]
    done = subprocess.run(
        [*command, f"tests/bench/test_gpu_{family}.py"],
        cwd=ROOT, env={**os.environ, "PROOF_REHEARSAL": "modelled"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
