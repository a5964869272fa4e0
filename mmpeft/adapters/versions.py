"""Whether a tensor's version says that it changed: what is kept between reads (W', DoRA's norms, compute copies) hangs on it.

Two writers say nothing by themselves. torch's fused optimizers, and others that write through pointers (bitsandbytes),
leave the versions of their parameters as they were: a hook on every optimizer's step counts them up. FSDP2 gathers new
values into the same tensors: a process that shards keeps nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

_doubted: set[str] = set()


def doubt(why: str) -> None:
    """From now on this process keeps nothing."""
    _doubted.add(why)


def versions_tell() -> bool:
    """Whether a tensor's version says that it changed, so that what is made of it may be kept."""
    return not _doubted


def _stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Counts up the versions of what an optimizer has just written (once more is harmless)."""
    torch.autograd.graph.increment_version(p for group in optimizer.param_groups for p in group["params"])


register_optimizer_step_post_hook(_stepped)
