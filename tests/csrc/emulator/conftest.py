import pytest

from tests.csrc.building import library
from tests.csrc.emulator.planted import KERNELS, Planted


@pytest.fixture(scope="session")
def planted() -> Planted:
    """The cases of kernels/*.cu, compiled."""
    return Planted(library("planted", [KERNELS / "library.cpp"], sorted(KERNELS.glob("*.cu"))))
