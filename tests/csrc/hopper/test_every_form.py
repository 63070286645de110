"""Every form of every wrapper becomes the instruction it promises, as often as it is written; packed conversions.

test_vocabulary.py asks whether each family is there at all; here each kernel of every_form.cu is counted, so that a form
which turns into another one (a lost hint, scope, operand class or rank) is found.
"""

from __future__ import annotations

import collections
import ctypes
import re
from pathlib import Path

import pytest
import torch

from bench.kernels import parse_log
from tests.csrc import building

HERE = Path(__file__).parent
SOURCE = HERE / "every_form.cu"
HINTS = {"normal": 0, "evict_first": 1, "evict_last": 2}


@pytest.fixture(scope="module")
def build() -> tuple[Path, str]:
    strict = "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage,-Werror"
    return building.device_object(SOURCE, [strict])


@pytest.fixture(scope="module")
def sass(build: tuple[Path, str]) -> dict[str, list[str]]:
    """Kernel: its instructions with their operands, predicates removed."""
    kernels = {}
    for mangled, code in building.machine_code(build[0]).items():
        name = re.search(r"\d(use_[a-z0-9_]+?)(?:I(.+?)EEv|E)", mangled)
        if name is not None:
            arguments = (name[2] or "").replace("LN6hopper9CacheHint", "hint")
            kernels[name[1] + (f"<{arguments}>" if arguments else "")] = code
    return kernels


def families(instructions: list[str], pattern: str) -> dict[str, int]:
    """Opcodes that match, counted."""
    opcodes = (i.split()[0] for i in instructions)
    return dict(collections.Counter(o for o in opcodes if re.match(pattern, o)))


def each_once(*opcodes: str) -> dict[str, int]:
    return dict.fromkeys(opcodes, 1)


def hinted(sass: dict[str, list[str]], kernel: str, hint: str) -> list[str]:
    return next(v for k, v in sass.items() if k.startswith(f"{kernel}<hintE{HINTS[hint]}"))


def test_builds_without_warning_spill_or_notice(build: tuple[Path, str]) -> None:
    log = build[1]
    assert not re.search(r"\(C75\d\d\)|serialized", log), log
    found = parse_log(log, SOURCE.name)
    assert len(found) > 60 and not [k.name for k in found if k.stack_bytes or k.spill_bytes]


def test_a_constant_id_reserves_that_barrier_only(build: tuple[Path, str]) -> None:
    used = {kernel.mangled: kernel.barriers for kernel in parse_log(build[1], SOURCE.name)}
    assert next(n for name, n in used.items() if "use_barrier" in name) == 4  # 0, 1, 2 and 3
    assert max(used.values()) == 4, used


def test_host_bodies_compile_without_cuda() -> None:
    building.objects([SOURCE], [*building.STRICT, "-O0"])  # nobody runs them


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_wgmma_of_every_n(sass: dict[str, list[str]], n: int) -> None:
    code = sass[f"use_wgmma<Li{n}E>"]
    assert families(code, "[QH]GMMA") == {
        f"QGMMA.64x{n}x32.F32.E4M3.E4M3": 3,
        f"HGMMA.64x{n}x16.F32.BF16": 6,
    }
    assert len(families(code, "WARPGROUP.ARRIVE")) == 1 and not families(code, "STL|LDL")
    issued = [i for i in code if i.startswith(("QGMMA", "HGMMA"))]
    # A from registers is the operand after the accumulator; tnsp marks MN-major operands.
    in_registers = [bool(re.match(r"\S+ R\d+, R\d+,", i)) for i in issued]
    assert in_registers == [False, False, True, False, False, False, False, True, True]
    transposed = [("A" if ".tnspA" in i else "") + ("B" if ".tnspB" in i else "") for i in issued]
    assert transposed == ["", "", "", "", "A", "B", "AB", "", "B"]


def test_other_operand_formats(sass: dict[str, list[str]]) -> None:
    expected = {"QGMMA.64x64x32.F32.E5M2.E5M2": 2, "HGMMA.64x64x16.F32": 2}
    assert families(sass["use_other_formats"], "[QH]GMMA") == expected


@pytest.mark.parametrize("hint", HINTS)
def test_tensor_copies(sass: dict[str, list[str]], hint: str) -> None:
    loads, stores = hinted(sass, "use_tma_load", hint), hinted(sass, "use_tma_store", hint)
    reductions = hinted(sass, "use_tma_reduce", hint)
    plain = {f"UTMALDG.{rank}D": 1 for rank in (1, 2, 3, 4, 5)} | {"UTMALDG.2D": 2}
    multicast = {f"{name}.MULTICAST": count for name, count in plain.items()}
    assert families(loads, "UTMALDG") == plain | multicast
    assert families(loads, "UTMACCTL") == {"UTMACCTL.PF": 1}
    assert families(loads, "UTMAPF") == {f"UTMAPF.L2.{rank}D": 1 for rank in (1, 2, 3, 4, 5)}
    assert families(stores, "UTMASTG") == {f"UTMASTG.{rank}D": 1 for rank in (1, 2, 3, 4, 5)}
    forms = ("1D.ADD", "2D.MIN", "3D.MAX", "4D.INC", "5D.DEC", "1D.AND", "1D.OR", "1D.XOR")
    assert families(reductions, "UTMAREDG") == {f"UTMAREDG.{form}": 1 for form in forms}
    # The policy is a second descriptor register of the instruction.
    for code, opcode in ((loads, "UTMALDG"), (stores, "UTMASTG"), (reductions, "UTMAREDG")):
        with_policy = [bool(re.search(r"desc\[", i)) for i in code if i.startswith(opcode)]
        assert set(with_policy) == {hint != "normal"}, (opcode, code)


@pytest.mark.parametrize("hint", HINTS)
def test_bulk_copies(sass: dict[str, list[str]], hint: str) -> None:
    code = hinted(sass, "use_bulk", hint)
    expected = each_once("UBLKCP.S.G.MULTICAST", "UBLKCP.G.S", "UBLKCP.S.S") | {"UBLKCP.S.G": 2}
    assert families(code, "UBLKCP") == expected
    with_policy = sum("desc[" in i for i in code if i.startswith("UBLKCP"))
    assert with_policy == (0 if hint == "normal" else 4)  # all but the copy to a peer
    assert families(code, "UTMACMDFLUSH") == {"UTMACMDFLUSH": 1}


def test_bulk_reductions_of_every_type(sass: dict[str, list[str]]) -> None:
    integers, narrow = ("", ".S32", ".U64", ".S64"), (".F16.RN", ".BF16.RN")
    expected = {f"UBLKRED.G.S.{op}{t}": 1 for op in ("MIN", "MAX") for t in integers + narrow}
    expected |= {f"UBLKRED.G.S.ADD{t}": 1 for t in (*integers[:3], *narrow, ".F32.RN", ".F64.RN")}
    expected |= {f"UBLKRED.G.S.{op}{t}": 2 for op in ("AND", "OR", "XOR") for t in ("", ".U64")}
    expected |= each_once("UBLKRED.G.S.INC", "UBLKRED.G.S.DEC")
    assert families(sass["use_bulk_reduce"], "UBLKRED") == expected


def test_cp_async(sass: dict[str, list[str]]) -> None:
    code = sass["use_cp_async"]
    expected = each_once("LDGSTS.E", "LDGSTS.E.64.ZFILL", "LDGSTS.E.BYPASS.128.ZFILL")
    assert families(code, "LDGSTS") == expected
    assert families(code, "ARRIVES") == each_once(
        "ARRIVES.LDGSTSBAR.64.TRANSCNT", "ARRIVES.LDGSTSBAR.64.ARVCNT"
    )


def test_mbarrier(sass: dict[str, list[str]]) -> None:
    code = sass["use_mbarrier"]
    arrivals = families(code, r"SYNCS\.ARRIVE")
    assert sum(arrivals.values()) == 5 and any(".A0T" in a for a in arrivals)  # one of them expect_tx alone
    assert {"SYNCS.EXCH.64", "SYNCS.CCTL.IV"} <= set(families(code, "SYNCS"))
    waits = families(code, r"SYNCS\.PHASECHK")
    assert (
        set(waits) == {"SYNCS.PHASECHK.TRANS64.TRYWAIT"} == set(families(sass["use_cluster_wait"], "SYNCS"))
    )
    # Only the wait of cluster scope invalidates L1: the reason why it is not the default.
    assert not families(code, "CCTL") and families(sass["use_cluster_wait"], "CCTL")


def test_fences(sass: dict[str, list[str]]) -> None:
    code = sass["use_fence"]
    scopes = families(code, "MEMBAR")
    assert set(scopes) == {"MEMBAR.ALL.CTA", "MEMBAR.ALL.GPU", "MEMBAR.ALL.SYS"}  # cluster: as gpu
    assert set(families(code, "FENCE")) == {"FENCE.VIEW.ASYNC.S", "FENCE.VIEW.ASYNC.G"}
    assert families(code, "UTMACCTL") == {"UTMACCTL.IV": 2}


def test_warp(sass: dict[str, list[str]]) -> None:
    code = sass["use_warp"]
    assert families(code, "ELECT") == {"ELECT": 2}
    redux = ("", ".OR", ".XOR", ".MAX", ".MIN", ".SUM", ".MAX.S32", ".MIN.S32", ".SUM.S32")
    assert families(code, "REDUX") == {f"REDUX{kind}": 1 for kind in redux}
    assert families(code, "VOTE") == {"VOTE.ANY": 2, "VOTE.ALL": 1}
    # One for float, two for the 64-bit key, four for the float4.
    assert families(code, "SHFL") == {"SHFL.IDX": 5, "SHFL.BFLY": 3, "SHFL.UP": 1, "SHFL.DOWN": 1}


def test_matrix(sass: dict[str, list[str]]) -> None:
    forms = [f"16.{m}{count}" for m in ("M88", "MT88") for count in ("", ".2", ".4")]
    expected = {f"{op}.{form}": 1 for op in ("LDSM", "STSM") for form in forms}
    assert families(sass["use_matrix"], "LDSM|STSM") == expected


def test_barriers_clusters_and_registers(sass: dict[str, list[str]]) -> None:
    assert families(sass["use_barrier"], "BAR") == {"BAR.SYNC.DEFER_BLOCKING": 3, "BAR.ARV": 1}
    code = sass["use_cluster"]
    assert families(code, "UCGABAR") == {"UCGABAR_ARV": 3, "UCGABAR_WAIT": 3}
    assert families(code, "MEMBAR") == {"MEMBAR.ALL.GPU": 2}  # the relaxed arrive has none
    assert set(families(sass["use_registers"], "USETMAXREG")) == {
        "USETMAXREG.DEALLOC.CTAPOOL",
        "USETMAXREG.TRY_ALLOC.CTAPOOL",
    }


@pytest.mark.parametrize("code, width", [("h", ".U8"), ("t", ".U16"), ("j", ""), ("m", ".64"), ("f", "")])
def test_flags(sass: dict[str, list[str]], code: str, width: str) -> None:
    kernel = sass[f"use_flags<{code}>"]
    # cluster and gpu scope are one on sm_90; relaxed and acquire each once.
    expected = {f"LDG.E{width}.STRONG.{scope}": count for scope, count in (("SM", 2), ("GPU", 4), ("SYS", 2))}
    assert families(kernel, "LDG") == expected
    stores = families(kernel, "STG")
    assert stores == {name.replace("LDG", "STG"): count for name, count in expected.items()}
    assert sum(families(kernel, "MEMBAR").values()) == 4  # before each release store, before no relaxed one
    assert families(kernel, "CCTL") == {"CCTL.IVALL": 3}  # after each acquire wider than the CTA


def test_16_byte_flags_are_one_access(sass: dict[str, list[str]]) -> None:
    code = sass["use_wide_flags"]
    assert families(code, "STG") == each_once("STG.E.128.STRONG.GPU", "STG.E.128.STRONG.SYS")
    assert families(code, "LDG.E.128") == {"LDG.E.128.STRONG.GPU": 1}


@pytest.mark.parametrize("code, width", [("j", ""), ("5uint2", ".64"), ("6float4", ".128")])
def test_hints(sass: dict[str, list[str]], code: str, width: str) -> None:
    kernel = sass[f"use_hints<{code}>"]
    assert families(kernel, "LDG") == {f"LDG.E.NA{width}": 1}  # not the non-coherent path: see load_stream
    assert families(kernel, "STG") == {f"STG.E.EF{width}": 1}


ATOMICS = {  # type code: what SASS calls each operation
    "j": ("ADD", "MIN", "MAX", "INC", "DEC", "AND", "OR", "XOR"),
    "i": ("ADD.S32", "MIN.S32", "MAX.S32", "AND", "OR", "XOR"),
    "m": ("ADD.64", "MIN.64", "MAX.64", "AND.64", "OR.64", "XOR.64"),
    "l": ("MIN.S64", "MAX.S64", "AND.64", "OR.64", "XOR.64"),
    "f": ("ADD.F32.FTZ.RN",),
    "d": ("ADD.F64.RN",),
}


@pytest.mark.parametrize("code", ATOMICS)
def test_atomics(sass: dict[str, list[str]], code: str) -> None:
    kernel = sass[f"use_atomics<{code}>"]
    red = {f"REDG.E.{op}.STRONG.{s}": 1 for op in ATOMICS[code] for s in ("GPU", "SYS")}
    atom = {
        f"ATOMG.E.{op}.STRONG.{scope}": count
        for op in ATOMICS[code]
        for scope, count in (("SM", 1), ("GPU", 2), ("SYS", 1))
    }
    wide = ".64" if code in "mld" else ""
    atom |= {f"ATOMG.E.EXCH{wide}.STRONG.SYS": 1, f"ATOMG.E.CAS{wide}.STRONG.GPU": 1}
    # Each operation: released three times, acquired twice; exchange and compare-exchange are acq_rel.
    releases, acquires = 3 * len(ATOMICS[code]) + 2, 2 * len(ATOMICS[code]) + 2
    if code == "j":  # and the two counters
        red["REDG.E.ADD.STRONG.GPU"] += 1
        atom["ATOMG.E.ADD.STRONG.GPU"] += 1
        releases += 1
    assert families(kernel, "REDG") == red
    assert families(kernel, "ATOMG") == atom
    assert sum(families(kernel, "MEMBAR").values()) == releases
    assert families(kernel, "CCTL") == {"CCTL.IVALL": acquires}


def test_arithmetic_and_conversions(sass: dict[str, list[str]]) -> None:
    # A product and a sum of which only one is a wrapper stay two instructions.
    assert families(sass["use_single_roundings"], "FMUL|FADD|FFMA") == {"FMUL": 3, "FADD": 3}
    code = sass["use_math"]
    approximations = ("MUFU.EX2", "MUFU.LG2", "MUFU.RSQ", "MUFU.RCP")
    assert set(approximations) <= set(families(code, "MUFU"))
    code = sass["use_convert"]
    assert families(code, "F2FP.SATFINITE") == {"F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C": 2}
    assert families(code, r"F2FP\.F16") == {"F2FP.F16.E4M3.UNPACK_B": 4}


def test_dependent_launch_and_clock(sass: dict[str, list[str]]) -> None:
    code = sass["use_time"]
    assert families(code, "ACQBULK|PREEXIT|BPT") == each_once("ACQBULK", "PREEXIT", "BPT.TRAP")
    assert any("SR_GLOBALTIMER" in i for i in code)


# ---- conversions of several values --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host() -> ctypes.CDLL:
    return building.library("packed_conversions", [HERE / "packed_conversions.cpp"], runtime=False)


def run(library: ctypes.CDLL, name: str, x: torch.Tensor, out: torch.Tensor, count: int) -> torch.Tensor:
    pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr())
    getattr(library, name)(*pointers, ctypes.c_int64(count))
    return out


def some_floats() -> torch.Tensor:
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), generator=torch.Generator().manual_seed(1))
    specials = torch.tensor(
        [0.0, -0.0, 448.0, 464.0, -1e30, float("inf"), -float("inf"), float("nan"), 2**-9, 2**-10]
    )
    halfway = (torch.arange(1, 2**12).float() / 2**12).repeat_interleave(2) * torch.tensor(
        [1.0, -1.0]
    ).repeat(2**12 - 1)
    x = torch.cat([bits.to(torch.int32).view(torch.float32), specials, halfway])
    return x[: x.numel() // 4 * 4].contiguous()


@pytest.mark.parametrize("name, per_word", [("to_e4m3x2_all", 2), ("to_e4m3x4_all", 4)])
def test_packed_e4m3(host: ctypes.CDLL, name: str, per_word: int) -> None:
    x = some_floats()
    got = run(host, name, x, torch.empty(x.numel(), dtype=torch.uint8), x.numel())
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    expected = torch.where(x.isnan(), torch.tensor(0x7F, dtype=torch.uint8), expected)
    assert torch.equal(got, expected)


def test_packed_bf16(host: ctypes.CDLL) -> None:
    x = some_floats()
    got = run(host, "pack_bf16_all", x, torch.empty(x.numel(), dtype=torch.int16), x.numel())
    expected = torch.where(
        x.isnan(), torch.tensor(0x7FFF, dtype=torch.int16), x.to(torch.bfloat16).view(torch.int16)
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["e4m3x2_all", "e4m3x4_all"])
def test_unpacked_e4m3(host: ctypes.CDLL, name: str) -> None:
    codes = torch.cat([torch.arange(256), torch.arange(256).flip(0), torch.arange(256) * 7 % 256]).to(
        torch.uint8
    )
    got = run(host, name, codes, torch.empty(codes.numel()), codes.numel())
    expected = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(got.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(
        got[numbers].view(torch.int32), expected[numbers].view(torch.int32)
    )  # the sign of zero too


def test_unpacked_bf16(host: ctypes.CDLL) -> None:
    words = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    got = run(host, "bf16x2_all", words, torch.empty(words.numel()), words.numel())
    assert torch.equal(got.view(torch.int32), words.to(torch.int32) << 16)
