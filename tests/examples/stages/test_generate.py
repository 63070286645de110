"""Where speculative and greedy decoding part ways is said with the logits that decided."""

import pytest
import torch

from examples.configs import get_config, parse_overrides
from examples.model.transformer import Transformer
from examples.stages.generate import first_difference

from ..train.conftest import MICRO


@pytest.mark.parametrize("shorter", [False, True])
def test_the_first_difference_and_its_logits(shorter):
    torch.manual_seed(0)
    model = Transformer(parse_overrides(get_config("tiny"), MICRO).model).eval()
    plain = [[5, 6, 7], [8, 9, 10]]
    other = [[5, 6, 7], [8] if shorter else [8, 11, 10]]
    found = first_difference(model, [[1, 2], [3, 4]], plain, other)
    with torch.no_grad():
        logits = model.logits(torch.tensor([[3, 4, 8]]))[0, -1].float()
    wanted = [float(logits[9])] if shorter else [float(logits[9]), float(logits[11])]
    assert found == {"prompts": 1, "prompt": 1, "token": 1, "logits": wanted}
