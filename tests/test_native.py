"""Bindings, ops on native kernels, emulator options: shown with the toy family of tests/csrc/toy."""

import gc
import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

import deepseek_ops
from deepseek_ops import ArgumentError, BackendError, KernelError, _native_ops, _registry
from tests.native import toy_module, toy_modules

HOST = ("emulated", "checked")
on_each_host_target = pytest.mark.parametrize("target", HOST)


@pytest.fixture(scope="module")
def toy():
    """The toy ops, with their kernels."""
    modules = toy_modules()
    ops = {
        "axpy": _registry.declare(
            "toy_axpy(Tensor x, float a, Tensor? y, str fault) -> Tensor",
            reference=lambda x, a, y, fault: a * x + (0 if y is None else y),
            fake=lambda x, a, y, fault: torch.empty_like(x),
        ),
        "add_": _registry.declare(
            "toy_add_(Tensor x, Tensor(a!) out) -> ()",
            reference=lambda x, out: out.add_(x) and None,
            fake=lambda x, out: None,
        ),
        "add_lists_": _registry.declare(
            "toy_add_lists_(Tensor[] xs, float[] by, Tensor(a!)[] outs) -> ()",
            reference=lambda xs, by, outs: (
                [out.add_(b * x) for x, b, out in zip(xs, by, outs, strict=True)] and None
            ),
            fake=lambda xs, by, outs: None,
        ),
        "reverse": _registry.declare(
            "toy_reverse(Tensor x) -> Tensor",
            reference=lambda x: x.flip(0),
            fake=lambda x: torch.empty_like(x),
        ),
    }
    for target, module in modules.items():
        _native_ops.attach(target, module)
    yield type("Toy", (), {name: staticmethod(op) for name, op in ops.items()})
    for op in ops.values():
        del _registry.OPS[op.name]


@pytest.fixture
def on(monkeypatch):
    """Chooses a target for the toy ops even where deepseek_ops itself was installed without it."""

    def choose(target):
        monkeypatch.setenv("DEEPSEEK_OPS_BACKEND", target)
        return toy_module(target)

    return choose


# --- values ------------------------------------------------------------------------------------------------------


@on_each_host_target
@pytest.mark.parametrize("n", [0, 1, 127, 128, 300])
def test_kernels_compute(toy, on, target, n):
    on(target)
    x, y = torch.randn(n), torch.randn(n)
    assert torch.equal(toy.axpy(x, 2.0, y, "none"), 2 * x + y)
    assert torch.equal(toy.axpy(x, -1.0, None, "none"), -x)
    expected = torch.cat([part.flip(0) for part in x.split(128)]) if n else x
    assert torch.equal(toy.reverse(x), expected)


@on_each_host_target
def test_in_place_ops_write_and_autograd_notices(toy, on, target):
    on(target)
    x, out = torch.randn(40), torch.randn(40)
    expected = out + x
    before = out._version
    assert toy.add_(x, out) is None
    assert torch.equal(out, expected) and out._version == before + 1 and x._version == 0

    leaf = torch.randn(40, requires_grad=True)
    kept = torch.zeros(40)
    product = leaf * kept  # saves kept for the gradient of leaf
    toy.add_(x, kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        frozen = torch.zeros(40)
        toy.add_(x, frozen)  # has no version, and needs none
        assert torch.equal(frozen, x)


@on_each_host_target
def test_lists_of_tensors_and_of_numbers(toy, on, target):
    on(target)
    sizes = (0, 1, 127, 300)
    xs, outs = ([torch.randn(n) for n in sizes] for _ in range(2))
    by = [1.0, -2.0, 0.5, 3.0]
    expected = [out + b * x for x, b, out in zip(xs, by, outs, strict=True)]
    assert toy.add_lists_(xs, by, outs) is None
    assert all(map(torch.equal, outs, expected))
    assert [t._version for t in outs] == [1] * 4 and [t._version for t in xs] == [0] * 4
    toy_module(target).toy_add_lists_([], [], [])
    toy.add_lists_(tuple(xs), tuple(by), [o.detach() for o in outs])
    assert [t._version for t in outs] == [2] * 4  # views share it
    torch.library.opcheck(toy.add_lists_.raw, (xs, by, outs))


@on_each_host_target
def test_elements_of_lists_are_checked_like_single_tensors(target):
    module, room = toy_module(target), torch.zeros(1000)
    parts = list(room.split(100))

    def refused(*args):
        with pytest.raises(ArgumentError) as error:
            module.toy_add_lists_(*args)
        return str(error.value)

    one = [1.0]
    assert refused(room, one, parts[:1]) == "xs: must be a list of tensors; got Tensor"
    assert refused(None, one, parts[:1]) == "xs: must be a list of tensors; got NoneType"
    assert refused([parts[0], 3], one, parts[:1]) == "xs[1]: must be a torch.Tensor; got int"
    assert refused(parts[:1], 1.0, parts[1:2]) == "by: must be a list of numbers; got float"
    assert refused(parts[:2], [1.0, "x"], parts[2:4]) == "by[1]: must be a number; got 'x'"
    assert refused(parts[:2], [1.0, True], parts[2:4]) == "by[1]: must be a number; got True"
    assert refused(parts[:2], [1.0], parts[2:4]) == "by: must be as long as xs and outs; got 1"
    assert refused([torch.zeros(3).double()], one, [torch.zeros(3)]) == "xs[0]: must be float32; got float64"
    assert refused([torch.zeros(3)], one, [torch.zeros(3, device="meta")]).startswith("outs[0]: must ")
    # Nothing written overlaps anything: inputs, other elements of its own list, whatever the order of addresses.
    for xs, outs in ((0, 0), (1, 1)):
        text = refused([parts[5], parts[xs]], [1.0, 1.0], [parts[3], parts[outs]])
        assert text.startswith("outs[1]: must not overlap xs[1]; got 400 bytes at ")
    text = refused(parts[:2], [1.0, 1.0], [parts[4], parts[4]])
    assert text.startswith(("outs[0]: must not overlap outs[1]", "outs[1]: must not overlap outs[0]"))
    inside = refused([room[:900]], one, [parts[4]])
    assert inside.startswith("outs[0]: must not overlap xs[0]; got 400 bytes at ")
    outside = refused([parts[4], *parts[7:8]], [1.0, 1.0], [room[350:650], room[:100]])
    assert outside.startswith("outs[0]: must not overlap xs[0]; got 1200 bytes at ")
    behind_a_long_one = refused([room[:900], parts[9]], [1.0, 1.0], [torch.zeros(900), room[850:950]])
    assert behind_a_long_one.startswith("outs[1]: must not overlap xs[0]")
    module.toy_add_lists_([parts[0], parts[0]], [1.0, 1.0], parts[1:3])  # inputs may be read twice


@on_each_host_target
def test_a_list_of_thousands(target):
    module, room, more = toy_module(target), torch.zeros(2000, 2), torch.zeros(2000, 2)
    with pytest.raises(ArgumentError, match="by: must be as long as xs and outs; got 1"):  # the others hold
        module.toy_add_lists_(list(more), [1.0], list(room))
    with pytest.raises(ArgumentError, match=r"outs\[1999\]: must not overlap xs\[77\]"):
        module.toy_add_lists_(list(more), [1.0], [*room[:1999], more[77]])


@on_each_host_target
def test_torch_sees_an_ordinary_op(toy, on, target):
    on(target)
    torch.library.opcheck(toy.axpy.raw, (torch.randn(5), 2.0, torch.randn(5), "none"))
    torch.library.opcheck(toy.add_.raw, (torch.randn(5), torch.randn(5)))
    x = torch.randn(200)
    compiled = torch.compile(
        lambda t: toy.axpy(t, 3.0, None, "none") + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), 3 * x + 1)
    assert torch.equal(toy.axpy(torch.nn.Parameter(x), 3.0, None, "none"), 3 * x)  # another type of tensor


# --- what native code is given -------------------------------------------------------------------------------------


@on_each_host_target
def test_arguments_arrive_as_they_are(target):
    module = toy_module(target)

    def described(x, *rest):
        with pytest.raises(ArgumentError) as error:
            module.toy_describe(x, *rest)
        return str(error.value)

    x = torch.zeros(6, 8, dtype=torch.bfloat16)[1:5, ::2].t()
    assert described(x, True, 2**40, 0.5, torch.float8_e4m3fn) == (
        f"described: bfloat16 strides [2, 8] of shape [4, 4] 1 {2**40} 0.500000 float8_e4m3fn; got cpu"
    )
    assert "strides [] of shape [] 0 -3 none int32" in described(
        torch.zeros(()), False, -3, None, torch.int32
    )
    assert "shape [0, 3]" in described(torch.zeros(0, 3), False, 1, None, torch.int32)
    for dtype in (
        *(
            torch.bool,
            torch.uint8,
            torch.int8,
            torch.int16,
            torch.int32,
            torch.int64,
            torch.uint16,
            torch.uint32,
        ),
        *(torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
    ):
        name = str(dtype).removeprefix("torch.")
        text = described(torch.empty(2, dtype=dtype), False, 1, None, dtype)
        assert text.startswith(f"described: {name} ") and f" {name}; got" in text


NOT_TENSORS = [
    (None, "x: must be a torch.Tensor; got NoneType"),
    ([1.0], "x: must be a torch.Tensor; got list"),
    (torch.zeros(2, dtype=torch.complex64), "x: must have a dtype that kernels know; got torch.complex64"),
    (torch.zeros((1,) * 7), "x: must have at most 6 dimensions; got 7"),
    (torch.zeros(2, device="meta"), "x: must be "),
    (torch.eye(2).to_sparse(), "x: must be a dense tensor in memory; got "),
]


@on_each_host_target
@pytest.mark.parametrize(("value", "message"), NOT_TENSORS, ids=[m[:45] for _, m in NOT_TENSORS])
def test_what_is_no_tensor_in_memory_is_refused(target, value, message):
    with pytest.raises(ArgumentError) as error:
        toy_module(target).toy_strict(value)
    assert str(error.value).startswith(message)


@on_each_host_target
def test_fake_tensors_are_refused(target):
    with FakeTensorMode():
        fake = torch.zeros(4, 4)
    with pytest.raises(ArgumentError, match=r"x: must hold data, .*; got FakeTensor"):
        toy_module(target).toy_strict(fake)


@on_each_host_target
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.zeros(4), r"x: must have 2 dimension\(s\); got shape \[4\]"),
        (
            lambda: torch.zeros(4, 4).t(),
            r"x: must have stride 1 along dimension 1 .*; got strides \[1, 4\] of shape",
        ),
        (
            lambda: torch.zeros(4, 3),
            r"x: must have a stride of a multiple of 16 bytes along dimension 0 .*; got 12 bytes",
        ),
        (lambda: torch.zeros(5, 8)[:, 1:], r"x: must start at a multiple of 16 bytes .*; got 0x"),
    ],
)
def test_layout_rules_name_argument_rule_and_value(target, make, message):
    with pytest.raises(ArgumentError, match=message):
        toy_module(target).toy_strict(make())


@on_each_host_target
def test_layouts_that_are_legal(target):
    strict = toy_module(target).toy_strict
    for x in (
        torch.zeros(4, 4),
        torch.zeros(0, 3),
        torch.zeros(1, 3),
        torch.zeros(4, 8)[:, :3],
        torch.zeros(3, 4)[:, :1],
    ):
        strict(x)


@on_each_host_target
def test_scalars_and_their_number(target):
    module, x = toy_module(target), torch.zeros(4)
    for args, message in (
        (("yes", 1, None, torch.int8), "flag: must be a bool; got 'yes'"),
        ((True, 1.5, None, torch.int8), "count: must be a 64-bit integer; got 1.5"),
        ((True, 2**63, None, torch.int8), "count: must be a 64-bit integer; got 9223372036854775808"),
        ((True, True, None, torch.int8), "count: must be a 64-bit integer; got True"),
        ((True, 1, "x", torch.int8), "real: must be a number; got 'x'"),
        ((True, 1, None, "int8"), "dtype: must be a torch.dtype that kernels know; got int8"),
    ):
        with pytest.raises(ArgumentError) as error:
            module.toy_describe(x, *args)
        assert str(error.value) == message
    with pytest.raises(TypeError, match=r"toy_reverse\(x, out\) takes 2 arguments; got 1"):
        module.toy_reverse(x)
    with pytest.raises(ArgumentError, match=r"fault: must be none or past_end; got maybe"):
        module.toy_axpy(x, 1.0, None, "maybe", torch.empty(4))
    with pytest.raises(ArgumentError, match=r"y: must have shape \[4\]; got shape \[3\]"):
        module.toy_axpy(x, 1.0, torch.zeros(3), "none", torch.empty(4))
    with pytest.raises(ArgumentError, match=r"y: must be float32; got float64"):
        module.toy_axpy(x, 1.0, x.double(), "none", torch.empty(4))


@on_each_host_target
def test_outputs_may_not_overlap_anything(target):
    module, room = toy_module(target), torch.zeros(100)
    with pytest.raises(
        ArgumentError, match=r"out: must not overlap x; got 160 bytes at 0x.* and 160 bytes at 0x"
    ):
        module.toy_reverse(room[:40], room[39:79])
    module.toy_reverse(room[:40], room[40:80])
    with pytest.raises(ArgumentError, match="out: must not overlap y"):
        module.toy_axpy(room[:10], 1.0, room[20:30], "none", room[29:39])


def test_calls_leak_nothing():
    module, x, out = toy_module("emulated"), torch.zeros(4), torch.zeros(4)
    import sys

    before = sys.getrefcount(x), sys.getrefcount(torch.int8)
    for _ in range(50):
        module.toy_add_(x, out)
        with pytest.raises(ArgumentError):
            module.toy_describe(x, True, 1, None, torch.int8)
    gc.collect()
    after = sys.getrefcount(x), sys.getrefcount(torch.int8)
    assert after[0] == before[0] and after[1] <= before[1] + 1  # a dtype is kept once


def test_cuda_module_imports_without_a_driver_and_refuses_cpu_tensors():
    module = toy_module("cuda")
    assert module.build_info()["cuda_compiler"] and "toy_axpy" in module.build_info()["kernels"]
    with pytest.raises(ArgumentError, match=r"x: must be on a CUDA device; got cpu"):
        module.toy_strict(torch.zeros(4, 4))


# --- the emulator's side ---------------------------------------------------------------------------------------------


def test_checked_knows_whose_memory_it_is(toy, on):
    on("checked")
    with pytest.raises(KernelError, match=r"global\.bounds.*") as error:
        toy.axpy(torch.randn(40), 1.0, None, "past_end")
    text = str(error.value)
    assert "axpy" in text and "seed=0" in text and "toy.cu" in text
    assert torch.equal(toy.axpy(torch.ones(40), 1.0, None, "none"), torch.ones(40))  # and goes on


def test_a_dropped_step_is_found_and_options_end_with_the_block(toy, on):
    on("checked")
    x = torch.randn(128)
    toy.reverse(x)
    sites = deepseek_ops.drop_sites()
    assert [(s.kind, s.count) for s in sites] == [("barrier_sync", 128)] and sites[0].site.startswith(
        "toy.cu:"
    )
    with deepseek_ops.emulation(drop=(sites[0].kind, sites[0].site), seed=5):
        with pytest.raises(KernelError, match=r"race") as error:
            toy.reverse(x)
        assert "seed=5" in str(error.value)
        with deepseek_ops.emulation(off={"race", "smem.uninitialised"}):
            toy.reverse(x)  # nobody looks
    assert torch.equal(toy.reverse(x), x.flip(0))


@on_each_host_target
def test_equal_seeds_give_equal_runs(toy, on, target):
    on(target)
    digests = []
    for seed in (1, 2, 1):
        with deepseek_ops.emulation(seed=seed, asynchrony="lazy", schedule="random"):
            toy.reverse(torch.ones(256))
        digests.append(deepseek_ops.last_statistics().digest)
    assert digests[0] == digests[2] != digests[1]
    statistics = deepseek_ops.last_statistics()
    assert statistics.switches > 0 and statistics.seconds > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"asynchrony": "slow"}, "asynchrony: must be one of 'eager', 'random', 'lazy'; got 'slow'"),
        ({"schedule": "fair"}, "schedule: must be one of 'fifo', 'random', 'starve', 'pct'; got 'fair'"),
        ({"seed": -1}, "seed: must be an integer of at least 0; got -1"),
        ({"sm_count": 0}, "sm_count: must be an integer of at least 1; got 0"),
        ({"off": "race"}, "off: must be a collection of rule names; got 'race'"),
        ({"drop": ("fence",)}, "drop: must be (kind"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ArgumentError) as error, deepseek_ops.emulation(**options):
        pass
    assert str(error.value).startswith(message)


def test_every_option_reaches_the_module():
    module = toy_module("checked")
    with deepseek_ops.emulation(
        seed=2**63,
        asynchrony="eager",
        schedule="pct",
        sm_count=7,
        resident_clusters=2,
        fast_tensor_core=True,
        off={"race"},
        drop=("fence", "", 3),
        max_reports=1,
        step_budget=10**9,
        deadline_seconds=5.0,
    ):
        deepseek_ops._emulation.prepare("checked", module)
        module.toy_reverse(torch.ones(4), torch.empty(4))
    with pytest.raises(ArgumentError, match="options: must be fields of emulator::Options; got tempo"):
        module.set_options({"tempo": 1})
    with pytest.raises(ArgumentError, match="asynchrony: must be one of eager, lazy, random; got now"):
        module.set_options({"asynchrony": "now"})
    module.set_options({})
    deepseek_ops._emulation._applied.clear()


# --- reasons ----------------------------------------------------------------------------------------------------------


def test_an_op_without_a_kernel_says_so(toy, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_OPS_BACKEND", "checked")
    monkeypatch.setattr(_registry, "absent_reason", lambda name: None)
    monkeypatch.delitem(_registry.OPS["toy_reverse"].kernels, "checked", raising=False)
    with pytest.raises(
        BackendError, match=r"'checked' cannot run 'toy_reverse': it has no kernel for 'toy_reverse'"
    ):
        toy.reverse(torch.ones(1))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ModuleNotFoundError("No module named x"), r"not built"),
        (
            ImportError("libstdc++.so.6: version `GLIBCXX_3.4.99' not found"),
            r"C\+\+ run-time library .*install libstdc\+\+6",
        ),
        (ImportError("undefined symbol: _Py_x"), r"another Python or machine: reinstall"),
    ],
)
def test_modules_that_do_not_load_say_what_to_do(error, says):
    assert re.search(says, _registry._not_loaded("emulated", error))
