"""What others make of our FP8 operands: cuBLASLt's blockwise product, DeepGEMM's, and fp64 as the judge of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .rows import EXACT_FP8, ROUNDED_BF16, Call, Row, relative_rms
from .steps import Data


@dataclass(frozen=True)
class VendorOperands:
    """Our operands as cuBLASLt wants them: M a multiple of 4, block scales transposed with K padded to 4 blocks."""

    a: Tensor
    scale_a: Tensor  # [M, ceil(K/128)], M contiguous
    b: Tensor
    scale_b: Tensor  # [ceil(K/128) padded to 4, ceil(N/128)], K contiguous, padding 1
    rows: int

    @classmethod
    def of(cls, a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor) -> VendorOperands:
        """Layout work that a user would do once, or not at all: it is not timed."""
        blocks, rows = scale_b.shape[1], a.shape[0]
        padded = torch.ones(scale_b.shape[0], -(-blocks // 4) * 4, device=b.device)
        padded[:, :blocks] = scale_b
        if rows % 4:
            more = torch.zeros(-rows % 4, a.shape[1], device=a.device, dtype=torch.uint8).view(a.dtype)
            a = torch.cat([a.view(torch.uint8), more.view(torch.uint8)]).view(a.dtype)
        return cls(a, scale_a.T, b, padded.T, rows)

    def multiply(self, dtype: torch.dtype) -> Tensor:
        """cuBLASLt 1x128 by 128x128 (research: torch.nn.functional.scaled_mm, torch >= 2.10)."""
        recipe = torch.nn.functional.ScalingType
        out = torch.nn.functional.scaled_mm(
            self.a,
            self.b.T,
            self.scale_a,
            recipe.BlockWise1x128,
            self.scale_b,
            recipe.BlockWise128x128,
            output_dtype=dtype,
        )
        return out[: self.rows]


def deepgemm(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, outputs: dict[str, Tensor]) -> Call:
    """DeepGEMM's dense product into outputs["deepgemm"]."""

    def call() -> None:
        import deep_gemm  # type: ignore[import-not-found]  # absent on most machines: compare() notes that

        out = outputs.setdefault(
            "deepgemm", torch.empty(a.shape[0], b.shape[0], device="cuda", dtype=torch.bfloat16)
        )
        # Our scale layout is its MN-major, TMA-aligned one: no transform is timed.
        deep_gemm.fp8_gemm_nt((a, scale_a.T[: a.shape[0]]), (b, scale_b), out)

    return call


def exact_product(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor) -> Tensor:
    """fp64 of the dequantised operands: rows of a with 1 x 128 scales, b with block scales."""
    k = a.shape[1]
    left = a.double() * scale_a[:, : a.shape[0]].double().T.repeat_interleave(128, 1)[:, :k]
    right = (
        b.double() * scale_b.double().repeat_interleave(128, 0)[: b.shape[0]].repeat_interleave(128, 1)[:, :k]
    )
    return left @ right.T


def judge(timed: dict[str, Row], outputs: dict[str, Tensor], exact: Tensor) -> None:
    """Whether each bf16 result that there is is right, against as many rows of the exact one."""
    for name, out in outputs.items():
        if "median_us" in timed.get(name, {}):
            timed[name]["rel_rms_bf16"] = relative_rms(out[: exact.shape[0]], exact)
            timed[name]["correct"] = timed[name]["rel_rms_bf16"] < ROUNDED_BF16


def judge_precise(ours: Row, got: Tensor, exact: Tensor) -> None:
    """The same of our fp32 result."""
    ours["rel_rms"] = relative_rms(got[: exact.shape[0]], exact)
    ours["correct"] = ours.get("correct", True) and ours["rel_rms"] <= EXACT_FP8


def partial_sums() -> Data:
    """cuBLASLt on one 128-deep slice with unit scales against the tensor-core model, bit for bit."""
    from deepseek_ops.reference.tensor_core import tensor_core_accumulate

    cases = []
    for name, data in slices():
        a, b = data
        ones = torch.ones(1, a.shape[0]).cuda(), torch.ones(-(-b.shape[0] // 128), 1).cuda()
        got = VendorOperands.of(a.cuda(), ones[0], b.cuda(), ones[1]).multiply(torch.float32).cpu()
        want = tensor_core_accumulate(a, b)
        differing = (got.view(torch.int32) != want.view(torch.int32)).nonzero().tolist()
        first = [
            {"index": at, "device": float(got[tuple(at)]), "emulator": float(want[tuple(at)])}
            for at in differing[:8]
        ]
        cases.append(
            {
                "name": name,
                "values": got.numel(),
                "equal": not differing,
                "differing": len(differing),
                "first": first,
            }
        )
    wrong = sum(not case["equal"] for case in cases)
    return {
        "cases": cases,
        "verdict": "differs" if wrong else "equal",
        "summary": f"{len(cases) - wrong} of {len(cases)} cases equal",
    }


def slices() -> list[tuple[str, tuple[Tensor, Tensor]]]:
    """Operands of one slice, [128, 128] each: normal, positive, wide exponents, subnormal."""
    generator = torch.Generator().manual_seed(5)
    kinds: dict[str, Callable[[], Tensor]] = {
        "normal": lambda: torch.randn(128, 128, generator=generator),
        "positive": lambda: torch.rand(128, 128, generator=generator),
        "wide": lambda: (
            torch.randn(128, 128, generator=generator)
            * torch.exp2(torch.randint(-8, 8, (128, 128), generator=generator).float())
        ),
        "subnormal": lambda: torch.randn(128, 128, generator=generator) * 2**-8,
    }
    return [
        (name, (draw().to(torch.float8_e4m3fn), draw().to(torch.float8_e4m3fn)))
        for name, draw in kinds.items()
    ]
