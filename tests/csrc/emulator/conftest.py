import pytest

from tests.csrc.emulator.planted import Planted


@pytest.fixture(scope="session")
def planted() -> Planted:
    """The cases of kernels/*.cu, compiled."""
    return Planted()
