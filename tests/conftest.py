"""What has to be true before any test module is imported."""

import os

import pytest
import torch

# Triton decides when it is first imported whether kernels are compiled or interpreted, and many libraries import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def no_shards_seen(monkeypatch):
    """What is kept by tensor versions stays off in a process that has sharded; here many tests share one."""
    from mmpeft.adapters import versions

    monkeypatch.setattr(versions, "_doubted", set())
