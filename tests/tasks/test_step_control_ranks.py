"""Two ranks that see different data decide alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")


def test_controllers_decide_alike_on_ranks_that_see_different_data(tmp_path):
    from tests.tasks.control_ranks_script import NAMES

    script = Path(__file__).with_name("control_ranks_script.py")
    # Runs in this process have left Lightning's seed, port and rank in the environment, which a child would obey.
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "MASTER_", "LOCAL_", "NODE_", "WORLD_"))}
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=300, env=clean)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in NAMES:
        ranks = [torch.load(tmp_path / f"{name}.{rank}.pt") for rank in range(2)]
        assert len(ranks[0]) > 3
        different = [key for key in ranks[0] if not torch.equal(ranks[0][key], ranks[1][key])]
        assert not different, f"{name}: {different}"
