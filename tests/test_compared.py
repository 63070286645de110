"""docs/compared.md: every call of ours that it names exists."""

import re
from pathlib import Path

import deepseek_ops
import deepseek_ops.nn

PAGE = Path(__file__).parents[1] / "docs" / "compared.md"
FAMILIES = ("activation", "attention", "gemm", "loss", "moe", "nn", "norm", "optimizer", "quantize")


def test_every_call_exists():
    named = set(re.findall(rf"`((?:{'|'.join(FAMILIES)})\.\w+)`", PAGE.read_text()))
    assert len(named) > 30
    for family, name in (call.split(".") for call in sorted(named)):
        assert hasattr(getattr(deepseek_ops, family), name), f"{family}.{name}"
