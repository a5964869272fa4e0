"""The frozen convolution that cuts an image into patches, in front of fused ViT blocks, as one product.

Its kernel is its stride, so patches do not overlap and y = patches W^T is a copy of the pixels and one GEMM. On an H100 cuDNN changes
layouts and takes a slow kernel for it: 2.1 ms of a ViT-B/16's 69 at batch 256, 100 us of a policy step's 2,600.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.adapters.compiled.route import Route
from mmpeft.adapters.state import SLOT
from mmpeft.errors import Unsupported

if TYPE_CHECKING:
    from mmpeft.adapters.compiled.model import Compiled


def find(model: nn.Module, stack: str) -> Iterator[tuple[str, nn.Conv2d]]:
    """(path, convolution) of the patches in the smallest module around the stack at path `stack` that has one."""
    around = stack.split(".")[:-1] if stack else []
    for depth in range(len(around), -1, -1):
        path = ".".join(around[:depth])
        inside = model.get_submodule(path).named_modules(prefix=path)
        found = [(name, m) for name, m in inside if isinstance(m, nn.Conv2d) and cuts(m)]
        if found:
            yield from found
            return


def cuts(conv: nn.Conv2d) -> bool:
    """Whether a convolution takes patches that neither overlap nor leave out pixels between them."""
    plain = conv.padding in ((0, 0), "valid") and conv.dilation == (1, 1) and conv.groups == 1
    return plain and conv.kernel_size == conv.stride and conv.kernel_size > (1, 1)


def patches_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv2d(x [B, C, H, W], weight [D, C, a, b], bias, stride=(a, b)) -> [B, D, H // a, W // b], channels last."""
    (B, C, H, W), (D, _, a, b) = x.shape, weight.shape
    h, w = H // a, W // b
    cut = x[:, :, : h * a, : w * b].reshape(B, C, h, a, w, b)
    rows = cut.permute(0, 2, 4, 1, 3, 5).reshape(B * h * w, C * a * b)
    return F.linear(rows, weight.flatten(1), bias).view(B, h, w, D).permute(0, 3, 1, 2)


class Patches:
    """The choice at each call of a convolution. `everywhere`: also where the convolution itself is no slower."""

    def __init__(self, conv: nn.Conv2d, *, everywhere: bool) -> None:
        self.conv, self.everywhere = conv, everywhere
        self.route = Route(conv, self)

    def __call__(self, route: Route, *args: Any, **kwargs: Any) -> Any:
        x: Any = args[0] if args else kwargs["input"]
        if not self.fits(x):
            return route.plain(*args, **kwargs)
        return patches_product(x, self.conv.weight, self.conv.bias)

    def fits(self, x: Tensor) -> bool:
        """Whether the product gives what a call gives."""
        conv = self.conv
        tensors = [t for t in (x, conv.weight, conv.bias) if t is not None]
        differs = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        alike = x.ndim == 4 and x.dtype == conv.weight.dtype and x.shape[1] == conv.in_channels
        fast = self.everywhere or (x.is_cuda and x.element_size() == 2)
        large = x.ndim == 4 and x.shape[2] >= conv.kernel_size[0] and x.shape[3] >= conv.kernel_size[1]
        cast = torch.is_autocast_enabled(x.device.type)
        return alike and large and fast and not (differs or cast or SLOT in conv._modules or torch.compiler.is_compiling())


def apply(model: nn.Module, compiled: Compiled, *, everywhere: bool = False) -> None:
    """Patches of every tower whose blocks run fused."""
    done: set[int] = set()
    for stack in compiled.stacks:
        for path, conv in find(model, stack.path):
            if id(conv) in done:
                continue
            done.add(id(conv))
            try:
                route = Patches(conv, everywhere=everywhere).route
            except Unsupported as error:
                compiled.skip(f"patches {path}", str(error))
                continue
            compiled.add(f"patches {path}", "one product in place of a convolution, where nothing in it trains", route.remove)
