"""What the low-rank and structured methods share: rank and scale fields, their checks, and reproducible random draws.

Draws that a file does not hold (random bases, positions of spectral entries) come from a seed on the CPU, so that every
machine makes the same ones; `site_seed` gives each site its own. On the meta device nothing is drawn.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft.adapters.method import Context, Delta, Factors, Method, Tensors, check_rank, wide, zeros
from mmpeft.adapters.site import Site
from mmpeft.errors import ConfigError, Unsupported


@dataclass(frozen=True)
class Ranked(Method):
    """A method with an inner width.

    Args:
        rank: inner width, 1 to min(out, in).
    """

    rank: int = 8

    def __post_init__(self) -> None:
        at_least(self, rank=1)

    def check(self, site: Site) -> None:
        check_rank(self.rank, site)


@dataclass(frozen=True)
class LowRank(Ranked):
    """`W' = W + alpha / rank * B A`: the pair of LoRA (A Kaiming-uniform, B 0), for methods that change what is trained
    or how the pair is combined.

    Args:
        rank: inner width, 1 to min(out, in).
        alpha: numerator of the scale; None means `rank`, a scale of 1.
        dropout: on the adapter's input, in training; needs a site that is called.
    """

    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dropout(self.dropout)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else float(self.alpha / self.rank)

    def pair(self, base: Tensor) -> dict[str, Tensor]:
        """A [*, rank, in] Kaiming-uniform and B [*, out, rank] zero."""
        *stack, out, into = base.shape
        A = kaiming(*stack, self.rank, into, like=base)
        return {"A": A, "B": zeros(*stack, out, self.rank, like=base)}

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        return Tensors(self.pair(base))

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        return Factors(p.A, p.B, self.scale)


def at_least(method: Method, **least: int) -> None:
    """Refuse fields below their least value: `at_least(self, rank=1)`."""
    for name, value in least.items():
        if getattr(method, name) < value:
            raise ConfigError(f"{name} {getattr(method, name)}; expected at least {value}")


def check_dropout(dropout: float) -> None:
    """Refuse a dropout outside [0, 1)."""
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout {dropout}; expected 0 <= dropout < 1")


def one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    """Refuse an option that is not in the list."""
    if value not in valid:
        raise ConfigError(f"{name} {value!r}; expected one of {', '.join(valid)}")


def check_matrix(method: Method, site: Site) -> None:
    """Refuse stacks of experts, for methods whose tensors are laid out for one matrix."""
    if len(site.shape) != 2:
        raise Unsupported(
            f"{type(method).__name__} adapts one matrix and not the stack {site.name} of shape {site.shape}"
        )


def check_divides(name: str, size: int, n: int, side: str, site: Site) -> None:
    """Refuse a block size (or count) that does not divide a side of the matrix; the message lists those that do."""
    if n < 1 or size % n:
        valid = [d for d in range(1, size + 1) if size % d == 0]
        close = sorted(sorted(valid, key=lambda d: abs(d - n))[:4])
        raise ConfigError(
            f"{name} {n} at {site.name} does not divide its {side} of {size}; it could be {', '.join(map(str, close))}"
        )


def kaiming(*shape: int, like: Tensor) -> Tensor:
    """U(+-1/sqrt(last axis)): Kaiming-uniform with a = sqrt(5), as nn.Linear starts."""
    bound = shape[-1] ** -0.5
    return zeros(*shape, like=like).uniform_(-bound, bound)


def normal(*shape: int, std: float, like: Tensor) -> Tensor:
    """N(0, std) beside `like`."""
    return zeros(*shape, like=like).normal_(std=std)


def xavier(*shape: int, like: Tensor) -> Tensor:
    """Xavier-uniform over the last two axes, U(+-sqrt(6 / (a + b)))."""
    bound = (6 / (shape[-1] + shape[-2])) ** 0.5
    return zeros(*shape, like=like).uniform_(-bound, bound)


def site_seed(seed: int, site: Site) -> torch.Generator:
    """A generator that depends on the seed and the site's name, the same on every machine."""
    return torch.Generator("cpu").manual_seed(seed * 1_000_003 + zlib.crc32(site.name.encode()))


def seeded_normal(*shape: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1) from a generator, drawn on the CPU in fp32."""
    if like.is_meta:
        return zeros(*shape, like=like)
    return torch.randn(*shape, generator=generator, device="cpu").to(like.device, wide(like.dtype))


def seeded_choice(n: int, k: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """k of the numbers 0..n-1 without repetition, in drawing order [k] int64."""
    if like.is_meta:
        return torch.zeros(k, dtype=torch.int64, device=like.device)
    return torch.randperm(n, generator=generator, device="cpu")[:k].to(like.device)
