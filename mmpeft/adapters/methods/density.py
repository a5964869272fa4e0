"""DEFT (Runwal et al. 2024, arXiv 2402.01911): fine-tuning that also makes the feed-forward's activations sparse. Not HF
PEFT's "deft", which decomposes weights.

    with mmpeft.Density(model, "**.mlp.down_proj") as density:
        loss = task(model(x)) + 0.1 * density.loss()      # on top of any adapter

    AdaDEFT     the adaptive variant: a trained weight a feed-forward, and those with a small one are skipped
    LayerDrop   Fan et al. 2020, arXiv 1909.11556: whole layers are skipped at random while other adapters train

The number of non-zero activations has no gradient; it is approximated by tanh(beta |a|), or by a^2 / (a^2 + epsilon), which
the authors' code uses for activations that are never exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Method, Tensors, zeros
from mmpeft.adapters.methods.bottleneck import first_tensor
from mmpeft.adapters.methods.low_rank import one_of
from mmpeft.adapters.pattern import select
from mmpeft.adapters.selection.controller import Controller
from mmpeft.adapters.site import Site
from mmpeft.adapters.state import SLOT, sites_of
from mmpeft.errors import ConfigError, NameNotFound


class Density(Controller):
    """Collects, within a `with`, the inputs of the layers that a pattern matches: the inner activations of the
    feed-forwards whose second layers they are.

    Args:
        pattern: as in a plan.
        approximation: "tanh" or "rational".
        sharpness: beta of tanh(beta |a|), or 1 / epsilon of a^2 / (a^2 + epsilon).

    Raises:
        NameNotFound: the pattern matches no module.
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: str,
        *,
        approximation: Literal["tanh", "rational"] = "tanh",
        sharpness: float = 20.0,
    ) -> None:
        one_of("approximation", approximation, ("tanh", "rational"))
        if not sharpness > 0:
            raise ConfigError(f"sharpness {sharpness}; expected a positive number")
        paths = [p for p, _ in model.named_modules() if p and SLOT not in p.split(".")]
        hits = [path for path, _ in select(pattern, paths, [])]
        if not hits:
            raise NameNotFound(f"pattern {pattern!r} matches no module")
        self.modules = {path: model.get_submodule(path) for path in hits}
        self.approximation, self.sharpness = approximation, sharpness
        self.seen: dict[str, list[Tensor]] = {}
        self.hooks: list[Any] = []

    def watch(self) -> Density:
        return self

    def __enter__(self) -> Density:
        self.seen = {path: [] for path in self.modules}
        for path, module in self.modules.items():
            self.hooks.append(module.register_forward_pre_hook(lambda _, args, p=path: self.seen[p].append(args[0])))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def loss(self) -> Tensor:
        """The approximate share of non-zero activations, the mean over the layers.

        Raises:
            ConfigError: no forward went through them within the `with`.
        """
        return torch.stack([self.soft(torch.cat([a.flatten() for a in s])).mean() for s in self._layers()]).mean()

    def share(self, threshold: float = 0.0) -> float:
        """The share of activations whose size is above `threshold`, as it is."""
        return float(
            torch.cat([(a.detach().abs() > threshold).float().flatten() for s in self._layers() for a in s]).mean()
        )

    def soft(self, a: Tensor) -> Tensor:
        """The smooth stand-in of a != 0."""
        if self.approximation == "tanh":
            return torch.tanh(self.sharpness * a.abs())
        return a.square() / (a.square() + 1 / self.sharpness)

    def _layers(self) -> list[list[Tensor]]:
        layers = [s for s in self.seen.values() if s]
        if not layers:
            raise ConfigError("Density has seen no forward; run the model within `with`")
        return layers


@dataclass(frozen=True)
class AdaDEFT(Method, name="ada-deft", aliases=("ada-peft",)):
    """`y' = w * call(x)` around a feed-forward, w a trained number, 1 at the start (the adaptive variant of arXiv
    2402.01911); one parameter a layer. In eval, a layer with |w| at most `threshold` is not run and gives zeros, so that
    its residual branch is skipped. `layer_l1` presses the weights down.

    Choice: the paper's weighting could not be read in full; a plain factor with an L1 penalty is ours.

    Args:
        threshold: below it a layer is skipped in eval.
    """

    threshold: float = 0.05
    kind = "call"

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        like = next(context.module.parameters(), torch.empty(0))
        return Tensors({"w": 1 + zeros(1, like=like)})

    def around(self, p: Delta, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not p.training and not torch.compiler.is_compiling() and float(p.w.detach().abs()) <= self.threshold:
            x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
            return torch.zeros_like(x)
        y, put = first_tensor(call(*args, **kwargs))
        return put(y * p.w.to(y.dtype))


@dataclass(frozen=True)
class LayerDrop(Method, name="layer-drop", aliases=("layerdrop",)):
    """Structured dropout, `y' = x` with probability `p` in training and the layer itself in eval (arXiv 1909.11556);
    nothing is trained. One draw a call, for the whole batch, from torch's generator (so that activation checkpointing
    repeats it). The layer must give what it takes: a block with its residual inside.

    Args:
        p: chance that a layer is skipped (0.2 in the paper).
    """

    p: float = 0.2
    kind = "call"
    mixes = False

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ConfigError(f"p {self.p}; expected 0 <= p < 1")

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        return Tensors({})

    def around(self, p: Delta, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if p.training and float(torch.rand(())) < self.p:
            return args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        return call(*args, **kwargs)


def layer_l1(model: nn.Module, *, name: str = "default") -> Tensor:
    """Sum of |w| over an adapter's AdaDEFT layers, for the loss."""
    total: Tensor = torch.cat([d.w.abs() for d in sites_of(model, AdaDEFT, name)]).sum()
    return total
