"""Methods that edit activations by learned vectors: gains that fold into the weight, and edits around a call.

Propulsion   Kowsher et al. 2024, arXiv 2409.10927: outputs times z^k. (The survey speaks of inputs and prompts; it
             is neither.)
SSF          Lian et al. 2022, arXiv 2210.08823: gamma y + beta after every operation, folded into weight and bias.
RED          Wu et al. 2024, arXiv 2402.15179: the same edit around any call, bias or not.
LoFiT        Yin et al. 2024, arXiv 2406.01563: offsets for a few attention heads, chosen by a first run that scales
             them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Factors, Method, Tensors, vector_tensors, zeros
from mmpeft.adapters.methods.bottleneck import channel_vector, first_tensor, width_in
from mmpeft.adapters.methods.low_rank import at_least
from mmpeft.adapters.site import Site, matrix_tensors, own_tensors
from mmpeft.adapters.state import slots
from mmpeft.errors import ConfigError, Unsupported


def bias_of(tensor: str) -> str:
    """The bias that belongs to a weight: weight -> bias, in_proj_weight -> in_proj_bias, weight_ih_l0 -> bias_ih_l0,
    and for expert stacks down_proj -> down_proj_bias. A bias stands for itself."""
    if "bias" in tensor:
        return tensor
    return tensor.replace("weight", "bias") if "weight" in tensor else f"{tensor}_bias"


class OutputGain(Method):
    """Weight methods that multiply what a layer gives, its bias included: the weight's site owns the gain, the bias'
    site shares it."""

    space = "any"

    def tensors(self, path: str, module: nn.Module) -> list[str]:
        weights = self.weights(path, module)
        own = own_tensors(module)
        if (
            isinstance(module, nn.MultiheadAttention)
            and "in_proj_bias" in own
            and "in_proj_weight" not in own
            and weights
        ):
            raise Unsupported(f"{path}: its three projections share one bias, which cannot follow three gains")
        return weights + [bias_of(w) for w in weights if bias_of(w) in own]

    def weights(self, path: str, module: nn.Module) -> list[str]:
        """The weights this method adapts; their biases follow."""
        return matrix_tensors(module)

    def key(self, site: Site) -> tuple[str, str, str | None, str]:
        """What a weight and its bias have in common."""
        return (self.name, site.path, site.role, bias_of(site.tensor))

    def share(self, name: str, site: Site, context: Context, start: Callable[[], Tensor]) -> Tensors:
        """The gain `name`: owned by the first of a weight and its bias that asks, seen by the other."""
        key = self.key(site)
        if key in context.shared:
            return Tensors({}, derived={name: context.shared[key]})
        context.shared[key] = nn.Parameter(start())
        return Tensors({name: context.shared[key]})


@dataclass(frozen=True)
class Propulsion(OutputGain, name="propulsion"):
    """`y = (W x + b) * z^degree` with a trained z [out], 1 at the start (arXiv 2409.10927); several vectors multiply,
    prod_j z_j^degree (the survey's "3-Row" is three). `vectors` out parameters.

    Args:
        degree: k, a fixed integer (15 in the paper; the authors' code uses 5 to 55).
        vectors: number of z.
    """

    degree: int = 15
    vectors: int = 1

    def __post_init__(self) -> None:
        at_least(self, degree=1, vectors=1)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        W = base
        return self.share("z", site, context, lambda: 1 + zeros(*W.shape[:-2], self.vectors, W.shape[-2], like=W))

    def gain(self, p: Delta) -> Tensor:
        """prod_j z_j^degree [*, out]."""
        gain: Tensor = p.z.pow(self.degree).prod(-2)
        return gain

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        return Factors(row=self.gain(p))

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        gain = self.gain(p)
        return W * (gain if "bias" in p.site.tensor else gain.unsqueeze(-1))


@dataclass(frozen=True)
class SSF(OutputGain, name="ssf"):
    """Scale and shift, `y' = gamma * y + beta` after a linear layer, convolution or normalisation (arXiv 2210.08823),
    folded: W' = diag(gamma) W, b' = gamma b + beta. gamma 1, beta 0 at the start; 2 out parameters.

    The layer needs a bias to hold beta; where it has none, `RED` is the same edit around its call.
    """

    def weights(self, path: str, module: nn.Module) -> list[str]:
        found = matrix_tensors(module) or [
            t for t in vector_tensors(module, ["weight"]) if not isinstance(module, nn.RNNBase)
        ]
        if any(bias_of(w) not in own_tensors(module) for w in found):
            raise Unsupported(
                f"SSF at {path}: this {type(module).__name__} has no bias to hold the shift; use RED there"
            )
        return found

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        n = base.shape[0] if base.ndim == 1 else base.shape[-2]
        W = base
        made = self.share("gamma", site, context, lambda: 1 + zeros(n, like=W))
        return made if made.trained else replace(made, trained={"beta": zeros(base.shape[-1], like=base)})

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        return Factors(row=p.gamma)

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        gamma: Tensor = p.gamma
        if "beta" in p._parameters:
            return torch.addcmul(p.beta, W, gamma)
        return W * (gamma if W.ndim == 1 else gamma.unsqueeze(-1))


@dataclass(frozen=True)
class ChannelEdit(Method):
    """Call methods on the channels a module gives.

    Args:
        dim: channel width, where it cannot be read off the module's own layers.
    """

    dim: int | None = None
    kind = "call"

    def channels(self, site: Site, context: Context) -> Tensor:
        """Zeros [channels]."""
        return channel_vector(self.dim, site, context.module)


@dataclass(frozen=True)
class RED(ChannelEdit, name="red"):
    """Representation editing, `y' = l * y + b` around a call (arXiv 2402.15179; there, after every feed-forward); l 1,
    b 0 at the start; 2 width parameters."""

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        b = self.channels(site, context)
        return Tensors({"l": torch.ones_like(b), "b": b})

    def around(self, p: Delta, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        y, put = first_tensor(call(*args, **kwargs))
        return put(y * on_channels(p.l, y, p.site) + on_channels(p.b, y, p.site))


def on_channels(v: Tensor, y: Tensor, site: Site) -> Tensor:
    """A vector shaped to broadcast along y's channel axis: the last one, or axis 1 of a convolutional map."""
    n = v.shape[0]
    if y.shape[-1] == n:
        return v.to(y.dtype)
    if y.ndim in (3, 4, 5) and y.shape[1] == n:
        return v.to(y.dtype).view(-1, *(1,) * (y.ndim - 2))
    raise ConfigError(f"{site.path}: a tensor of shape {tuple(y.shape)} has no channel axis of {n}; pass dim=")


# --- LoFiT: attention heads as the input channels of the output projection
# ---------------------------------------------


class HeadEdit(Method):
    """Call methods on an attention's output projection, whose input is the heads' outputs side by side."""

    kind = "call"

    def widths(self, site: Site, context: Context, num_heads: int | None) -> tuple[int, int, Tensor]:
        """(heads, width of one, a tensor of the module)."""
        width = width_in(context.module)
        parent = context.root.get_submodule(site.path.rpartition(".")[0])
        config = getattr(parent, "config", None)
        heads = num_heads or getattr(parent, "num_heads", None) or getattr(config, "num_attention_heads", None)
        if width is None or not isinstance(heads, int) or width % heads:
            raise ConfigError(f"{site.path}: {heads} heads do not divide an input of {width}; pass num_heads=")
        return heads, width // heads, next(context.module.parameters())


@dataclass(frozen=True)
class HeadScaling(HeadEdit, name="lofit-scaling"):
    """LoFiT's first run (arXiv 2406.01563): z_h' = (1 + a_h) * z_h for every head, a_h [width of a head] from N(0,
    `std`); the loss of this run adds an L1 penalty on a. `lofit_plan` reads the result. At most about `std` from the
    identity at the start.

    Args:
        num_heads: heads of the attention; None reads them off the module around the projection.
        std: of the start, 1e-3 in the paper.
    """

    num_heads: int | None = None
    std: float = 1e-3
    identity_at_init = False

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        heads, width, like = self.widths(site, context, self.num_heads)
        return Tensors({"a": zeros(heads, width, like=like).normal_(std=self.std)})

    def around(self, p: Delta, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return call(args[0] * (1 + p.a.flatten()).to(args[0].dtype), *args[1:], **kwargs)


@dataclass(frozen=True)
class LoFiT(HeadEdit, name="lofit"):
    """LoFiT's second run (arXiv 2406.01563): z_h' = z_h + v_h for the chosen heads, v_h [width of a head] from 0;
    `len(heads)` width parameters.

    Args:
        heads: numbers of the edited heads; () is all of them. `lofit_plan` chooses.
        num_heads: as in `HeadScaling`.
    """

    heads: tuple[int, ...] = ()
    num_heads: int | None = None

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        heads, width, like = self.widths(site, context, self.num_heads)
        chosen = self.heads or tuple(range(heads))
        if len(set(chosen)) < len(chosen) or not all(0 <= h < heads for h in chosen):
            raise ConfigError(f"heads {chosen} at {site.path}; expected different numbers from 0 to {heads - 1}")
        index = torch.tensor(chosen, device=like.device if not like.is_meta else "meta")
        return Tensors({"v": zeros(len(chosen), width, like=like)}, derived={"index": index}, facts={"heads": heads})

    def around(self, p: Delta, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        offset = p.v.new_zeros(p.facts["heads"], p.v.shape[1]).index_copy(0, p.index, p.v)
        return call(args[0] + offset.flatten().to(args[0].dtype), *args[1:], **kwargs)


def lofit_plan(model: nn.Module, k: int, name: str | None = None) -> Mapping[str, LoFiT]:
    """The plan of LoFiT's second run: the k heads with the largest ||a_h|| over all sites of a trained `HeadScaling`
    adapter.

    Raises:
        ConfigError: no `HeadScaling` adapter, or fewer than k heads.
    """
    found = [d for _, _, slot in slots(model) for _, d in slot.deltas(None if name is None else (name,))]
    scored = [
        (float(norm), d.site.path, h)
        for d in found
        if isinstance(d.method, HeadScaling)
        for h, norm in enumerate(d.a.detach().norm(dim=-1))
    ]
    if not 1 <= k <= len(scored):
        raise ConfigError(f"k {k}; expected 1 to {len(scored)}, the number of heads with a HeadScaling adapter")
    plan: dict[str, tuple[int, ...]] = {}
    for _, path, head in sorted(scored, reverse=True)[:k]:
        plan[path] = tuple(sorted((*plan.get(path, ()), head)))
    return {path: LoFiT(heads=heads) for path, heads in plan.items()}
