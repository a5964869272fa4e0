"""Normalisation of actions and states: statistics, the affine map they define, and robots of other sizes.

Choices made here:

- The statistics belong to the adapter (they describe the robot and the task it was trained on) and travel in its
  metadata as plain numbers. A missing key is an error: a policy whose actions are silently left in other units moves
  the robot anyway.
- The map is affine and never clips, so `decode(encode(x))` is x up to the last bits. It is computed in float64 and
  handed on in float32.
- A dimension that never moved in the demonstrations is shifted, not divided. `keep` names dimensions that pass as they
  are (a binary gripper).
- `width` pads a robot with fewer dimensions to the policy's: padding encodes to zero, `decode` takes it off, and
  `valid` marks what is real, so that one base serves robots of several sizes with an adapter each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.errors import BadSample, ConfigError, FileFormatError, nearest

Kind = Literal["mean_std", "min_max", "quantile", "identity"]
STILL = 1e-8  # a spread below this is a dimension that never moved


@dataclass(frozen=True)
class Statistics:
    """What a set of vectors [N, D] looks like, dimension by dimension; plain numbers, JSON keeps them exactly."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    count: int

    @classmethod
    def of(cls, vectors: Any) -> Self:
        """Measured on [N, D] (array or tensor).

        Raises:
            ConfigError: not two-dimensional, or empty.
            BadSample: a value that is not finite; says in which row and dimension.
        """
        x = torch.as_tensor(vectors).double()
        if x.ndim != 2 or not x.shape[0] or not x.shape[1]:
            raise ConfigError(f"statistics are measured on vectors [N, D], given {list(x.shape)}")
        wrong = (~torch.isfinite(x)).nonzero()
        if len(wrong):
            row, dim = wrong[0].tolist()
            where = f"row {row}, dimension {dim}: {x[row, dim]}"
            raise BadSample(f"{len(wrong)} values are not finite, the first in {where}")
        low, high = torch.quantile(x[:: max(1, len(x) // 100_000)], torch.tensor([0.01, 0.99], dtype=x.dtype), dim=0)
        found = (x.mean(0), x.std(0, correction=0), x.amin(0), x.amax(0), low, high)
        mean, std, least, most, q01, q99 = (tuple(r.tolist()) for r in found)
        return cls(mean, std, least, most, q01, q99, len(x))

    @property
    def dim(self) -> int:
        return len(self.mean)


# Kind -> (offset, scale): encode is (x - offset) / scale, which puts the range, or the 1st to 99th percentile, on
# [-1, 1].
KINDS: dict[Kind, Callable[[Statistics], tuple[Sequence[float], Sequence[float]]]] = {
    "mean_std": lambda s: (s.mean, s.std),
    "min_max": lambda s: _middle(s.min, s.max),
    "quantile": lambda s: _middle(s.q01, s.q99),
    "identity": lambda s: ([0.0] * s.dim, [1.0] * s.dim),
}


class Normaliser:
    """Vectors in a robot's units to normalised ones and back.

    Args:
        statistics: of the robot's own D dimensions.
        kind: "mean_std", "min_max", "quantile" (1st and 99th percentile) or "identity".
        keep: dimensions that are not normalised.
        width: dimensions of the normalised vector, D and then padding; None: D.

    Raises:
        ConfigError: an unknown kind, a dimension that is not there, a width below D.
    """

    def __init__(
        self, statistics: Statistics, kind: Kind = "mean_std", *, keep: Sequence[int] = (), width: int | None = None
    ) -> None:
        if kind not in KINDS:
            raise ConfigError(f"unknown normalisation {kind!r}; valid: {', '.join(KINDS)}{nearest(str(kind), KINDS)}")
        self.statistics, self.kind, self.dim = statistics, kind, statistics.dim
        self.keep, self.width = tuple(keep), width or statistics.dim
        if not all(0 <= k < self.dim for k in self.keep):
            raise ConfigError(f"keep={list(keep)}; dimensions are 0 .. {self.dim - 1}")
        if self.width < self.dim:
            raise ConfigError(f"{self.dim} dimensions do not fit a policy of {self.width}")
        offset, scale = (torch.tensor(v, dtype=torch.float64) for v in KINDS[kind](statistics))
        scale = torch.where(scale.abs() < STILL, 1.0, scale)
        offset[list(self.keep)], scale[list(self.keep)] = 0.0, 1.0
        self.offset, self.scale = offset, scale

    @property
    def valid(self) -> Tensor:
        """[width] bool: which normalised dimensions are the robot's own."""
        return torch.arange(self.width) < self.dim

    def encode(self, x: Tensor) -> Tensor:
        """[..., D] in the robot's units -> [..., width], zero where padded; float32 (float64 stays).

        Raises:
            ConfigError: another number of dimensions.
        """
        self._check(x, self.dim, "a vector in this robot's units")
        out = (x.double() - self.offset.to(x.device)) / self.scale.to(x.device)
        return F.pad(out, (0, self.width - self.dim)).to(_narrow(x))

    def decode(self, z: Tensor) -> Tensor:
        """[..., width] -> [..., D] in the robot's units; the inverse of `encode`.

        Raises:
            ConfigError: another number of dimensions.
        """
        self._check(z, self.width, "a normalised vector of this policy")
        own = z[..., : self.dim].double()
        return (own * self.scale.to(z.device) + self.offset.to(z.device)).to(_narrow(z))

    def _check(self, x: Tensor, size: int, what: str) -> None:
        if not x.ndim or x.shape[-1] != size:
            raise ConfigError(f"{what} has {size} dimensions, given {list(x.shape)}")

    # ---- files -----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """As JSON data; `from_dict` reads it back, exactly."""
        statistics = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.statistics).items()}
        return {"kind": self.kind, "keep": list(self.keep), "width": self.width, "statistics": statistics}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], what: str = "normalisation") -> Self:
        """Raises FileFormatError, naming every key that is missing."""
        wanted = ("kind", "keep", "width", "statistics")
        missing = [k for k in wanted if k not in data]
        names = [f.name for f in fields(Statistics)]
        missing += [f"statistics.{n}" for n in names if n not in data.get("statistics", names)]
        if missing:
            raise FileFormatError(
                f"the adapter's {what} lacks {', '.join(missing)}; without it actions would be in unknown units"
            )
        given = data["statistics"]
        values: dict[str, Any] = {n: given[n] if n == "count" else tuple(map(float, given[n])) for n in names}
        statistics = Statistics(**values)
        sizes = {n: len(getattr(statistics, n)) for n in names if n != "count"}
        if len(set(sizes.values())) != 1:
            raise FileFormatError(f"the adapter's {what} has statistics of several sizes: {sizes}")
        return cls(statistics, data["kind"], keep=data["keep"], width=data["width"])

    def __repr__(self) -> str:
        return f"Normaliser({self.kind!r}, dim={self.dim}, keep={list(self.keep)}, width={self.width})"


def _middle(low: Sequence[float], high: Sequence[float]) -> tuple[list[float], list[float]]:
    pairs = list(zip(low, high, strict=True))
    return [(a + b) / 2 for a, b in pairs], [(b - a) / 2 for a, b in pairs]


def _narrow(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


assert set(KINDS) == set(get_args(Kind))
