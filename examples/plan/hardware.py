"""Every assumption of the planner, once, with its source. Nothing else in `examples.plan` holds a number about hardware.

How a value is known (`kind`):

- datasheet: the vendor's peak, dense.
- report: the DeepSeek-V3 report says so.
- published: somebody's measurement of one kernel or one transfer, not of a training run.
- calibrated: taken from DeepSeek's published trace of one pair of chunks of training (github.com/deepseek-ai/profile-data,
  train.json: H800, EP64, 4K tokens, 4 MoE layers; 129.0 ms). It has no head, no pipeline, no optimizer: the total
  of a step is a prediction. No calibrated value was chosen by looking at a total.
- measured: from this repository's ledger (bench/ledger), when there is one for the device: see `ledger`.
- assumed: our judgement, for want of any of these.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from examples.errors import UserError

Kind = Literal["datasheet", "report", "published", "calibrated", "measured", "assumed"]
GB, GIB, TERA = 1e9, 2**30, 1e12


@dataclass(frozen=True)
class Value:
    """One number, in units of SI, and where it comes from."""

    number: float
    kind: Kind
    source: str


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU in nodes of `node_size`. FLOP/s are dense; bytes/s of links are per GPU and direction."""

    name: str
    fp8: Value
    bf16: Value
    sms: Value
    memory: Value  # bytes a process can allocate
    hbm: Value
    nvlink: Value  # what dispatch and combine reach, not the nominal peak
    internode: Value
    price: Value  # dollars per GPU hour
    node_size: int = 8


@dataclass(frozen=True)
class Efficiencies:
    """What kernels and links reach of the peaks; shares of 1 unless said otherwise.

    GEMM and attention: of the tensor peak of the SMs they have (all but those of communication while it runs).
    """

    fp8_dense: Value
    fp8_grouped: Value
    fp8_wgrad: Value
    bf16_gemm: Value
    attention_forward: Value
    attention_backward: Value
    memory_bound: Value  # of the HBM's peak, for the bytes that `model_costs` counts
    stream: Value  # of the HBM's peak, for plain streams (optimizer, accumulation of gradients)
    internode_alone: Value
    dispatch_overlapped: Value
    combine_overlapped: Value
    collective: Value  # of `internode`, reduce-scatter and all-gather of ZeRO-1
    overlap_loss: Value  # of a pair's span, that no compute kernel fills
    rank_imbalance: Value  # load of the fullest EP rank over the mean
    comm_sms: Value  # count
    runtime_bytes: Value  # CUDA context, NCCL, libraries
    fragmentation: Value  # of what is allocated


def _sxm(tflops: float) -> Value:
    return Value(tflops * TERA, "datasheet", "SXM, dense, without sparsity")


_CX7 = Value(50 * GB, "report", "3.2.2: InfiniBand 50 GB/s; one 400 Gb/s NIC per GPU")

HARDWARE = {
    "h800": Hardware(
        name="H800 SXM 80 GB",
        fp8=_sxm(1979),
        bf16=_sxm(989),
        sms=Value(132, "datasheet", "GH100, SXM"),
        memory=Value(79.1 * GIB, "published", "total memory that torch reports on 80 GB Hopper cards"),
        hbm=Value(3.35 * TERA, "datasheet", "HBM3"),
        nvlink=Value(155 * GB, "published", "DeepEP, EP8 on H800: 153 / 158 GB/s; report 3.2.2: 160 GB/s"),
        internode=_CX7,
        price=Value(2.0, "report", "table 1"),
    ),
    "h100": Hardware(
        name="H100 SXM 80 GB",
        fp8=_sxm(1979),
        bf16=_sxm(989),
        sms=Value(132, "datasheet", "GH100, SXM"),
        memory=Value(79.1 * GIB, "published", "total memory that torch reports"),
        hbm=Value(3.35 * TERA, "datasheet", "HBM3"),
        nvlink=Value(320 * GB, "assumed", "as UCCL-EP reached on H200: same NVLink, 450 GB/s nominal"),
        internode=_CX7,
        price=Value(2.5, "assumed", "order of rental prices; --price changes it"),
    ),
    "h200": Hardware(
        name="H200 SXM 141 GB",
        fp8=_sxm(1979),
        bf16=_sxm(989),
        sms=Value(132, "datasheet", "GH100, SXM"),
        memory=Value(139.8 * GIB, "published", "total memory that torch reports"),
        hbm=Value(4.8 * TERA, "datasheet", "HBM3e"),
        nvlink=Value(320 * GB, "published", "UCCL-EP, EP8 on H200: 320 / 319 GB/s"),
        internode=_CX7,
        price=Value(3.0, "assumed", "order of rental prices; --price changes it"),
    ),
    "h20": Hardware(
        name="H20 SXM 96 GB",
        fp8=_sxm(296),
        bf16=_sxm(148),
        sms=Value(78, "datasheet", "GH100 with 78 SMs"),
        memory=Value(95.1 * GIB, "assumed", "96 GB less what 80 GB cards lack of their nominal size"),
        hbm=Value(4.0 * TERA, "datasheet", "HBM3"),
        nvlink=Value(320 * GB, "assumed", "as UCCL-EP reached on H200: same NVLink"),
        internode=_CX7,
        price=Value(1.0, "assumed", "order of rental prices; --price changes it"),
    ),
    "b200": Hardware(
        name="B200 SXM 180 GB (these kernels are for sm_90a and do not run on it)",
        fp8=_sxm(4500),
        bf16=_sxm(2250),
        sms=Value(148, "datasheet", "GB100"),
        memory=Value(178 * GIB, "assumed", "180 GB as DGX B200 lists"),
        hbm=Value(8.0 * TERA, "datasheet", "HBM3e"),
        nvlink=Value(643 * GB, "published", "DeepEP V2, EP8 on SM100 with 24 SMs: 643 / 675 GB/s"),
        internode=Value(50 * GB, "assumed", "one 400 Gb/s NIC per GPU, as DGX B200 has"),
        price=Value(5.0, "assumed", "order of rental prices; --price changes it"),
    ),
}

_TRACE = "trace, 4 layers, 112 of 132 SMs: {}"

EFFICIENCIES = Efficiencies(
    # 1033.5M multiply-adds per token and layer (MLA and shared expert forward and Dgrad, up-projections again).
    fp8_dense=Value(
        0.535,
        "calibrated",
        _TRACE.format("18.84 ms for 16.93 TFLOP = 899 TFLOP/s") + "; DeepGEMM alone, 132 SMs: 0.39 to 0.77",
    ),
    fp8_grouped=Value(
        0.600,
        "calibrated",
        _TRACE.format("22.93 ms for 23.09 TFLOP = 1007 TFLOP/s") + "; DeepGEMM alone: 0.61 to 0.68",
    ),
    # 27.49 ms in union, of which the FP32 accumulators take 4 x 1.14 ms at `stream`.
    fp8_wgrad=Value(
        0.497,
        "calibrated",
        _TRACE.format("22.9 ms for 19.12 TFLOP, besides reading and writing FP32 gradients")
        + "; DeepGEMM alone, 132 SMs: 0.47 to 0.55",
    ),
    bf16_gemm=Value(0.75, "published", "cuBLAS on H100: 763 / 795 TFLOP/s at 4096^3 / 8192^3, 0.77 / 0.80"),
    attention_forward=Value(0.661, "calibrated", _TRACE.format("4.95 ms for 2.75 TFLOP = 555 TFLOP/s")),
    attention_backward=Value(
        0.502, "calibrated", _TRACE.format("17.02 ms for 7.15 TFLOP, pre- and post-processing included")
    ),
    memory_bound=Value(
        0.42,
        "calibrated",
        "trace: 33.8 ms in 4 layers of norms, casts, transpositions, SwiGLU, permutation, rotary; 14.3 ms at peak",
    ),
    stream=Value(0.85, "assumed", "a copy reached 0.9 on H200 (research/comm.md 8.2)"),
    internode_alone=Value(
        0.88, "published", "DeepEP EP64 on H800: 51 / 50 GB/s counting the own node, 3.5 of 4 are remote"
    ),
    dispatch_overlapped=Value(
        0.55,
        "calibrated",
        "trace: 4.35 and 3.41 ms for 107 MB to other nodes, beside compute",
    ),
    combine_overlapped=Value(0.665, "calibrated", "trace: 6.18 ms for 206 MB to other nodes, beside compute"),
    collective=Value(0.8, "assumed", "ring of large messages over one NIC per GPU"),
    overlap_loss=Value(0.036, "calibrated", "trace: compute kernels fill 124.3 of 129.0 ms"),
    rank_imbalance=Value(
        1.1,
        "assumed",
        "the trace routes evenly; our demo's fullest expert has 1.12 with the routing bias, and a rank has several experts",
    ),
    comm_sms=Value(20, "report", "3.2.2"),
    runtime_bytes=Value(2.0 * GIB, "assumed", "context and modules 0.6, NCCL channels of some groups 1.4"),
    fragmentation=Value(0.02, "assumed", "equal shapes in every step; expandable segments"),
)


def get_hardware(name: str) -> Hardware:
    """The card of that name; `UserError` lists them."""
    if name.lower() not in HARDWARE:
        raise UserError(f"--hardware: must be one of {', '.join(HARDWARE)}; got {name!r}")
    return HARDWARE[name.lower()]


def changed(assumptions: Efficiencies, changes: dict[str, float]) -> Efficiencies:
    """Some assumptions replaced, as the command line's --assume does."""
    names = [field.name for field in fields(Efficiencies)]
    for name, number in changes.items():
        if name not in names:
            raise UserError(f"--assume: must be one of {', '.join(names)}; got {name!r}")
        if not number >= 0:
            raise UserError(f"--assume: {name} must not be negative; got {number}")
        assumptions = replace(assumptions, **{name: Value(number, "assumed", "--assume")})
    return assumptions


def rows(hardware: Hardware, assumptions: Efficiencies) -> list[tuple[str, Value]]:
    """All values that a plan on this card rests on."""
    cards = [(f.name, getattr(hardware, f.name)) for f in fields(Hardware)]
    return [(name, value) for name, value in cards if isinstance(value, Value)] + [
        (f.name, getattr(assumptions, f.name)) for f in fields(Efficiencies)
    ]
