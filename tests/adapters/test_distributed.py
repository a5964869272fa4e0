"""DDP and FSDP2 on the CPU: two gloo processes give the loss and the weights of one; no sharded base is written to."""

from __future__ import annotations

import copy
import json
import tempfile

import pytest
import torch
import torch.distributed as dist
from cases import Attention, deltas, fill
from torch import nn

import mmpeft
from tests.two_ranks import start, two_ranks

TOKENS = (3, 7)  # supervised tokens of rank 0 and rank 1


class Net(nn.Module):
    """A called site, a site that is only read, and an embedding tied to the head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.linear = nn.Linear(8, 8)
        self.attention = Attention()
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.attention(torch.tanh(self.linear(self.embed(ids)))))


PLAN = {"linear": mmpeft.DoRA(rank=2), "attention.site[q,v]": mmpeft.LoRA(rank=2), "embed": mmpeft.LoRA(rank=2)}


def model_of():
    torch.manual_seed(0)
    model = Net()
    mmpeft.attach(model, PLAN, name="a", check=False)
    fill(model)
    return model


def batches():
    g = torch.Generator().manual_seed(5)
    return [(torch.randint(0, 13, (2, 5), generator=g), torch.randint(0, 13, (2, 5), generator=g), n) for n in TOKENS]


def loss_sum(model, ids, labels, n):
    """Summed loss of the first n supervised tokens."""
    logits = model(ids).flatten(0, 1)[:n]
    return nn.functional.cross_entropy(logits, labels.flatten()[:n], reduction="sum")


def train_one(steps=3):
    model = model_of()
    optimizer = torch.optim.AdamW(mmpeft.parameter_groups(model, lr=0.05))
    losses = []
    for _ in range(steps):
        loss = sum(loss_sum(model, *batch) for batch in batches()) / sum(TOKENS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach() for d in deltas(model) for p in d.parameters()]


def _ddp(rank, out):
    model = model_of()
    mmpeft.check_distributed(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(mmpeft.parameter_groups(wrapped, lr=0.05))
    losses = []
    for _ in range(3):
        batch = batches()[rank]
        total = torch.tensor(float(batch[2]))
        dist.all_reduce(total)
        loss = loss_sum(wrapped, *batch) * dist.get_world_size() / total  # DDP averages over ranks
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())
    torch.save((losses, [p.detach() for d in deltas(model) for p in d.parameters()]), f"{out}.{rank}")


def test_two_ranks_with_unequal_token_counts_train_as_one(tmp_path):
    two_ranks(_ddp, tmp_path / "out")
    losses, weights = train_one()
    for rank in range(2):
        got_losses, got = torch.load(tmp_path / f"out.{rank}")
        assert got_losses == pytest.approx(losses, rel=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, weights, strict=True))


@pytest.fixture
def one_rank():
    with tempfile.TemporaryDirectory() as folder:
        start(0, 1, f"{folder}/store")
        yield
        dist.destroy_process_group()


def test_fsdp2_reads_its_shard_through_the_property_and_leaves_the_base_alone(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, plain = model_of(), model_of()
    base = {n: p.detach().clone() for n, p in plain.named_parameters()}
    mesh = init_device_mesh("cpu", (1,))
    for part in (model.linear, model.attention):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.attention.site.in_proj_weight, DTensor)  # as stored while sharded
    groups = [mmpeft.parameter_groups(m, lr=0.05) for m in (model, plain)]
    optimizers = [torch.optim.AdamW(g) for g in groups]
    for batch in batches():
        losses = []
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            loss = loss_sum(m, *batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        with torch.no_grad():  # nothing that was kept from the step before
            assert loss_sum(model, *batch).item() == pytest.approx(loss_sum(plain, *batch).item(), rel=1e-5)
    model.reshard()
    for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert isinstance(p, DTensor)
        assert torch.allclose(p.full_tensor(), q, atol=1e-5), n
        if "_adapters" not in n:
            assert torch.equal(p.full_tensor(), base[n]), n
    with torch.no_grad(), mmpeft.use(model, None), mmpeft.use(plain, None):
        assert torch.equal(model(batches()[0][0]), plain(batches()[0][0]))


def test_fsdp2_state_dict_and_detach(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = model_of()
    keys = list(model.state_dict())
    fully_shard(model.linear, mesh=init_device_mesh("cpu", (1,)))
    assert list(model.state_dict()) == keys
    for act, says in (
        (lambda: mmpeft.detach(model), "detach before that"),
        (lambda: mmpeft.detach(model, bake=True), "sharded"),
        (lambda: mmpeft.merge(model), "linear.weight is sharded"),
        (lambda: mmpeft.stack(model), "linear.weight is sharded"),
        (lambda: mmpeft.attach(model, {"linear": mmpeft.LoRA(rank=2)}, name="b", check=False), "attach first"),
    ):
        with pytest.raises(mmpeft.errors.Unsupported, match=says):
            act()
    assert list(model.state_dict()) == keys and mmpeft.active(model) == ("a",)


def test_adapter_files_name_the_plain_model_under_fsdp2_and_ddp(one_rank, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mmpeft.save(model_of(), tmp_path / "plain")
    sharded = model_of()
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(sharded.linear, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert type(sharded).__name__ == "FSDPNet"
    mmpeft.save(sharded, tmp_path / "fsdp2")
    mmpeft.save(nn.parallel.DistributedDataParallel(model_of()), tmp_path / "ddp")
    mmpeft.save(torch.compile(nn.parallel.DistributedDataParallel(model_of()), backend="eager"), tmp_path / "compiled")
    for wrapped in ("fsdp2", "ddp", "compiled"):
        for file in ("adapter.safetensors", "adapter.json"):
            assert (tmp_path / wrapped / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), (wrapped, file)
    assert json.loads((tmp_path / "plain/adapter.json").read_text())["base"]["name"] == "Net"


def test_deepcopy_of_the_module_under_ddp_is_independent(one_rank):
    model = nn.parallel.DistributedDataParallel(model_of())
    other = copy.deepcopy(model.module)
    ids = batches()[0][0]
    with torch.no_grad():
        y = model(ids)
        mmpeft.use(other, None)
        assert torch.equal(model(ids), y)
