"""IST and ReLoRA under Lightning."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.adapters.state import slots
from mmpeft.errors import ConfigError
from mmpeft.tasks import AdapterTask, LayerSampling, ReLoRARestart

lightning = pytest.importorskip("lightning")


class Regress(AdapterTask):
    def training_step(self, batch, index):
        x, y = batch
        return self.shared_loss((self.model(x) - y).square().sum(), y.numel())


class Host(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return self.layers(x)


def fit(callback, method, steps, *, lr=0.05, accumulate=1):
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)))
    model = Host(layers)
    x, y = torch.randn(64, 6), torch.randn(64, 6)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    task = Regress(model, {"layers.*.0": method}, lr=lr, schedule="constant", warmup=0)
    seen = []

    class Watch(lightning.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            got = {d.site.path.split(".")[1] for _, _, s in slots(model) for _, d in s.deltas() if d.A.grad is not None}
            seen.append((got, optimizer.param_groups[0]["lr"]))

    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback, Watch()], accumulate_grad_batches=accumulate,
    )  # fmt: skip
    trainer.fit(task, data)
    return task, seen, [d for _, _, s in slots(model) for _, d in s.deltas()]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ist_trains_other_layers_every_step_and_learns_their_importance(accumulate):
    loss = lambda task, batch: (task.model(batch[0]) - batch[1]).square().mean()  # noqa: E731
    callback = LayerSampling(active=2, every=2, lr=50.0, loss=loss)
    _, seen, deltas = fit(callback, mmpeft.LoRA(rank=2), 8, accumulate=accumulate)
    layers = [got for got, _ in seen]
    assert all(len(got) == 2 for got in layers) and len({frozenset(got) for got in layers}) > 2
    assert callback.controller.importance.any()
    assert all(d.A.requires_grad for d in deltas), "released at the end"
    other = LayerSampling(active=2, every=2, loss=loss)
    other.load_state_dict(callback.state_dict())
    fit(other, mmpeft.LoRA(rank=2), 1)
    assert torch.equal(other.controller.importance, callback.controller.importance), "a resumed run goes on where it was"
    with pytest.raises(ConfigError, match="every 0"):
        LayerSampling(active=1, every=0)


def test_relora_restarts_under_a_task_and_the_rate_climbs_back():
    callback = ReLoRARestart(every=4, warmup=1)
    task, seen, deltas = fit(callback, mmpeft.ReLoRA(rank=1, stages=3), 10)
    assert [round(rate / 0.05, 6) for _, rate in seen] == [0.5, 1, 1, 1] * 2 + [0.5, 1]
    assert all(float(d.done) == 2 for d in deltas)
    d = deltas[0]
    change = task.model.layers[0][0].weight - task.model.layers[0][0]._parameters["weight"]
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 3
    assert d.A_past[:2].any(1).all() and not d.A_past[2].any()
