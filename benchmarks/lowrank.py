"""One adapted linear, or a group sharing its input, over the bare base GEMM: forward and backward at real sizes.

    python -m benchmarks.lowrank

Arms: the bare linear (frozen weight, input gradient), mmpeft's `lowrank_linear` (any weight) and `lowrank_group`
(packed), PEFT's LoRA linear under bf16 autocast. Prints milliseconds (CUDA graph replays, so launches do not count),
the ratio to the bare linear, and the relative error of the output and gradients against float64.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import versions
from mmpeft.kernels import PackedGroup, lowrank_group, lowrank_linear, reference

SIZES = {  # name: tokens, in, outs
    "1.5b qkv": (8192, 1536, [1536, 256, 256]),
    "1.5b gate|up": (8192, 1536, [8960, 8960]),
    "1.5b down": (8192, 8960, [1536]),
    "7b gate|up": (4096, 4096, [11008, 11008]),
    "vit-b fc1": (50432, 768, [3072]),
}
RANK = 16


def graph_ms(run: Callable[[], object], replays: int = 20) -> float:
    """Median milliseconds of a captured run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(torch.tensor(times).median())


def peft_linear(weight: Tensor, A: Tensor, B: Tensor) -> Callable[[Tensor], Tensor]:
    """PEFT's LoRA around one linear."""
    from peft import LoraConfig, get_peft_model

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="cuda", dtype=weight.dtype)
    linear.weight.data = weight
    model = get_peft_model(torch.nn.Sequential(linear), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(A)
    layer.lora_B["default"].weight.data.copy_(B)
    return layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    print(f"{'size':14} {'arm':16} {'fwd+bwd ms':>11} {'over bare':>10} {'error y':>9} {'error dx':>9} {'error dB':>9}")
    for name, (T, n_in, outs) in SIZES.items():
        g = torch.Generator("cuda").manual_seed(0)

        def make(*s, g=g):
            return torch.randn(*s, device="cuda", generator=g)

        weights = [(make(o, n_in) * 0.02).bfloat16() for o in outs]
        As = [(make(RANK, n_in) / n_in**0.5).requires_grad_() for _ in outs]
        Bs = [(make(o, RANK) * 0.02).requires_grad_() for o in outs]
        x = make(T, n_in).bfloat16().requires_grad_()
        dy = [make(T, o).bfloat16() for o in outs]
        packed = PackedGroup(weights, None, [RANK] * len(outs), [1.0] * len(outs))
        packed.refresh(As, Bs)
        stacked = torch.cat(weights)
        modules = [peft_linear(w, A, B) for w, A, B in zip(weights, As, Bs, strict=True)]

        def peft(modules=modules, x=x) -> list[Tensor]:
            with torch.autocast("cuda", torch.bfloat16):
                return [m(x) for m in modules]

        arms: dict[str, tuple[Callable[[], list[Tensor]], list[Tensor]]] = {
            "bare": (lambda x=x, w=stacked, o=outs: list(F.linear(x, w).split(o, -1)), [x]),
            "lowrank_linear": (
                lambda x=x, w=weights, A=As, B=Bs: [
                    lowrank_linear(x, *t[:1], None, *t[1:], 1.0) for t in zip(w, A, B, strict=True)
                ],
                [x, *As, *Bs],
            ),
            "lowrank_group": (lambda x=x, p=packed, A=As, B=Bs: lowrank_group(x, p, A, B), [x, *As, *Bs]),
            "peft": (
                peft,
                [x, *(p for m in modules for p in (m.lora_A["default"].weight, m.lora_B["default"].weight))],
            ),
        }
        few = x[:512].detach().double().requires_grad_()
        exact = [
            reference.lowrank_linear(few, w.double(), None, A.double(), B.double(), 1.0)
            for w, A, B in zip(weights, As, Bs, strict=True)
        ]
        (want_dx,) = torch.autograd.grad(exact, [few], [d[:512].double() for d in dy], retain_graph=True)
        base = None
        for arm, (forward, inputs) in arms.items():

            def grads(f=forward, i=inputs, dy=dy):
                return torch.autograd.grad(f(), i, dy)

            ms = graph_ms(grads)
            base = base or ms
            errors = ["", "", ""]
            if arm != "bare":

                def error(a, b):
                    return f"{float((a.double() - b).norm() / b.norm()):.1e}"

                dx, *_, dB = grads()
                S = x.detach().double() @ As[-1].detach().double().mT
                errors = [
                    error(torch.cat(forward(), -1)[:512], torch.cat(exact, -1)),
                    error(dx[:512], want_dx),
                    error(dB, dy[-1].double().mT @ S),
                ]
            print(
                f"{name:14} {arm:16} {ms:11.3f} {ms / base:10.3f} {errors[0]:>9} {errors[1]:>9} {errors[2]:>9}",
                flush=True,
            )
            if args.out:
                line = {"workload": f"linear {name}", "arm": arm, "ms": round(ms, 4), "over_bare": round(ms / base, 4)}
                line |= {"errors": errors, "device": torch.cuda.get_device_name(), "versions": versions()}
                with args.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
