"""Scaling methods: learned gains on activations, written as row or column scales of the weight that makes them.

IA3            Liu et al. 2022, arXiv 2205.05638
t_few_losses   the two losses that T-Few, the recipe of the same paper, adds to the likelihood of the answer
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Factors, Method, Tensors, wide
from mmpeft.adapters.site import Site, matrix_tensors, own_tensors
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class IA3(Method, name="ia3", aliases=("(ia)3",)):
    """Infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022, arXiv 2205.05638).

    The paper multiplies keys, values and the feed-forward's inner activations by learned vectors `l` that start at 1.
    `side` says which side of the matched weight they are on: "out" for key and value projections, `W' = diag(l) W`;
    "in" for the feed-forward's second layer, whose input they scale, `W' = W diag(l)`; a convolution has one gain an
    input channel, whatever its kernel.

    With "out", the layer's bias is part of the activation and is scaled with it: its site shares `l`.
    """

    side: Literal["out", "in"] = "out"
    space = "any"

    def __post_init__(self) -> None:
        if self.side not in ("out", "in"):
            raise ConfigError(f"side {self.side!r}; expected 'out' or 'in'")

    def tensors(self, path: str, module: nn.Module) -> list[str]:
        weights = matrix_tensors(module)
        biases = [w.removesuffix("weight") + "bias" for w in weights] if self.side == "out" else []
        return weights + [b for b in biases if b in own_tensors(module)]

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        key = (self.name, site.path, site.role, site.tensor.removesuffix("weight").removesuffix("bias"))
        if site.tensor.endswith("bias"):
            return Tensors({}, derived={"l": context.shared[key]})
        *stack, out, into = base.shape
        n = out if self.side == "out" else input_channels(site) or into
        gains = nn.Parameter(torch.ones(*stack, n, dtype=wide(base.dtype), device=base.device))
        context.shared[key] = gains
        return Tensors({"l": gains})

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        if self.side == "out":
            return Factors(row=p.l)
        gains = input_gains(p.l, p.site)
        return Factors(col=gains.squeeze(-2)) if gains.shape[-2] == 1 else None  # grouped: rows differ in their inputs

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        gains: Tensor = p.l
        if not p.site.tensor.endswith("bias"):
            gains = p.l.unsqueeze(-1) if self.side == "out" else input_gains(p.l, p.site)
        return W * gains


def input_channels(site: Site) -> int | None:
    """A convolution's input channels, over all groups; None for other layouts."""
    layout = site.layout
    if layout is None or layout.name not in ("conv", "conv_transposed"):
        return None
    return layout.shape[1] * layout.groups if layout.name == "conv" else layout.shape[0]


def input_gains(gains: Tensor, site: Site) -> Tensor:
    """Gains of the inputs as factors of the matrix view: [*, 1, in], or [out, in] for a grouped convolution."""
    if input_channels(site) is None:
        return gains.unsqueeze(-2)
    assert site.layout is not None
    groups, (out, into) = site.layout.groups, site.layout.matrix_shape()
    gains = gains.view(groups, -1)  # each group's own input channels, then one column a kernel tap
    gains = gains.repeat_interleave(into // gains.shape[1], 1)
    return gains if groups == 1 else gains.repeat_interleave(out // groups, 0)


def t_few_losses(log_probs: Tensor, mask: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """T-Few's unlikelihood and length-normalised losses (arXiv 2205.05638), each the mean over the batch, to be added to the
    likelihood loss of the answer:

        unlikelihood        - sum over wrong choices and their tokens of log(1 - p) / number of these tokens
        length-normalised   cross-entropy of the answer among the choices, each scored by its mean log p

    Args:
        log_probs: log p of every token of every choice given those before it, [B, choices, T].
        mask: which are tokens of the choice and not padding, [B, choices, T] bool.
        answer: the right choice of each example [B].

    Raises:
        ConfigError: shapes that do not fit, or a choice without a token.
    """
    if log_probs.ndim != 3 or mask.shape != log_probs.shape or answer.shape != log_probs.shape[:1]:
        raise ConfigError(
            f"log_probs {tuple(log_probs.shape)}, mask {tuple(mask.shape)}, answer {tuple(answer.shape)}; expected "
            "[B, choices, T] twice and [B]"
        )
    lengths = mask.sum(-1)
    if not bool(lengths.all()):
        raise ConfigError("a choice has no token")
    wrong = mask & ~F.one_hot(answer, log_probs.shape[1]).bool().unsqueeze(-1)
    # log(1 - p) = log(-expm1(log p)), finite where p rounds to 1.
    other = torch.log((-torch.expm1(log_probs)).clamp_min(torch.finfo(log_probs.dtype).eps))
    unlikelihood = -torch.where(wrong, other, 0).sum((1, 2)) / wrong.sum((1, 2)).clamp_min(1)
    scores = torch.where(mask, log_probs, 0).sum(-1) / lengths
    return unlikelihood.mean(), F.cross_entropy(scores, answer)
