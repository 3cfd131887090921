"""What the tests share: where the repository is, and the tiny model, loaded once."""
import os
import sys
from pathlib import Path

# One thread for all: the tests start processes of their own, and threads that wait for each other
# on a shared machine cost more than they give. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
from support.machine import keep_memory  # noqa: E402

TINY = ROOT / "tiny" / "weights"


def relative(a, b):
    """‖a − b‖ / ‖b‖."""
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="session")
def tiny():
    return model.load(TINY)


@pytest.fixture(scope="session", autouse=True)
def threads():
    keep_memory()
    torch.use_deterministic_algorithms(False)
