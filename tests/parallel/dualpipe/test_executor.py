"""Schedules run by processes: loss and gradients are those of one process, with real split backward passes."""

import os
import signal
import time

import pytest
import torch
from torch import nn

from deepseek_ops import ArgumentError
from deepseek_ops.parallel.dualpipe import Kind, generate, ops, simulate
from deepseek_ops.parallel.dualpipe.executor import Executor, one_after_the_other
from deepseek_ops.parallel.group import Group
from deepseek_ops.parallel.layout import Layout
from deepseek_ops.parallel.mesh import launch

TOKENS, WIDTH, VOCABULARY = 6, 8, 11


class Embedding(nn.Module):
    """Stage 0: takes tokens, hands on two tensors of different shape and a mask without gradient."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.wide = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, tokens):
        h = self.table(tokens)
        return h, self.wide(h), tokens % 2 == 0


class Block(nn.Module):
    """A stage between: the shapes depend on the micro-batch."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.mix, self.side = nn.Linear(WIDTH, WIDTH), nn.Linear(3 * WIDTH, 3 * WIDTH, bias=False)

    def forward(self, h, wide, even):
        h = h + torch.tanh(self.mix(self.norm(h))) * even[:, None]
        return h, wide + self.side(wide), even


class Head(nn.Module):
    """The last stage."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.RMSNorm(4 * WIDTH), nn.Linear(4 * WIDTH, VOCABULARY)

    def forward(self, h, wide, even):
        return self.out(self.norm(torch.cat([h, wide], -1)))


def stage(index, stages):
    """The module of a stage; the same on every rank that asks."""
    torch.manual_seed(index)
    return Embedding() if index == 0 else Head() if index == stages - 1 else Block()


def microbatch(index):
    """Tokens and targets; sequences of different length."""
    generator = torch.Generator().manual_seed(100 + index)
    return torch.randint(VOCABULARY, (2, TOKENS + index % 3), generator=generator).unbind()


def loss(logits, targets):
    return nn.functional.cross_entropy(logits, targets, reduction="sum") / 40


def alone(stages, microbatches):
    """Losses and gradients of one process."""
    modules = [stage(index, stages) for index in range(stages)]
    losses = []
    for index in range(microbatches):
        tokens, targets = microbatch(index)
        h = (tokens,)
        for module in modules[:-1]:
            h = module(*h)
        losses.append(loss(modules[-1](*h), targets))
        losses[-1].backward()
    return [one.item() for one in losses], [[p.grad for p in module.parameters()] for module in modules]


def along(rendezvous, name, ranks, microbatches, steps):
    """One rank's losses, gradients by (direction, stage), and peak of live chunks."""
    _, rank, size = rendezvous
    schedule = generate(name, ranks, microbatches)
    with launch(Layout(size, pp=size), rendezvous=rendezvous, timeout=60) as mesh:
        held = schedule.held(rank)
        modules = [stage(s, schedule.stages) for _, s in held]
        calls = []

        def overlap(forward, backward):
            calls.append(1)
            forward()
            backward()

        executor = Executor(schedule, modules, mesh.pp, loss=loss, overlap=overlap)
        count = schedule.microbatches_per_direction

        def data(last):
            for direction, s in held:
                if s == (schedule.stages - 1 if last else 0):
                    return [microbatch(direction * count + m)[last] for m in range(count)]
            return ()

        for _ in range(steps):
            losses = executor.step(data(0), data(1))
        own = [[p.grad.clone() for p in module.parameters()] for module in modules]
        executor.reduce_mirrored()
        reduced = [[p.grad for p in module.parameters()] for module in modules]
        return [one.item() for one in losses], own, reduced, executor.peak_chunks, len(calls)


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches"),
    [("dualpipe", 2, 4), ("dualpipe", 2, 8), ("dualpipev", 2, 5), ("1f1b", 2, 4), ("interleaved", 2, 4), ("zb1p", 2, 5),
     ("dualpipe", 4, 10), ("dualpipev", 3, 6)],
)  # fmt: skip
def test_equal_to_one_process(world, name, ranks, microbatches):
    schedule = generate(name, ranks, microbatches)
    losses, gradients = alone(schedule.stages, microbatches)
    results = world(ranks, along, name, ranks, microbatches, 1, timeout=120)
    found = {}
    for rank, (some, _, _, _, _) in enumerate(results):
        for direction, s in schedule.held(rank):
            if s == schedule.stages - 1:
                found[direction] = some
    assert [one for direction in sorted(found) for one in found[direction]] == pytest.approx(losses, rel=1e-6)
    timeline = simulate(schedule)
    for rank, (_, _, reduced, peak, pairs) in enumerate(results):
        assert peak == timeline.peak_chunks[rank]
        assert pairs == sum(len(ops(action)) == 2 for action in schedule.orders[rank])
        for (_, s), ours in zip(schedule.held(rank), reduced, strict=True):
            for mine, expected in zip(ours, gradients[s], strict=True):
                torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


def test_mirrored_copies_end_with_the_same_bits_and_steps_add_up(world):
    one, other = world(2, along, "dualpipe", 2, 4, 2, timeout=120)
    for s in range(2):  # rank 0 holds stages 0 and 1, rank 1 stages 1 and 0
        for mine, mirrored in zip(one[2][s], other[2][1 - s], strict=True):
            assert torch.equal(mine, mirrored)
    _, gradients = alone(2, 4)
    for mine, expected in zip(one[2][0], gradients[0], strict=True):
        torch.testing.assert_close(mine, 2 * expected, rtol=1e-6, atol=2e-6)
    assert any(not torch.equal(mine, total) for mine, total in zip(one[1][0], one[2][0], strict=True))


def optimizer(modules):
    return torch.optim.AdamW([p for module in modules for p in module.parameters()], lr=3e-3)


def trained_alone(stages, microbatches, steps):
    """Mean loss of every step of one process."""
    modules = [stage(index, stages) for index in range(stages)]
    adam, means = optimizer(modules), []
    for _ in range(steps):
        total = 0.0
        for index in range(microbatches):
            h = (microbatch(index)[0],)
            for module in modules[:-1]:
                h = module(*h)
            one = loss(modules[-1](*h), microbatch(index)[1])
            one.backward()
            total += one.item()
        adam.step()
        adam.zero_grad()
        means.append(total / microbatches)
    return means


def trained(rendezvous, name, microbatches, steps):
    """Sum of the losses of this rank, by step."""
    _, rank, size = rendezvous
    schedule = generate(name, size, microbatches)
    with launch(Layout(size, pp=size), rendezvous=rendezvous, timeout=60) as mesh:
        modules = [stage(s, schedule.stages) for _, s in schedule.held(rank)]
        executor, adam, sums = Executor(schedule, modules, mesh.pp, loss=loss), optimizer(modules), []
        count = schedule.microbatches_per_direction
        for _ in range(steps):
            inputs, targets = (), ()
            for direction, s in schedule.held(rank):
                mine = [microbatch(direction * count + m) for m in range(count)]
                inputs = [tokens for tokens, _ in mine] if s == 0 else inputs
                targets = [wanted for _, wanted in mine] if s == schedule.stages - 1 else targets
            sums.append(sum(one.item() for one in executor.step(inputs, targets)))
            executor.reduce_mirrored()
            adam.step()
            adam.zero_grad()
        return sums


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_twenty_steps_equal_one_process(world, name):
    """Issue 6: losses of 20 steps of AdamW to 1e-6 in fp32."""
    steps = [sum(parts) / 4 for parts in zip(*world(2, trained, name, 4, 20, timeout=120), strict=True)]
    expected = trained_alone(2 if name == "dualpipe" else 4, 4, 20)
    assert steps == pytest.approx(expected, rel=1e-6)
    assert expected[-1] < 0.7 * expected[0]


def broken(rendezvous, what):
    _, rank, size = rendezvous
    start = time.monotonic()
    try:
        with launch(Layout(size, pp=size), rendezvous=rendezvous, timeout=3) as mesh:
            schedule = generate("dualpipe", 2, 4)

            def failing(logits, targets):
                if rank == 1:
                    if what == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise ValueError("no loss today")
                return loss(logits, targets)

            executor = Executor(
                schedule, [stage(s, 2) for _, s in schedule.held(rank)], mesh.pp, loss=failing
            )
            tokens, targets = zip(microbatch(0), microbatch(0), strict=True)
            executor.step(tokens, targets)
    except Exception as error:  # noqa: BLE001 (the test looks at it)
        return type(error).__name__, str(error), getattr(error, "__notes__", []), time.monotonic() - start
    return None


def test_a_rank_that_fails_ends_the_others_within_the_deadline(world):
    waiting, failed = world(2, broken, "raise")
    assert failed[:2] == ("ValueError", "no loss today")
    assert any("rank 1, op" in note and "@1" in note for note in failed[2])
    assert waiting[0] == "ParallelError" and "rank 1 seems to be the cause" in waiting[1]
    assert "ing the " in waiting[1].splitlines()[0] and waiting[3] < 20


def test_a_killed_rank_ends_the_others_within_the_deadline(world):
    waiting, _ = world(2, broken, "kill", lost=(1,))
    assert waiting[0] == "ParallelError" and "rank 1 seems to be the cause" in waiting[1] and waiting[3] < 20


def test_arguments_are_checked():
    schedule = generate("dualpipev", 1, 2)
    modules = [stage(0, 2), stage(1, 2)]
    with pytest.raises(ArgumentError, match=r"group: must have the schedule's 2 ranks; got 1"):
        Executor(generate("dualpipe", 2, 4), modules, Group.alone(), loss=loss)
    with pytest.raises(
        ArgumentError, match=r"stages: must be one module for each of .*\(0, 0\), \(0, 1\); got 1 modules"
    ):
        Executor(schedule, modules[:1], Group.alone(), loss=loss)
    executor = Executor(schedule, modules, Group.alone(), loss=loss)
    with pytest.raises(
        ArgumentError, match="inputs: must be 2 on rank 0, one per micro-batch of stage 0; got 1"
    ):
        executor.step([microbatch(0)[0]], [])


def backward_first(forward, backward):
    """The halves of a pair are independent, so an overlap may begin with either."""
    backward()
    forward()


@pytest.mark.parametrize("overlap", [one_after_the_other, backward_first])
def test_dualpipev_on_one_rank_needs_no_process_group(overlap):
    """Both stages here: a step of DualPipeV is a step of one process, W's put off and all."""
    schedule = generate("dualpipev", 1, 4)
    assert any(op.kind is Kind.W for _, op in schedule.walk(0))
    modules = [stage(0, 2), stage(1, 2)]
    data = [microbatch(index) for index in range(4)]
    executor = Executor(schedule, modules, Group.alone(), loss=loss, overlap=overlap)
    losses = executor.step([tokens for tokens, _ in data], [targets for _, targets in data])
    expected, gradients = alone(2, 4)
    assert [one.item() for one in losses] == pytest.approx(expected, rel=1e-6)
    for module, wanted in zip(modules, gradients, strict=True):
        for parameter, gradient in zip(module.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-6)


class Noting(Executor):
    """Knows which kind of op is at work."""

    now = None

    def _compute(self, op, arrived):
        self.now = op.kind
        return super()._compute(op, arrived)


def test_gradients_of_weights_wait_for_their_w():
    """After Bi nothing is in `.grad`: every weight gets one gradient per micro-batch, in B or in W, never in Bi."""
    schedule = generate("dualpipev", 1, 4)
    modules, seen = [stage(0, 2), stage(1, 2)], []
    executor = Noting(schedule, modules, Group.alone(), loss=loss)
    for index, module in enumerate(modules):
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda _, index=index: seen.append((index, executor.now))
            )
    data = [microbatch(index) for index in range(4)]
    executor.step([tokens for tokens, _ in data], [targets for _, targets in data])
    done = [(op.stage, op.kind) for _, op in schedule.walk(0) if op.kind in (Kind.B, Kind.W)]
    count = {0: 3, 1: 3}  # parameters of Embedding and of Head
    assert sorted(seen) == sorted(one for one in done for _ in range(count[one[0]]))
    assert {kind for _, kind in seen} == {Kind.B, Kind.W}
