"""FSDP2 over two devices equals one device: a frozen Llama with LoRA, sharded by torch's own `fully_shard`.

    torchrun --nproc-per-node 2 -m benchmarks.fsdp2            # NCCL on two GPUs; gloo where there is no GPU
    torchrun --nproc-per-node 2 -m benchmarks.fsdp2 --hidden 64 --layers 2 --steps 4

Every rank also trains the same model unsharded on the whole batch. Checked: the losses of both agree step by step, the
base shards are bit for bit what they were, and the adapter saved from the sharded model loads into a plain one and gives
its loss. Prints one JSON line.
"""

import argparse
import datetime
import json
import os
import tempfile
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import mmpeft


def build(args: argparse.Namespace, device: torch.device) -> LlamaForCausalLM:
    """The same random model on every rank, with LoRA on all linear layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 32,
    )
    model = LlamaForCausalLM(config).to(device, torch.bfloat16 if args.bf16 else torch.float32)
    plan = {
        "model.layers.*.self_attn.{q,k,v,o}_proj": mmpeft.LoRA(rank=8),
        "model.layers.*.mlp.*_proj": mmpeft.LoRA(rank=8),
    }
    return mmpeft.attach(model, plan, "a")


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids).logits.float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(model: torch.nn.Module, batches: torch.Tensor) -> tuple[list[float], float]:
    """Losses per step, and seconds a step after the first two."""
    optimizer = torch.optim.AdamW(mmpeft.parameter_groups(model, lr=1e-3))
    losses, started = [], 0.0
    for i, ids in enumerate(batches):
        if i == 2:
            _sync()
            started = time.perf_counter()
        loss = loss_of(model, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    _sync()
    return [float(x) for x in losses], (time.perf_counter() - started) / max(1, len(batches) - 2)


def _sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8, help="sequences in all, split over the ranks")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--bf16", action="store_true", help="a bf16 base; adapters stay fp32 and compute in bf16")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")

    generator = torch.Generator().manual_seed(1)
    # a learnable stream: each token follows from the one before
    start = torch.randint(1000, (args.steps, args.batch, 1), generator=generator)
    batches = ((start + torch.arange(args.length) * 7) % 1000).to(device)

    plain, plain_seconds = train(build(args, device), batches)

    model = build(args, device)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "_adapters" not in n}
    mesh = init_device_mesh("cuda" if cuda else "cpu", (world,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if args.bf16 else MixedPrecisionPolicy()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    mine = batches.chunk(world, 1)[rank].contiguous()
    local, sharded_seconds = train(model, mine)
    mean = torch.tensor(local, device=device)
    dist.all_reduce(mean)
    sharded = (mean / world).tolist()

    base_same = all(
        torch.equal(p.full_tensor(), before[n]) for n, p in model.named_parameters() if "_adapters" not in n
    )
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    mmpeft.save(model, folder[0])
    fresh = build(args, device)
    mmpeft.detach(fresh)
    mmpeft.load(fresh, folder[0])
    with torch.no_grad():
        reloaded = float(loss_of(fresh, batches[-1]))
        whole = torch.tensor(float(loss_of(model, mine[-1])), device=device)
    dist.all_reduce(whole)
    result = {
        "workload": "fsdp2",
        "world": world,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "bf16": args.bf16,
        "parameters": sum(p.numel() for p in fresh.parameters()),
        "first_last_loss_plain": [plain[0], plain[-1]],
        "first_last_loss_sharded": [sharded[0], sharded[-1]],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(plain, sharded, strict=True)),
        "base_bit_equal": base_same,
        "reloaded_loss_difference": abs(reloaded - float(whole) / world),
        "seconds_a_step": {"one_device_whole_batch": plain_seconds, "sharded": sharded_seconds},
    }
    if rank == 0:
        print(json.dumps(result), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
