"""The model on several processes is the model: losses, gradients and weights of 20 steps, and every routing decision.

One process takes the ranks' rows as micro-batches, so that dense layers multiply operands of the same shapes. What differs is the
order of sums over ranks; so weights differ by roundings, and where two experts are nearly tied a rounding decides. There the
run on several processes is made to take the choice of one process; that this happens rarely, and only where scores are next to
equal, is part of what is tested. Exact ties, of experts with equal gates, are in every step of some of the runs.
"""

import pytest
import torch

from deepseek_ops.parallel.layout import Layout
from deepseek_ops.parallel.mesh import launch
from examples.configs.schedules import AdamWSettings
from examples.configs.tiny import CONFIG
from examples.model.config import ModelConfig
from examples.model.transformer import Transformer
from examples.rollout.replay import _replay
from examples.train.optim import MixedAdamW
from examples.train.parallel import is_expert, share_out_experts, sum_counts, zero_optimizer
from tests.parallel.rank import PATIENCE

STEPS, LENGTH, GAMMA = 20, 24, 0.001
LR = 2.2e-4  # the report's, after a warm-up: a step of AdamW makes a gradient's rounding as large as the gradient
CHECKED = (1, 10, 20)


def config(precision):
    shape = {**CONFIG.model.__dict__, "vocab_size": 128, "hidden_size": 128, "precision": precision}
    return ModelConfig(**shape)


def make(precision, ties):
    torch.manual_seed(5)
    model = Transformer(config(precision))
    if ties:  # experts 2i and 2i + 1 are chosen by equal gates, now and always
        for router in model.routers():
            with torch.no_grad():
                router.weight[1::2] = router.weight[::2]
            router.weight.requires_grad_(False)
    return model.train()


def rows(step, part):
    generator = torch.Generator().manual_seed(100 * (step % 4) + part)
    return torch.randint(0, 128, (1, LENGTH + 1), generator=generator)


def loss_of(model, step, part, parts):
    return model.loss(rows(step, part), mtp_weight=0.3, balance_alpha=1e-3, normalizer=parts * LENGTH)


def one_process(precision, ties, parts):
    """(losses of each step, gradients of the checked steps, choices by step, part and layer, final parameters)."""
    model = make(precision, ties)
    routers = list(model.routers())
    settings = AdamWSettings()
    optimizer = MixedAdamW(model, settings, torch.float32)
    losses, gradients, choices = [], {}, []
    for step in range(1, STEPS + 1):
        taken = [[[] for _ in routers] for _ in range(parts)]
        total = 0.0
        for part in range(parts):
            for router, into in zip(routers, taken[part], strict=True):
                router.intercept = recorder(into)
            output = loss_of(model, step, part, parts)
            output.loss.backward()
            optimizer.accumulate()
            total += output.loss.item()
        losses.append(total)
        choices.append(taken)
        norm, scale = optimizer.norm()
        if step in CHECKED:
            gradients[step] = {n: g.clone() for n, g in optimizer.grads.items()} | {"norm": norm}
        optimizer.step(step, LR * step / STEPS, scale)
        optimizer.zero()
        model.update_bias(0.0 if ties else GAMMA)
    return losses, gradients, choices, {n: p.detach().clone() for n, p in model.named_parameters()}


def recorder(into):
    def intercept(route, *args, **options):
        result = route(*args, **options)
        into.append(result[0])
        return result

    return intercept


def follower(want, differed):
    """Route, see whether one process chose the same, and take its choice."""

    def intercept(route, logits, bias, **options):
        result = route(logits, bias, **options)
        own = result[0]
        if torch.equal(own, want[0]):
            return result
        biased = logits.detach().sigmoid() + bias
        for token in (own != want[0]).any(1).nonzero().flatten().tolist():
            mine, theirs = (
                biased[token, own[token]].sort().values,
                biased[token, want[0][token]].sort().values,
            )
            groups = (
                biased[token]
                .view(options["num_groups"], -1)
                .topk(2)
                .values.sum(1)
                .sort(descending=True)
                .values
            )
            edge = groups[options["top_groups"] - 1] - groups[options["top_groups"]]
            differed.append(min(float((mine - theirs).abs().max()), float(edge)))
        return _replay(want[0], route, logits, bias, **options)

    return intercept


def several(rendezvous, layout, precision, ties, order, choices):
    with launch(layout, rendezvous=rendezvous, timeout=PATIENCE) as mesh:
        model = make(precision, ties)
        share_out_experts(model, mesh, order=order)
        settings = AdamWSettings()
        optimizer = zero_optimizer(model, mesh, settings, torch.float32)
        part, differed, losses, gradients = layout.dp_index(mesh.rank), [], [], {}
        for step in range(1, STEPS + 1):
            for router, want in zip(model.routers(), choices[step - 1][part], strict=True):
                router.intercept = follower(want, differed)
            output = loss_of(model, step, part, layout.dp)
            output.loss.backward()
            optimizer.accumulate()
            total = mesh.world.all_gather(output.loss.detach().double().view(1), phase="loss").sum()
            losses.append(float(total))
            norm, scale = optimizer.norm(settings.max_grad_norm)
            if step in CHECKED:
                gradients[step] = whole_gradients(optimizer) | {"norm": norm}
            optimizer.step(step, LR * step / STEPS, scale)
            optimizer.zero()
            sum_counts(model, mesh)
            model.update_bias(0.0 if ties else GAMMA)
        return losses, gradients, differed, {n: p.detach() for n, p in model.named_parameters()}


def whole_gradients(optimizer):
    out = {}
    for b in optimizer.buckets:
        flat = b.group.all_gather(b.grad, phase="gradients")
        for name, start in zip(b.names, b.starts, strict=True):
            shape = optimizer.params[name].shape
            out[name] = flat[start : start + shape.numel()].view(shape).clone()
    return out


def distance(got, want):
    """Norm of the difference over the norm."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def local(name, tensor, layout, ep):
    """A rank's part."""
    if not is_expert(name):
        return tensor
    share = CONFIG.model.num_experts // layout.ep
    return tensor[ep * share : (ep + 1) * share]


def apart_all(got, want):
    """`distance` of all tensors together."""
    return distance(
        torch.cat([got[n].flatten() for n in want]), torch.cat([t.flatten() for t in want.values()])
    )


def compare(world, layout, precision, ties, order):
    """Yields, rank by rank: losses (seen, wanted), {step: gradients (found, wanted)}, weights, gaps where it differed."""
    losses, gradients, choices, params = one_process(precision, ties, layout.dp)
    assert losses[-1] < losses[3]  # the same rows
    results = world(layout.world, several, layout, precision, ties, order, choices)
    for rank, (seen, found, differed, final) in enumerate(results):
        ep = layout.coordinates(rank).ep
        wanted = {step: {n: local(n, g, layout, ep) for n, g in gradients[step].items()} for step in CHECKED}
        weights = final, {n: local(n, p, layout, ep) for n, p in params.items()}
        yield (seen, losses), {step: (found[step], wanted[step]) for step in CHECKED}, weights, differed


def test_data_parallel_has_every_bit_of_one_process(world):
    for (seen, losses), gradients, weights, differed in compare(world, Layout(2), "fp32", False, "tree"):
        assert not differed and seen == losses
        for found, wanted in (*gradients.values(), weights):
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize(
    ("layout", "ties", "order"),
    [
        (Layout(2, ep=2), False, "tree"),
        (Layout(2, ep=2, node_size=1), True, "slots"),
        (Layout(4, ep=2), True, "tree"),
    ],
    ids=["EP2", "EP2 on two nodes, ties", "DP4 EP2, ties"],
)
def test_expert_parallel_in_fp32(world, layout, ties, order):
    for (seen, losses), gradients, weights, differed in compare(world, layout, "fp32", ties, order):
        assert len(differed) < 20 and max(differed, default=0.0) < 1e-5, differed
        assert seen == pytest.approx(losses, rel=1e-6)
        for found, wanted in (*gradients.values(), weights):
            assert found.keys() == wanted.keys()
            assert apart_all(found, wanted) < 1e-6
            assert max(distance(found[n], wanted[n]) for n in wanted) < 5e-6


def test_expert_parallel_in_fp8(world):
    """The first step's loss is equal; weight gradients are quantised in tiles of tokens, which are other tokens here.

    From then on what is quantised may fall to the other side of a code. The band is twice what the report allows FP8 itself.
    """
    for (seen, losses), gradients, weights, _ in compare(world, Layout(2, ep=2), "fp8", False, "slots"):
        assert seen[0] == pytest.approx(losses[0], rel=1e-6)
        assert seen == pytest.approx(losses, rel=5e-3)
        assert apart_all(*gradients[1]) < 1e-2
        assert apart_all(*weights) < 5e-3
