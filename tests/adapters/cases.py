"""Tables for the property tests: every kind of site, every weight method, and the helpers that fill and compare.

Every host is a model around one site, so that paths, freezing and detaching are the real ones. Inputs are batches of
more than one, larger than the kernel, of odd sizes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmpeft
from mmpeft.adapters.state import slots

ATOL = 1e-5


class Host(nn.Module):
    """A model around one site: a norm in front (floating inputs), the site, a mixing nonlinearity behind."""

    def __init__(self, site: nn.Module, width: int = 0):
        super().__init__()
        self.norm = nn.LayerNorm(width) if width else nn.Identity()
        self.site = site

    def forward(self, x):
        return torch.tanh(self.site(self.norm(x)))


class Attention(nn.Module):
    """Self-attention (or attention to keys of other widths) through nn.MultiheadAttention."""

    def __init__(self, **kwargs):
        super().__init__()
        self.site = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)

    def forward(self, x):
        wide = self.site.kdim != 8
        keys = torch.cat([x, x[..., :2]], -1) if wide else x
        values = torch.cat([x, x[..., :4]], -1) if wide else x
        return self.site(x, keys, values, need_weights=False)[0]


class Experts(nn.Module):
    """Bare expert stacks [e, out, in] or, with is_transposed, [e, in, out], as transformers stores them."""

    def __init__(self, is_transposed: bool):
        super().__init__()
        self.is_transposed = is_transposed
        up, down = ((3, 6, 8), (3, 4, 6)) if is_transposed else ((3, 8, 6), (3, 6, 4))
        self.gate_up_proj = nn.Parameter(0.3 * torch.randn(up))
        self.down_proj = nn.Parameter(0.3 * torch.randn(down))

    def forward(self, x):  # [B, 6] -> [B, 6]
        up, down = (
            (self.gate_up_proj, self.down_proj) if self.is_transposed else (self.gate_up_proj.mT, self.down_proj.mT)
        )
        gate, value = torch.einsum("bi,eio->ebo", x, up).chunk(2, -1)
        return torch.einsum("ebi,eio->bo", F.silu(gate) * value, down)


class Tied(nn.Module):
    """Embedding and output head sharing one parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


class Recurrent(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.site = cls(5, 4, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.site(x)[0]


class DirectRead(nn.Module):
    """A layer whose weight is read past its forward, as timm's EVA and BEiT do."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x):
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


class EncoderLayer(nn.Module):
    """torch's encoder layer, whose eval fast path reads all weights past their modules."""

    def __init__(self):
        super().__init__()
        self.site = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.site(x)


def _hf_conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(7, 5)


def _old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Conv1d(6, 4, 3, padding=1, groups=2), dim=2)


def _new_weight_norm():
    return nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 4, 3, padding=1, groups=2), name="weight", dim=2)


@dataclass(frozen=True)
class SiteCase:
    """A host model, an input, and the pattern of its matrix sites."""

    name: str
    make: Callable[[], nn.Module]
    data: Callable[[], Tensor]
    match: str = "site"
    factored: bool = False  # a call of the site needs no W'
    biased: bool = True
    stack: bool = False  # expert stacks
    norm: bool = False  # a normalisation: vectors only
    variant: bool = False  # of a geometry that another case stands for: in the main properties only

    def __str__(self) -> str:
        return self.name


def _floats(*shape: int):
    return lambda: torch.randn(*shape)


def _ids():
    return torch.randint(0, 11, (3, 5))


def _linear(*shape):
    return lambda: Host(nn.Linear(5, 7), 5), _floats(*shape, 5)


def _conv(cls, *size, **kwargs):
    return lambda: Host(cls(4, 6, **kwargs)), _floats(3, 4, *size)


SITES = [
    SiteCase("linear-2d", *_linear(3), factored=True),
    SiteCase("linear-3d", *_linear(3, 4), factored=True),
    SiteCase(
        "linear-nobias", lambda: Host(nn.Linear(5, 7, bias=False), 5), _floats(3, 4, 5), factored=True, biased=False
    ),
    SiteCase("hf-conv1d", lambda: Host(_hf_conv1d(), 5), _floats(3, 4, 5), factored=True),
    SiteCase("conv1d", *_conv(nn.Conv1d, 9, kernel_size=3, stride=2, padding=1), factored=True),
    SiteCase("conv2d", *_conv(nn.Conv2d, 7, 5, kernel_size=3, stride=2, padding=1), factored=True),
    SiteCase("conv3d", *_conv(nn.Conv3d, 5, 3, 5, kernel_size=(3, 1, 3), padding=1), factored=True),
    SiteCase("conv-patch", *_conv(nn.Conv2d, 6, 9, kernel_size=3, stride=3, bias=False), factored=True, biased=False),
    SiteCase("conv-dilated", *_conv(nn.Conv2d, 9, 7, kernel_size=3, dilation=2, padding=2), factored=True),
    SiteCase("conv-same", *_conv(nn.Conv2d, 9, 7, kernel_size=(3, 5), padding="same"), factored=True),
    SiteCase("conv-grouped", *_conv(nn.Conv2d, 7, 5, kernel_size=3, groups=2, padding=1)),
    SiteCase("conv-depthwise", lambda: Host(nn.Conv2d(4, 8, 3, groups=4, dilation=2)), _floats(3, 4, 9, 7)),
    *(
        SiteCase(
            f"conv{len(size)}d-{mode}",
            *_conv(cls, *size, kernel_size=3, padding=2, padding_mode=mode),
            factored=True,
            variant=True,
        )
        for mode in ("reflect", "replicate", "circular")
        for cls, size in ((nn.Conv1d, (9,)), (nn.Conv2d, (7, 5)), (nn.Conv3d, (5, 3, 5)))
    ),
    SiteCase(
        "conv-depthwise-reflect",
        lambda: Host(nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect")),
        _floats(3, 4, 7, 5),
    ),
    SiteCase("convt1d", *_conv(nn.ConvTranspose1d, 5, kernel_size=3, stride=2, output_padding=1)),
    SiteCase("convt2d", *_conv(nn.ConvTranspose2d, 5, 3, kernel_size=3, stride=2, dilation=2)),
    SiteCase("convt2d-grouped", *_conv(nn.ConvTranspose2d, 5, 3, kernel_size=3, stride=2, groups=2, padding=1)),
    SiteCase("convt3d", *_conv(nn.ConvTranspose3d, 3, 3, 3, kernel_size=2, groups=2)),
    SiteCase("embedding", lambda: Host(nn.Embedding(11, 6)), _ids, factored=True, biased=False),
    SiteCase("embedding-padding", lambda: Host(nn.Embedding(11, 6, padding_idx=2)), _ids, factored=True, biased=False),
    SiteCase("embedding-max-norm", lambda: Host(nn.Embedding(11, 6, max_norm=1.0)), _ids, biased=False),
    SiteCase("embedding-bag", lambda: Host(nn.EmbeddingBag(11, 6)), _ids, biased=False),
    SiteCase("mha", Attention, _floats(3, 5, 8), "site[q,v]"),
    SiteCase("mha-whole", Attention, _floats(3, 5, 8), "site"),
    SiteCase("mha-out", Attention, _floats(3, 5, 8), "site.out_proj"),
    SiteCase("mha-kdim", lambda: Attention(kdim=10, vdim=12), _floats(3, 5, 8)),
    SiteCase("direct-read", DirectRead, _floats(3, 5, 6), "qkv[q,v]"),
    SiteCase("direct-read-whole", DirectRead, _floats(3, 5, 6), "qkv"),
    SiteCase("experts", lambda: Host(Experts(False), 6), _floats(5, 6), biased=False, stack=True),
    SiteCase("experts-transposed", lambda: Host(Experts(True), 6), _floats(5, 6), biased=False, stack=True),
    SiteCase(
        "experts-role",
        lambda: Host(Experts(True), 6),
        _floats(5, 6),
        "site.gate_up_proj[gate]",
        biased=False,
        stack=True,
    ),
    SiteCase("tied", Tied, _ids, "embed", biased=False),
    SiteCase("tied-head", Tied, _ids, "head", biased=False),
    SiteCase("lstm", lambda: Recurrent(nn.LSTM), _floats(3, 4, 5)),
    SiteCase("gru", lambda: Recurrent(nn.GRU), _floats(3, 4, 5)),
    SiteCase("weight-norm-old", lambda: Host(_old_weight_norm()), _floats(3, 6, 7)),
    SiteCase("weight-norm-new", lambda: Host(_new_weight_norm()), _floats(3, 6, 7)),
    *(
        SiteCase(
            f"norm-{type(norm).__name__.lower()}",
            lambda norm=norm: Host(copy.deepcopy(norm)),
            _floats(3, 4, 7, 5),
            norm=True,
        )
        for norm in (nn.LayerNorm(5), nn.RMSNorm(5), nn.GroupNorm(2, 4), nn.BatchNorm2d(4))
    ),
    SiteCase("encoder-layer", EncoderLayer, _floats(3, 5, 8), "site.{linear1,linear2,self_attn.out_proj,self_attn}"),
]

METHODS: dict[str, mmpeft.Method] = {
    "lora": mmpeft.LoRA(rank=2, alpha=3),
    "rslora": mmpeft.LoRA(rank=2, alpha=3, rslora=True),
    "lora-gaussian": mmpeft.LoRA(rank=1, init_from="gaussian"),
    "lora-orthogonal": mmpeft.LoRA(rank=2, init_from="orthogonal"),
    "pissa": mmpeft.LoRA(rank=2, alpha=1, init_from="pissa"),
    "olora": mmpeft.LoRA(rank=2, alpha=1, init_from="olora"),
    "dora": mmpeft.DoRA(rank=2, alpha=3),
    "vera": mmpeft.VeRA(rank=3),
    "ia3-out": mmpeft.IA3(side="out"),
    "ia3-in": mmpeft.IA3(side="in"),
    "rocoft-rows": mmpeft.RoCoFT(rank=2, axis="rows", select="magnitude"),
    "rocoft-columns": mmpeft.RoCoFT(rank=2, axis="columns", select="random"),
    "full": mmpeft.Full(),
    "bitfit": mmpeft.BitFit(),
    "layernorm": mmpeft.LayerNormTuning(),
}


FEW = {
    n: METHODS[n] for n in ("lora", "pissa", "dora", "vera", "ia3-out", "rocoft-columns", "full", "bitfit", "layernorm")
}
INITS = ("rslora", "lora-gaussian", "lora-orthogonal", "olora")
STOOD_FOR = """linear-nobias conv1d conv3d conv-patch conv-same convt1d convt3d embedding-bag mha-whole
direct-read-whole gru experts""".split()  # of a kind that another case stands for
MAIN = [site for site in SITES if not site.variant and site.name not in STOOD_FOR]


def grid(methods=METHODS, sites=SITES) -> list[tuple[str, SiteCase]]:
    """(method name, site) pairs that make sense together."""

    def fits(name: str, site: SiteCase) -> bool:
        if site.norm:
            return name in ("layernorm", "full") or (name == "bitfit" and "rms" not in site.name)
        if name == "bitfit":
            return site.biased and "[" not in site.match
        if name in INITS and site.name not in ("linear-3d", "conv2d", "mha", "experts-transposed"):
            return False  # an init or a scale knows nothing of the site's kind
        return name != "layernorm" and not (name == "vera" and site.stack)

    return [(name, site) for site in sites for name in methods if fits(name, site)]


def base_output(model: nn.Module, x: Tensor) -> Tensor:
    """The plain model's output, its parameters frozen (torch picks kernels of other rounding for trained ones)."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    with torch.no_grad():
        for p, _ in flags:
            p.requires_grad_(False)
        y = model(x).clone()
    for p, flag in flags:
        p.requires_grad_(flag)
    return y


def build(site: SiteCase, method: str, name: str = "a", check: bool = False) -> tuple[nn.Module, Tensor, Tensor]:
    """(adapted model, input, base output) with fresh weights; the adapter is still the identity."""
    model, x = site.make().eval(), site.data()
    base = base_output(model, x)
    mmpeft.attach(model, {site.match: METHODS[method]}, name=name, example=x, check=check)
    return model, x, base


def deltas(model: nn.Module, name: str = "a") -> list[Any]:
    return [d for _, _, slot in slots(model) for _, d in slot.deltas((name,))]


def fill(model: nn.Module, name: str = "a", seed: int = 1, size: float = 0.3) -> None:
    """Random values in every trained tensor of an adapter: a zero factor would hide a broken one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for delta in deltas(model, name):
            for n in delta.trained:
                p = delta._parameters[n]
                p.add_(torch.randn(p.shape, generator=generator).to(p) * size)


def close(a: Tensor, b: Tensor, tolerance: float = ATOL) -> bool:
    """Largest difference within `tolerance` of the largest value (at least 1)."""
    return float((a - b).detach().abs().max()) <= tolerance * max(1.0, float(b.detach().abs().max()))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What `detach` must give back: classes, keys, tensors by identity and value, flags, modes, attributes, hooks."""
    return {
        "types": {n: type(m) for n, m in model.named_modules()},
        "ids": {n: id(p) for n, p in [*model.named_parameters(), *model.named_buffers()]},
        "values": {n: copy.deepcopy(t.detach()) for n, t in model.state_dict().items()},
        "grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in model.named_modules()},
        "attributes": {n: set(m.__dict__) for n, m in model.named_modules()},
        "hooks": {n: len(m._forward_pre_hooks) for n, m in model.named_modules()},
    }


def assert_same_object(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in before:
        if key != "values":
            assert after[key] == before[key], key
    assert list(after["values"]) == list(before["values"])
    for n, t in before["values"].items():
        assert torch.equal(after["values"][n], t), n


def losses_on(model: nn.Module, x: Any, target: torch.Tensor, *, lr: float, steps: int) -> list[float]:
    """Mean squared errors of `steps` steps of Adam on what the adapter trains."""
    optimizer = torch.optim.Adam(mmpeft.parameter_groups(model, lr=lr))
    losses = []
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses
