"""What the tests share: where the repository is, and the tiny model, loaded once."""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import model  # noqa: E402

TINY = ROOT / "tiny" / "weights"


def relative(a, b):
    """‖a − b‖ / ‖b‖."""
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="session")
def tiny():
    return model.load(TINY)


@pytest.fixture(scope="session", autouse=True)
def threads():
    model.keep_memory()
    torch.use_deterministic_algorithms(False)
