"""Plans that several tests count."""

from __future__ import annotations

from typing import Any

import pytest

from examples.configs import get_config
from examples.plan.hardware import get_hardware
from examples.plan.plan import Plan, make_plan


def plan_of(name: str = "v3_671b", card: str = "h800", **changes: Any) -> Plan:
    """The report's plan, changed."""
    values = {"gpus": 2048, "pp": 16, "ep": 64, "seq_len": 4096, "batch": 15360, **changes}
    return make_plan(values.pop("model", get_config(name).model), get_hardware(card), **values)


@pytest.fixture(scope="session")
def report_plan() -> Plan:
    return plan_of()
