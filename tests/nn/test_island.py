"""FP8 modules in a compiled model: the same numbers, one quantisation per step, gradients added in place."""

import pytest
import torch

from deepseek_ops.nn import Fp8Experts, Fp8Linear, Fp8MLP, attention_linear


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.mlp, self.experts = Fp8Linear(64, 64), Fp8MLP(64, 32), Fp8Experts(4, 64, 32)
        self.o = Fp8Linear(64, 64, cache="e5m6")

    def forward(self, x, gate, idx):
        x = torch.tanh(self.linear(x) * 3)
        heads = x.view(-1, 2, 32)
        cu = torch.arange(0, x.shape[0] + 1, x.shape[0], dtype=torch.int32)
        x = x + attention_linear(self.o, torch.cat((heads, heads[..., :8]), -1), heads, x[:, :8], heads, cu, softmax_scale=0.2)  # fmt: skip
        return self.mlp(x) + self.experts.routed(x, gate, idx)


def test_the_compiled_model_is_the_model():
    torch.manual_seed(0)
    model, twin = Model(), Model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.1)
    twin.load_state_dict(model.state_dict())
    compiled = torch.compile(twin, backend="eager")  # traces; leaves the arithmetic between the islands alone
    x, gate, idx = torch.randn(20, 64), torch.rand(20, 2), torch.rand(20, 4).topk(2, dim=1).indices
    adams = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
    for number in range(1, 4):
        for _ in range(2):
            losses = [run(x, gate, idx).square().mean() for run in (model, compiled)]
            assert torch.equal(*losses)
            for loss in losses:
                loss.backward()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
        with torch.no_grad():
            assert torch.equal(model(x, gate, idx), compiled(x, gate, idx))
        counts = [c.refreshes for m in twin.modules() for c in getattr(m, "weight_caches", {}).values()]
        assert counts == [number] * 6
        for adam in adams:
            adam.step()
            adam.zero_grad()


@pytest.mark.parametrize("mode", ["linear", "mlp"])
def test_fullgraph_says_what_is_in_the_way(mode):
    module = Fp8Linear(16, 16) if mode == "linear" else Fp8MLP(16, 8)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda x: module(x) * 2, backend="eager", fullgraph=True)(torch.randn(2, 16))
