"""The examples on the kernels: the whole model trains and generates on every backend, with the bits of `modelled`."""

from dataclasses import replace

import pytest
import torch

import deepseek_ops
from deepseek_ops import _registry
from examples.model.transformer import Transformer
from examples.rollout.generate import generate
from examples.stages.tokenize import open_data
from examples.train.loop import Trainer
from tests.recording import WITHOUT_KERNELS, recording


@pytest.fixture(params=["emulated", "checked"])
def native(request):
    """A backend that runs kernels on this CPU."""
    reason = _registry.absent_reason(request.param)
    if reason:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


def trained(config, root, folder):
    """Losses and weights after two steps."""
    _, train, val = open_data(root)
    trainer = Trainer(config, folder, train, val)
    losses = [trainer.train_step()["loss"] for _ in range(2)]
    return losses, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_training_on_kernels_has_the_bits_of_the_model(
    micro, tokenized, tmp_path, native, precision, monkeypatch
):
    """The backends come from the environment, as for `python -m examples.run`."""
    config = replace(micro, model=replace(micro.model, precision=precision))
    monkeypatch.setenv("DEEPSEEK_OPS_BACKEND", f"{native},modelled")
    with recording() as ran:
        losses, weights = trained(config, tokenized, tmp_path / "kernels")
    assert ran["modelled"] <= WITHOUT_KERNELS
    assert {"rms_norm", "route", "linear_cross_entropy", "clip_grad_norm"} <= ran[native]
    monkeypatch.setenv("DEEPSEEK_OPS_BACKEND", "modelled")
    want, want_weights = trained(config, tokenized, tmp_path / "modelled")
    assert losses == want
    for name, weight in weights.items():
        assert torch.equal(weight, want_weights[name]), name


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_generation_on_kernels_has_the_bits_of_the_model(micro, native, precision):
    torch.manual_seed(0)
    model = Transformer(replace(micro.model, precision=precision)).eval()

    def answers(*backends):
        with deepseek_ops.backend(*backends), recording() as ran:
            result = generate(model, [[1, 2, 3], [4, 5, 6, 7, 8]], 4, eos=None)
        return result.tokens, ran

    tokens, ran = answers(native, "modelled")
    assert ran["modelled"] <= WITHOUT_KERNELS
    assert tokens == answers("modelled")[0]
