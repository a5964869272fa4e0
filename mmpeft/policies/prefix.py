"""The eyes of a policy: maps of several depths of one frozen image backbone, split so that its beginning can be cached.

    eyes = TappedEncoder("package:efficientnet-lite0", taps=(2, 3), split=2)
    maps = eyes(eyes.pixels(images))                        # [N, 40, 12, 12] and [N, 112, 6, 6] at 96 pixels
    start = eyes.prefix(eyes.pixels(images))                # what a cache holds: the map after tap `split`
    maps = eyes.suffix(start)                               # the same maps, bit for bit

A policy looks at each picture of its demonstrations dozens of times, and adapters usually sit in the later stages. What
comes before them is frozen and gives the same numbers every time: cached, training on two cores is three times as fast.

- `taps` are timm's own (the stages of a convolutional net, the blocks of a transformer), counted from 0 or from the
  end.
- A backbone is split along its chain of stages. That chain is data, one row a family, and each tower is proved when it
  is made: the maps of both halves, one after the other, equal those of the library's own forward.
- Pictures come as bytes [..., H, W, 3] and are normalised as the backbone was trained; mean and deviation are read off
  its own preprocessing. They are not resized unless `image_size` says so: a convolutional net takes 96 pixels as they
  are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmpeft.encoders import load_encoder
from mmpeft.encoders.base import frozen_modules, is_frozen
from mmpeft.encoders.image import ImageEncoder
from mmpeft.errors import BadSample, ConfigError, Unsupported
from mmpeft.policies.frozen_norm import speed_up
from mmpeft.policies.parts import Part

# timm's class -> the modules its forward runs one after the other (`*`: every child); a tap follows the module it is
# named by.
CHAINS: dict[str, tuple[str, ...]] = {
    "EfficientNet": ("conv_stem", "bn1", "blocks.*"),
    "MobileNetV3": ("conv_stem", "bn1", "blocks.*"),
    "ResNet": ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3", "layer4"),
    "ConvNeXt": ("stem", "stages.*"),
    "RegNet": ("stem", "s1", "s2", "s3", "s4"),
    "VisionTransformer": ("<embed>", "blocks.*"),
}


class TappedEncoder(Part):
    """Maps [N, C_i, h_i, w_i] of the chosen taps of a frozen image backbone.

    Args:
        encoder: a name for `load_encoder`, its arguments as a mapping, or an `ImageEncoder` whose layer is the last
            tap.
        taps: which maps, in order; of other libraries than timm one alone, the encoder's own.
        split: the tap after which the cached prefix ends; None: nothing can be cached.
        image_size: pictures are resized to this square; None: taken as they come.

    Attributes:
        backbone: the library's module; adapters attach to paths under `encoder.backbone.` of a policy.

    Raises:
        ConfigError: taps that are not there or not in order, a split after the first tap.
        Unsupported: a backbone that cannot be split, or that gives one map only.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, encoder: str | Mapping[str, Any] | ImageEncoder, *, taps: Sequence[int] = (-1,), split: int | None = None,
        image_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        source, self.taps = _load(encoder, taps)
        self.__dict__["_source"] = source  # its one module is `backbone`, which is registered here
        self.backbone = source.backbone
        speed_up(self.backbone)
        self.backbone.to(memory_format=torch.channels_last)  # the strides alone: a third less time for a step on a CPU
        self.image_size = image_size
        mean, std = _pixel_statistics(source)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.split = None if split is None else _count_from_end(split, source.index + 1, source.name)
        self.chain: list[tuple[str, int | None]] = []  # (module path, the tap that follows it)
        if self.split is not None:
            if self.split > self.taps[0]:
                raise ConfigError(f"split={split} comes after the first tap {self.taps[0]}, which no cache would give")
            self.chain = _chain(source)
            self._prove()

    @property
    def source(self) -> Any:
        """The `ImageEncoder` it was made from."""
        return self.__dict__["_source"]

    @property
    def name(self) -> str:
        return str(self.source.name)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in frozen_modules(self.backbone):
            module.training = False
        return self

    # ---- pictures --------------------------------------------------------------------------------------------------

    def pixels(self, images: Any) -> Tensor:
        """Pictures, bytes [N, H, W, 3], to normalised pixels [N, 3, H, W] on the backbone's device.

        Raises:
            BadSample: no bytes of that shape.
        """
        x = as_pixels(images, self.mean.device)
        if self.image_size is not None and tuple(x.shape[-2:]) != (self.image_size, self.image_size):
            x = F.interpolate(x, (self.image_size,) * 2, mode="bilinear", antialias=True, align_corners=False)
        pixels: Tensor = (x - self.mean) / self.std
        return pixels.contiguous(memory_format=torch.channels_last)

    def shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """(C, h, w) of each map for pictures of this size.

        Raises:
            ConfigError: a size that the backbone does not take.
        """
        if self.image_size is not None:
            height = width = self.image_size
        self.source.num_tokens((height, width))
        device = next(self.backbone.parameters()).device
        with torch.no_grad():
            maps = self(torch.zeros(1, 3, height, width, device=device))
        return [tuple(m.shape[1:]) for m in maps]

    # ---- maps ------------------------------------------------------------------------------------------------------

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Pixels [N, 3, H, W] to one map a tap."""
        pixels = pixels.to(next(self.backbone.parameters()).dtype)
        if not _is_timm(self.source):
            return [self.source.features(self.backbone, pixels)[1]]
        backbone: Any = self.backbone
        maps: list[Tensor] = backbone.forward_intermediates(
            pixels, indices=list(self.taps), norm=self._norm, output_fmt="NCHW", intermediates_only=True
        )
        return [m.contiguous() for m in maps]

    def prefix(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, H, W] to what follows tap `split`: [N, C, h, w], or tokens [N, T, C] of a transformer.

        Raises:
            ConfigError: nothing was split, or an adapter or a trained weight lies in the prefix.
        """
        self.check_prefix()
        with torch.no_grad():
            x = pixels.to(next(self.backbone.parameters()).dtype)
            for path, tap in self.chain:
                x = self._step(path, x)
                if tap == self.split:
                    break
        return x

    def suffix(self, start: Tensor) -> list[Tensor]:
        """What `prefix` gave to one map a tap."""
        as_kept = torch.channels_last if start.ndim == 4 else torch.preserve_format
        x = start.to(next(self.backbone.parameters()).dtype, memory_format=as_kept)
        found, running = [], False
        for path, tap in self.chain:
            if running:
                x = self._step(path, x)
            running = running or tap == self.split
            if running and tap in self.taps:
                found.append(self._as_map(self._normed(x)))
        return found

    def check_prefix(self) -> None:
        """Refuse to cache what is not frozen; see `prefix`."""
        if self.split is None:
            raise ConfigError(f"{self.name!r} was not split: give split= to cache its beginning")
        for path, tap in self.chain:
            for module in self._modules_of(path):
                if not is_frozen(module):
                    raise ConfigError(
                        f"{path} lies before the split at tap {self.split} and is trained or adapted, so that cached "
                        f"maps would be stale; move the split before it, or train without a cache"
                    )
            if tap == self.split:
                return

    def prefix_paths(self) -> list[str]:
        """Module paths of the prefix, relative to the backbone."""
        found = []
        for path, tap in self.chain:
            found.append(path)
            if tap == self.split:
                break
        return found

    def fingerprint(self) -> str:
        """Of everything that decides the prefix; see `Encoder.fingerprint`."""
        return f"{self.source.fingerprint()}-{self.split}-{self.image_size}"

    # ---- steps of the chain ----------------------------------------------------------------------------------------

    @property
    def _norm(self) -> bool:
        return bool(self.source.norm) and self.taps == (self.source.index,)

    def _modules_of(self, path: str) -> list[nn.Module]:
        if path != "<embed>":
            return [self.backbone.get_submodule(path)]
        names = ("patch_embed", "pos_drop", "patch_drop", "norm_pre")
        return [m for n, m in self.backbone.named_children() if n in names]

    def _step(self, path: str, x: Tensor) -> Tensor:
        backbone: Any = self.backbone
        if path == "<embed>":
            embedded: Tensor = backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(backbone.patch_embed(x))))
            return embedded
        out: Tensor = backbone.get_submodule(path)(x)
        return out

    def _normed(self, x: Tensor) -> Tensor:
        if not self._norm:
            return x
        backbone: Any = self.backbone
        normed: Tensor = backbone.norm(x) if x.ndim == 3 else getattr(backbone, "norm_pre", nn.Identity())(x)
        return normed

    def _as_map(self, x: Tensor) -> Tensor:
        if x.ndim != 3:
            return x.contiguous()
        backbone: Any = self.backbone
        cells = x[:, int(backbone.num_prefix_tokens) :]
        rows, columns = backbone.patch_embed.grid_size
        return cells.transpose(1, 2).reshape(len(x), -1, rows, columns).contiguous()

    @torch.no_grad()
    def _prove(self) -> None:
        size = self.image_size or self.source.image_size
        x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        whole, halves = self(x), self.suffix(self.prefix(x))
        if len(whole) != len(halves) or not all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True)):
            raise Unsupported(f"{self.name!r} in two halves gives other maps than whole; leave split out")

    def extra_repr(self) -> str:
        return f"{self.name!r}, taps={self.taps}, split={self.split}, image_size={self.image_size}"


def _load(encoder: str | Mapping[str, Any] | ImageEncoder, taps: Sequence[int]) -> tuple[Any, tuple[int, ...]]:
    """The encoder whose layer is the last tap, and the taps counted from 0."""
    if not taps:
        raise ConfigError("taps is empty; name at least one, such as (-1,)")
    if isinstance(encoder, nn.Module):
        source: Any = encoder
    else:
        options: dict[str, Any] = {"name": encoder} if isinstance(encoder, str) else dict(encoder)
        if "layer" in options or "pool" in options:
            raise ConfigError("layer and pool do not apply here: taps says which maps, and they are read whole")
        source = load_encoder(**options)  # whole, to count its taps
        taps = [_count_from_end(t, source.index + 1, source.name) for t in taps]
        source = source if max(taps) == source.index else load_encoder(**options, layer=max(taps))
    if not isinstance(source, ImageEncoder):
        raise ConfigError(f"a policy's pictures need an image encoder, {getattr(source, 'name', source)!r} is none")
    found = tuple(_count_from_end(t, source.index + 1, source.name) for t in taps)
    if list(found) != sorted(set(found)) or found[-1] != source.index:
        raise ConfigError(f"taps={tuple(taps)}: name each once, early to late, the last being layer {source.index}")
    if len(found) > 1 and not _is_timm(source):
        raise Unsupported(f"{source.name!r} gives the map of one layer; several taps need a timm model")
    return source, found


def _count_from_end(tap: int, count: int, name: str) -> int:
    if not -count <= tap < count:
        raise ConfigError(f"{name!r} has taps 0 .. {count - 1} here, not {tap}")
    return tap % count


def _is_timm(source: Any) -> bool:
    return any(c.__module__.split(".")[0] == "timm" for c in type(source.backbone).__mro__) and hasattr(source, "norm")


def _chain(source: Any) -> list[tuple[str, int | None]]:
    """The modules of a timm backbone in the order in which they run, each with the tap that follows it."""
    backbone = source.backbone
    row = next((CHAINS[c.__name__] for c in type(backbone).__mro__ if c.__name__ in CHAINS), None)
    if row is None or not _is_timm(source):
        raise Unsupported(f"{type(backbone).__name__} cannot be split; these can: {', '.join(CHAINS)}. Leave split out")
    paths: list[str] = []
    for part in row:
        parent, star, _ = part.partition(".*")
        paths += [f"{parent}.{n}" for n, _ in backbone.get_submodule(parent).named_children()] if star else [part]
    info = backbone.feature_info
    named = {f["module"]: i for i, f in enumerate(info if isinstance(info, list) else info.info)}
    return [(path, named.get(path)) for path in paths]


def _pixel_statistics(source: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation [1, 3, 1, 1] of the encoder's own preprocessing, from what it makes of black and of white."""
    side = source.image_size
    ends = [source.preprocess(Image.new("RGB", (side, side), (v, v, v))).float().mean((1, 2)) for v in (0, 255)]
    std = 1 / (ends[1] - ends[0])
    return (-ends[0] * std).view(1, 3, 1, 1), std.view(1, 3, 1, 1)


def as_pixels(images: Any, device: torch.device) -> Tensor:
    """Pictures, bytes [N, H, W, 3], to [N, 3, H, W] in 0 .. 1; BadSample if they are none."""
    x = torch.as_tensor(np.ascontiguousarray(images) if isinstance(images, np.ndarray) else images)
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[-1] != 3:
        raise BadSample(f"pictures are bytes [N, H, W, 3], given {x.dtype} {list(x.shape)}")
    return x.to(device).permute(0, 3, 1, 2).float().contiguous() / 255


def random_shift(images: Tensor, generator: torch.Generator, *, pixels: int) -> Tensor:
    """Each picture [N, H, W, 3] moved by up to `pixels` either way, its border repeated (DrQ, arXiv 2004.13649)."""
    n, height, width, _ = images.shape
    moves = torch.randint(-pixels, pixels + 1, (n, 2), generator=generator)
    rows = (torch.arange(height) + moves[:, :1]).clamp(0, height - 1)  # [N, H]
    if images.is_cuda:
        columns = (torch.arange(width) + moves[:, 1:]).clamp(0, width - 1)
        which = torch.arange(n, device=images.device)[:, None, None]
        return images[which, rows.to(images.device)[:, :, None], columns.to(images.device)[:, None, :]]
    moved = torch.empty_like(images)
    for picture, row, (_, right), out in zip(images, rows, moves.tolist(), moved, strict=True):
        picture = picture.index_select(0, row)  # whole rows, then runs of columns: a gather would read pixel by pixel
        right = max(-width, min(width, right))
        if right >= 0:
            out[:, : width - right], out[:, width - right :] = picture[:, right:], picture[:, -1:]
        else:
            out[:, -right:], out[:, :-right] = picture[:, :right], picture[:, :1]
    return moved
