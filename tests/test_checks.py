"""Argument checks: a message names the argument, the rule and the value."""

import pytest
import torch

from deepseek_ops._checks import ArgumentError, ceil_div, check_choice, check_range, check_tensor, round_up


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_tensor("x", 3), r"x: must be a torch.Tensor; got int"),
        (lambda: check_tensor("x", torch.ones(2), dtype=torch.int64), r"x: must be int64; got float32"),
        (
            lambda: check_tensor("x", torch.ones(2), ndim=2),
            r"x: must have 2 dimension\(s\); got shape \(2,\)",
        ),
        (
            lambda: check_tensor("x", torch.ones(2, 3), shape=(None, 4)),
            r"x: must have shape \[\*, 4\]; got .*\(2, 3\)",
        ),
        (
            lambda: check_tensor("x", torch.ones(1), device=torch.device("meta")),
            r"x: must be on meta; got cpu",
        ),
        (lambda: check_choice("mode", "c", ("a", "b")), r"mode: must be one of 'a', 'b'; got 'c'"),
        (lambda: check_range("eps", float("nan"), low=0), r"eps: must be in \[0, inf\]; got nan"),
        (lambda: check_range("p", 2.0, low=0, high=1), r"p: must be in \[0, 1\]; got 2.0"),
    ],
)
def test_messages(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


def test_what_fits_passes():
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    assert (
        check_tensor(
            "x", x, dtype=(torch.bfloat16, torch.float32), ndim=(1, 2), shape=(2, None), device=x.device
        )
        is x
    )
    check_choice("mode", "a", ("a",))
    check_range("p", 0.5, low=0, high=1)
    assert (ceil_div(0, 128), ceil_div(1, 128), ceil_div(129, 128), round_up(5, 4)) == (0, 1, 2, 8)
