"""Frozen is three switches: no gradient, an eval mode that survives `train()`, and no graph unless something upstream
is trained.

The first is `requires_grad = False` on every base tensor; the third follows from it, since autograd records nothing
whose inputs need no gradient (and a visual prompt inside or before a frozen tower still gets its own). The second is
this file: the attached root's `train(mode)` calls `set_modes`, which lets adapters and fully trained modules follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mmpeft.adapters.method import Delta
from mmpeft.adapters.slot import Slot
from mmpeft.adapters.state import find_state
from mmpeft.adapters.wrapped import INNER

TRAINED_PATHS = "_mmpeft_trained_paths"


def freeze(root: nn.Module, trained_paths: set[str], mode: bool) -> None:
    """Switch off gradients of all base tensors and the training mode of all but `trained_paths`, which get `mode`."""
    for module in root.modules():
        if not isinstance(module, Delta):
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.requires_grad_(False)
    follow(root, root.__dict__.get(TRAINED_PATHS, set()) | trained_paths, mode)


def follow(root: nn.Module, trained_paths: set[str], mode: bool) -> None:
    """Say which modules follow `train(mode)`, and let them follow it."""
    root.__dict__[TRAINED_PATHS] = trained_paths
    set_modes(root, mode)


def set_modes(root: nn.Module, mode: bool) -> None:
    """`train(mode)` for adapters and fully trained modules, `eval()` for the rest of the base.

    Two exceptions: a module that checkpoints its activations (transformers asks `self.training` first) follows the mode
    itself, its children don't; and normalisation with running statistics stays in eval everywhere, since its statistics
    are buffers of the base.
    """
    trained: set[str] = root.__dict__.get(TRAINED_PATHS, set())
    _set(root, mode, "", trained, "" in trained)


def _set(module: nn.Module, mode: bool, path: str, trained: set[str], follows: bool) -> None:
    if isinstance(module, Slot):
        module.cache = {}  # `p.data.copy_()` leaves no version behind; train() and eval() are where such code sits
        for child in module.modules():
            child.training = mode
        return
    statistics = bool(getattr(module, "track_running_stats", False))
    checkpoints = bool(getattr(module, "gradient_checkpointing", False))
    module.training = mode and ((follows and not statistics) or checkpoints)
    for name, child in module.named_children():
        below = path if name in INNER else f"{path}.{name}" if path else name
        _set(child, mode, below, trained, follows or below in trained)


def learning(module: nn.Module) -> bool:
    """Whether anything in it is in training mode. `training` does not tell: that of an adapted model is its base's."""
    return any(m.training for m in module.modules())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, and every module's own mode afterwards (not `train()`, which would wake frozen parts, or put
    adapters to sleep where it is told the frozen root's mode)."""
    awake = [m for m in module.modules() if m.training]
    if awake:
        module.eval()
    try:
        yield
    finally:
        for m in awake:
            m.training = True
            if isinstance(m, Slot):
                m.cache = {}  # adapted weights that eval kept would lie there through training


def restore(root: nn.Module) -> None:
    """Give the base its gradients and modes back, as they were before the first attach."""
    state = find_state(root)
    if state is None:
        return
    for name, parameter in root.named_parameters():
        if name in state.requires_grad:
            parameter.requires_grad_(state.requires_grad[name])
    for name, module in root.named_modules():
        if name in state.training:
            module.training = state.training[name]
    root.__dict__.pop(TRAINED_PATHS, None)
