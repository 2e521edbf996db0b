"""One thread a process and repeatable examples: tests run side by side on small machines."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; more threads than cores stall one another
os.environ["LC_ALL"] = "C.UTF-8"  # messages in English, wherever the tests run

import pytest
from hypothesis import settings

settings.register_profile("keye", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("keye")

pytest_plugins = ["tests.support.fixtures"]


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Files of the folder that may lie beside the checkout (official configurations and recorded cases), by their path
    in it; the test is skipped where it is not there."""
    golden = os.environ.get("KEYE_GOLDEN")
    folder = Path(golden).parent if golden else Path(__file__).parents[2] / "shared"

    def find(path: str) -> Path:
        if not (folder / path).exists():
            pytest.skip(f"{folder / path} is not here")
        return folder / path

    return find
