"""Two ranks with unequal token counts, one of them without any image, give the gradients of one."""

import os
import tempfile

import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from mmpeft.multimodal import global_mean

from .kit import ask, build_model, build_tokenizer, image, text


def parts(model):
    with_image = ask(image(1), text("Which digit is this?"), answer="It is 7, not 12.")
    return [[model.encode(with_image)], [model.encode(ask(text("Which?"))), model.encode(ask(text("And this?")))]]


def rank_gradients(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = build_model("llama", build_tokenizer(), audio=None, state=None)
    batch = model.collate(parts(model)[rank])
    counts = [None, None]
    torch.distributed.all_gather_object(counts, batch["target_ids"].numel())
    parallel = DistributedDataParallel(model)  # find_unused_parameters is not needed
    loss = global_mean(parallel(batch).loss_sum, counts, averaged_over=2)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    torch.save({"loss": loss.detach(), "gradients": gradients, "counts": counts}, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_with_unequal_counts_equal_one():
    os.environ["OMP_NUM_THREADS"] = "1"
    model = build_model("llama", build_tokenizer(), audio=None, state=None)
    output = model(model.collate([s for part in parts(model) for s in part]))
    expected = global_mean(output.loss_sum, output.num_supervised)
    expected.backward()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_gradients, args=(folder,), nprocs=2)
        ranks = [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]
    first, second = ranks[0]["counts"]
    assert first != second and first + second == output.num_supervised
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, expected.detach())
    for rank in ranks:
        for name, gradient in rank["gradients"].items():
            torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6, msg=name)
