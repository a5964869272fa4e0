"""Training steps of a VLM: SigLIP-So400m/14 at 384 frozen, a two-layer MLP trained, a 1.5B LLM with LoRA r=16.

    python -m benchmarks.vlm

729 + 128 tokens a sample, batch 8, the 128 supervised. Arms: mmpeft (tower and decoder on fused blocks, the tower one CUDA
graph), the same with transformers' SigLIP in place of timm's (other weights' order, so another loss), the same with the tower under
torch.compile in place of the fused blocks, mmpeft with the tower's features from a cache, transformers + PEFT, the same + compile.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import DEVICE, Row, compile_options, need, parse, parser
from benchmarks.models import (
    ALPHA,
    BATCHES,
    DTYPE,
    RANK,
    SHAPES,
    TARGETS,
    TINY,
    Shape,
    adamw,
    autocast,
    fill,
    llama,
    peft,
    set_mmpeft,
)

Step = Callable[[int], Any]


@dataclass(frozen=True)
class Sizes:
    """Of the row."""

    shape: Shape
    side: int
    visual: int
    text: int
    batch: int
    dim: int


def sizes(tiny: bool) -> Sizes:
    """729 visual and 128 text tokens, or toys."""
    return Sizes(TINY, 32, 4, 8, 2, 48) if tiny else Sizes(SHAPES["1.5b"], 384, 729, 128, 8, 1152)


def timm_tower(tiny: bool) -> nn.Module:
    """timm's SigLIP."""
    need("timm")
    import timm

    small = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 16, "mlp_ratio": 4}
    name = "vit_so400m_patch14_siglip_384"
    made: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, global_pool="", **small if tiny else {})
    return made


def transformers_tower(tiny: bool) -> nn.Module:
    """transformers' SigLIP of the same sizes."""
    need("transformers")
    from transformers import SiglipVisionConfig, SiglipVisionModel

    full = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384, "patch_size": 14}
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 16}
    sizes = (small | {"intermediate_size": 192}) if tiny else (full | {"intermediate_size": 4304})
    return SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False))


TOWERS: dict[str, Callable[[bool], nn.Module]] = {"timm": timm_tower, "transformers": transformers_tower}


class VLM(nn.Module):
    """Tower (timm's, or transformers' of the same sizes), connector, language model."""

    def __init__(self, s: Sizes, *, tiny: bool, library: str = "timm") -> None:
        super().__init__()
        self.tower = fill(TOWERS[library](tiny).to(DEVICE, DTYPE)).eval()
        self.connector = nn.Sequential(nn.Linear(s.dim, s.shape.hidden), nn.GELU(), nn.Linear(s.shape.hidden, s.shape.hidden))
        fill(self.connector.to(DEVICE)).requires_grad_(True)
        self.llm = llama(s.shape)

    def embeds(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """[B, visual + text, h]; `pixels` may be the tower's tokens already."""
        with torch.no_grad():
            tokens = self.tower(pixels) if pixels.ndim == 4 else pixels
            tokens = getattr(tokens, "last_hidden_state", tokens)
        with autocast():
            seen = self.connector(tokens.to(DTYPE if DEVICE == "cuda" else torch.float32))
        return torch.cat([seen.to(DTYPE), self.llm.get_input_embeddings()(ids)], 1)


def batches(s: Sizes, *, cached: bool) -> list[tuple[Tensor, Tensor]]:
    """Pixels (or features) and ids."""
    g = torch.Generator(DEVICE).manual_seed(3)
    shape = (s.batch, s.visual, s.dim) if cached else (s.batch, 3, s.side, s.side)
    pixels = [torch.randn(shape, device=DEVICE, generator=g).to(DTYPE) for _ in range(BATCHES)]
    return [(x, torch.randint(0, s.shape.vocab, (s.batch, s.text), device=DEVICE, generator=g)) for x in pixels]


def ours(args: argparse.Namespace, *, cached: bool = False, library: str = "timm", blocks: bool = True) -> Step:
    """mmpeft: the tower and the decoder by `mmpeft.compile`, the head at the supervised positions."""
    import mmpeft
    from mmpeft.kernels.cross_entropy import linear_cross_entropy

    s = sizes(args.tiny)
    model = VLM(s, tiny=args.tiny, library=library)
    plan = {
        "connector": "full",
        f"llm.model.layers.*.*.{{{','.join(TARGETS)}}}": mmpeft.LoRA(rank=RANK, alpha=ALPHA),
    }
    mmpeft.attach(model, plan, check=False)
    set_mmpeft(model.llm)  # by paths below the language model, as in PEFT's arm
    model.train()
    mmpeft.compile(model, blocks=blocks)
    optimizer, data = adamw(model), batches(s, cached=cached)
    head = model.llm.get_output_embeddings().weight

    def step(i: int) -> Tensor:
        pixels, ids = data[i % BATCHES]
        states = model.llm.model(inputs_embeds=model.embeds(pixels, ids), use_cache=False)[0]
        # the state before each text token predicts it
        hidden = states[:, s.visual - 1 : -1].reshape(-1, states.shape[-1])
        loss = linear_cross_entropy(hidden, head, ids.reshape(-1), ignore_index=None, reduction="mean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def peer(args: argparse.Namespace, *, compiled: bool) -> Step:
    """transformers + PEFT: labels over all positions, the head on all of them."""
    need("peft")
    s = sizes(args.tiny)
    model = VLM(s, tiny=args.tiny)
    model.llm = peft(model.llm, task_type="CAUSAL_LM")
    optimizer, data = adamw(model), batches(s, cached=False)

    def loss_of(pixels: Tensor, ids: Tensor) -> Tensor:
        labels = F.pad(ids, (s.visual, 0), value=-100)
        return model.llm(inputs_embeds=model.embeds(pixels, ids), labels=labels).loss

    forward = torch.compile(loss_of, **compile_options(args)) if compiled else loss_of

    def step(i: int) -> Tensor:
        with autocast():
            loss = forward(*data[i % BATCHES])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


ARMS: dict[str, Callable[[argparse.Namespace], Step]] = {
    "mmpeft": ours,
    "mmpeft, transformers' tower": lambda args: ours(args, library="transformers"),
    "mmpeft, compiled tower": lambda args: ours(args, blocks=False),
    "mmpeft, cached features": lambda args: ours(args, cached=True),
    "peft": lambda args: peer(args, compiled=False),
    "peft+compile": lambda args: peer(args, compiled=True),
}


def main(argv: Sequence[str] | None = None) -> Row:
    args = parse(parser(__doc__), argv, ARMS)
    s = sizes(args.tiny)
    length = s.visual + s.text
    flops = s.shape.flops(s.batch * length, length=length, supervised=s.batch * s.text) + s.batch * 0.67e12
    title = f"SigLIP-So400m 384 + MLP + 1.5b, {s.visual}+{s.text} tokens x{s.batch}, LoRA r{RANK}"
    row = Row(title, unit="samples/s", items=s.batch, flops=flops, args=args)
    row.arms({name: lambda build=build: build(args) for name, build in ARMS.items()}, again="mmpeft")
    other = ("cached", "transformers'")  # other inputs or weights, another loss
    row.lines = [x for x in row.lines if not any(word in x["arm"] for word in other)]
    row.gate(relative=1e-2)
    return row


if __name__ == "__main__":
    main()
