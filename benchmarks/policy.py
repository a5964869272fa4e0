"""One policy step at batch 1: SigLIP-B/16 (196 tokens) + 38 words + a linear chunk head on a 360M or 1.5B LLM.

    python -m benchmarks.policy --shape 360m
    python -m benchmarks.policy --shape 1.5b

Latency of pixels and ids to actions, fresh inputs every step. Arms: mmpeft with its LoRA unmerged in one CUDA graph; the
same, switching between two adapters at every step; PEFT unmerged and eager; merged and eager; merged, compiled with CUDA
graphs ("reduce-overhead"). The gate compares actions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import DEVICE, Row, compile_options, need, parse, parser
from benchmarks.models import ALPHA, BATCHES, DTYPE, RANK, SHAPES, TARGETS, TINY, fill, llama, peft, set_mmpeft

Step = Callable[[int], Any]
WORDS, CHUNK, ACTION = 38, 8, 7


class Policy(nn.Module):
    """Tower, projection, language model, linear head on the last state."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        need("timm")
        import timm

        shape = TINY if args.tiny else SHAPES[args.shape]
        small = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3} if args.tiny else {}
        tower = timm.create_model(
            "vit_base_patch16_siglip_224", pretrained=False, num_classes=0, global_pool="", **small
        )
        self.tower = fill(tower.to(DEVICE, DTYPE)).eval()
        self.project = fill(nn.Linear(tower.embed_dim, shape.hidden).to(DEVICE, DTYPE))
        self.llm = llama(shape).eval()
        self.head = fill(nn.Linear(shape.hidden, CHUNK * ACTION).to(DEVICE, DTYPE))
        self.side, self.vocab = (32, shape.vocab) if args.tiny else (224, shape.vocab)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """[1, 3, H, W], [1, L] -> [1, chunk, action]."""
        embeds = self.llm.get_input_embeddings()(ids)
        x = torch.cat([self.project(self.tower(pixels)), embeds], 1)
        decoder = self.llm.base_model.model.model if hasattr(self.llm, "peft_config") else self.llm.model
        states = decoder(inputs_embeds=x, use_cache=False)[0]
        return self.head(states[:, -1]).view(-1, CHUNK, ACTION)

    def observations(self) -> list[tuple[Tensor, Tensor]]:
        """Fresh inputs."""
        g = torch.Generator(DEVICE).manual_seed(4)
        pixels = [torch.randn(1, 3, self.side, self.side, device=DEVICE, generator=g).to(DTYPE) for _ in range(BATCHES)]
        return [(x, torch.randint(0, self.vocab, (1, WORDS), device=DEVICE, generator=g)) for x in pixels]


def replay(step: Callable[..., Tensor], policy: Policy, before: Callable[[int], None] | None = None) -> Step:
    """A step over the observations, without gradients."""
    inputs = policy.observations()

    @torch.no_grad()
    def run(i: int) -> Tensor:
        if before is not None:
            before(i)
        return step(*inputs[i % BATCHES])

    return run


def ours(args: argparse.Namespace, *, switch: bool = False) -> Step:
    """Unmerged, the whole step one CUDA graph; with `switch`, another adapter at every step."""
    import mmpeft

    policy = Policy(args)
    plan = {f"llm.model.layers.*.*.{{{','.join(TARGETS)}}}": mmpeft.LoRA(rank=RANK, alpha=ALPHA)}
    for name in ("one", "two"):
        mmpeft.attach(policy, plan, name=name, check=False)
    set_mmpeft(policy.llm, "one")
    set_mmpeft(policy.llm, "two", salt="two.")
    mmpeft.use(policy, "one")
    compiled = mmpeft.compile(policy.eval(), graphs=False)
    step = compiled.graph(policy)
    return replay(step, policy, (lambda i: mmpeft.use(policy, ("one", "two")[i % 2])) if switch else None)


def peer(args: argparse.Namespace, *, merged: bool = False, compiled: bool = False) -> Step:
    """PEFT on the LLM."""
    need("peft")
    policy = Policy(args)
    policy.llm = peft(policy.llm, task_type="CAUSAL_LM").eval()
    if merged:
        policy.llm = policy.llm.merge_and_unload()
    if not compiled:
        return replay(policy, policy)
    options = compile_options(args) if DEVICE == "cpu" else {"mode": "reduce-overhead", "dynamic": False}
    step = torch.compile(policy, **options)
    return replay(lambda *x: step(*x).clone(), policy)


ARMS: dict[str, Callable[[argparse.Namespace], Step]] = {
    "mmpeft": ours,
    "mmpeft, switching": lambda args: ours(args, switch=True),
    "peft": peer,
    "peft merged": lambda args: peer(args, merged=True),
    "peft merged+compile+graph": lambda args: peer(args, merged=True, compiled=True),
}


def main(argv: Sequence[str] | None = None) -> Row:
    made = parser(__doc__)
    made.add_argument("--shape", choices=("360m", "1.5b"), default="360m")
    made.set_defaults(warmup=10, steps=50)
    args = parse(made, argv, ARMS)
    shape = TINY if args.tiny else SHAPES[args.shape]
    flops = (shape.flops(1, length=234) - 4 * shape.hidden * shape.vocab) / 2 * 234 + 35e9
    row = Row(f"policy step, SigLIP-B + {args.shape}, batch 1", unit="steps/s", items=1, flops=flops, args=args)
    row.arms({name: lambda build=build: build(args) for name, build in ARMS.items()}, again="mmpeft")
    compared = [x for x in row.lines if "switching" not in x["arm"]]  # its last step runs the other adapter
    row.lines = compared
    row.gate(relative=5e-2)
    return row


if __name__ == "__main__":
    main()
