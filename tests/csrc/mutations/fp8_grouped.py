"""Mutation runs of fp8_grouped."""

from __future__ import annotations

from tests.csrc.gemm import grouped_problem
from tests.csrc.gemm.test_fp8_gemm import BF16, FP32
from tests.csrc.mutation import Kernel, Site


def kernels() -> list[Kernel]:
    """Groups with ragged ends, empty ones, rows to clear; a surplus tile of a cluster; D that leaves by TMA and by rows."""

    def kernel(name: str, kind: int, dtype, tile, multicast, **how) -> Kernel:
        problem = grouped_problem.Problem(kind, dtype=dtype, positive=True, **how)

        def run(seed: int, asynchrony: int, schedule: int, drop: Site) -> str:
            problem.buffer.fill_(grouped_problem.CANARY)
            call = problem.call(tile, multicast, sms=2)
            report = grouped_problem.run([call], seed, asynchrony, schedule, check=True, drop=drop)
            return report or ("data" if problem.differing() else "")

        return Kernel(name, run, grouped_problem.drop_sites)

    grouped, masked = grouped_problem.GROUPED, grouped_problem.MASKED
    return [
        kernel(
            "fp8_gemm_grouped, 128x128 bf16, multicast b", grouped, BF16, (128, 128), "b",
            sizes=[70, 0, 300], n=136, k=1200, first=3, spare=2,
        ),
        kernel(
            "fp8_gemm_grouped, 64x128 bf16, 40 groups", grouped, BF16, (64, 128), "none",
            sizes=[g % 3 * 32 for g in range(40)], n=24, k=272,
        ),
        kernel(
            "fp8_gemm_masked, 128x160 fp32, multicast a", masked, FP32, (128, 160), "a",
            sizes=[150, 0, 20, *[0] * 40], n=328, k=1200, room=160,
        ),
    ]  # fmt: skip
