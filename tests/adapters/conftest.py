"""Makes `cases.py`, the tables that several test files of this folder share, importable under any way of starting pytest."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
