"""Two ranks with unequal token counts, one of them without any image, give the gradients of one."""

import torch
from torch.nn.parallel import DistributedDataParallel

from mmpeft.multimodal import global_mean
from tests.two_ranks import two_ranks

from .kit import ask, build_model, build_tokenizer, image, text


def parts(model):
    with_image = ask(image(1), text("Which digit is this?"), answer="It is 7, not 12.")
    return [[model.encode(with_image)], [model.encode(ask(text("Which?"))), model.encode(ask(text("And this?")))]]


def run_rank(rank, folder):
    """One step of one rank; leaves its loss and gradients in the folder."""
    model = build_model("llama", build_tokenizer(), audio=None, state=None)
    batch = model.collate(parts(model)[rank])
    counts = [None, None]
    torch.distributed.all_gather_object(counts, batch["target_ids"].numel())
    parallel = DistributedDataParallel(model)  # find_unused_parameters is not needed
    loss = global_mean(parallel(batch).loss_sum, counts, averaged_over=2)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    torch.save({"loss": loss.detach(), "gradients": gradients, "counts": counts}, folder / f"{rank}.pt")


def test_two_ranks_with_unequal_counts_equal_one(tokenizer, tmp_path):
    two_ranks(run_rank, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    model = build_model("llama", tokenizer, audio=None, state=None)
    output = model(model.collate([s for part in parts(model) for s in part]))
    expected = global_mean(output.loss_sum, output.num_supervised)
    expected.backward()
    first, second = ranks[0]["counts"]
    assert first != second and first + second == output.num_supervised
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, expected.detach())
    for rank in ranks:
        for name, gradient in rank["gradients"].items():
            torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6, msg=name)
