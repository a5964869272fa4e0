"""What PEFT's layers compute differently from the layers they wrap, as reasons to give."""

from __future__ import annotations

from torch import nn

from mmpeft.adapters.site import Layout

Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def kernel_of(layout: Layout) -> tuple[int, ...]:
    """Kernel sizes of a convolution; () for anything else."""
    return layout.shape[2:] if layout.name == "conv" else ()


def foreign_padding(owner: nn.Module) -> str | None:
    """PEFT runs the update of a convolution by itself and pads its input with zeros."""
    if isinstance(owner, Conv) and owner.padding_mode != "zeros":
        padded = owner.padding != "valid" and any(p != 0 for p in owner.padding)
        return f"PEFT pads the input with zeros, not by {owner.padding_mode!r}" if padded else None
    return None


def grouped(owner: nn.Module) -> str | None:
    """Layers with groups, which most of PEFT's convolutions cannot hold."""
    groups = getattr(owner, "groups", 1)
    return f"PEFT has no adapter of this type for a convolution of {groups} groups" if groups > 1 else None


def square_only(owner: nn.Module) -> str | None:
    """What PEFT's own convolution in BOFT and HRA leaves out."""
    if not isinstance(owner, nn.Conv2d):
        return None
    if any(d > 1 for d in owner.dilation):
        return f"PEFT runs this convolution without its dilation {owner.dilation}"
    for name in ("stride", "padding"):
        value = getattr(owner, name)
        if isinstance(value, str) or len(set(value)) > 1:
            return f"PEFT takes the first number of {name} {value!r} for both axes"
    return foreign_padding(owner)


def oblong(owner: nn.Module) -> str | None:
    oblong = isinstance(owner, nn.Conv2d) and len(set(owner.kernel_size)) > 1
    return f"PEFT takes the kernel {owner.kernel_size} for square" if oblong else None
