"""What the engine asks of models and tensors that a strategy or a compiler has wrapped: what is inside?

Names in adapter files and fingerprints are those of the plain model, whatever ran around it when it was saved. None of
the wrappers' own modules is imported here: `torch.distributed.tensor` alone brings Triton and sympy, a second of every
`import mmpeft`, and an object of theirs can only exist where somebody has loaded them already.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from mmpeft.adapters.versions import doubt

# The child under which torch.compile, checkpoint_wrapper and FSDP1 keep the module they wrap.
INNER = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel, torch.compile's and other wrappers, however many."""
    while True:
        inner = next((model._modules[name] for name in INNER if name in model._modules), None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def plain_path(path: str) -> str:
    """A module or tensor path without the wrappers' segments: 'blocks.0._orig_mod.fc' is 'blocks.0.fc'."""
    return ".".join(part for part in path.split(".") if part not in INNER)


def class_name(model: nn.Module) -> str:
    """The model's own class: `fully_shard` puts a class FSDP<Name>(FSDPModule, <Name>) in its place."""
    cls = type(unwrap(model))
    while cls.__bases__[0].__name__ == "FSDPModule":
        cls = cls.__bases__[1]
    return cls.__name__


def is_sharded(t: Any) -> bool:
    """Whether `t` is a DTensor."""
    if type(t) in (Tensor, nn.Parameter) or not hasattr(t, "full_tensor"):
        return False
    doubt("sharded: FSDP2 keeps the versions of what it gathers into")
    return True


def whole(t: Tensor) -> Tensor:
    """The tensor itself, gathered from its shards where it is a DTensor (then every rank has to call this)."""
    return cast(Tensor, cast(Any, t).full_tensor()) if is_sharded(t) else t
