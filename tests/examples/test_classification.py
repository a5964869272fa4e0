"""Images and texts: adapters inside a pretrained encoder, and linear probing beside them."""

import pytest
import torch

import mmpeft

from .conftest import reloaded

SHORT = ("--trainer.max_epochs=1", "--data.init_args.val.init_args.size=120")


def probabilities(model, task, dataset):
    batch = task.processor.collate([task.processor.encode(dataset[i], train=False) for i in range(16)])
    with torch.no_grad():
        return model(batch["x"], batch["mask"])


def check_saved(run, folder):
    """The folder alone gives a model with the same outputs, which are not those of the base."""
    dataset = run.data.datasets["val"]
    adapted = probabilities(run.model, run.task, dataset)
    again = reloaded(folder)
    assert torch.equal(probabilities(again, run.task, dataset), adapted)
    with mmpeft.use(run.model, None):
        assert not torch.allclose(probabilities(run.model, run.task, dataset), adapted, atol=1e-2)


def sites(folder):
    """The modules that an adapter's file holds tensors of."""
    from pathlib import Path

    from mmpeft.adapters.store import read_description, read_tensors

    keys = read_tensors(Path(folder), read_description(folder))  # <module path>.<method>__<weight>.<parameter>
    return {key.rsplit(".", 2)[0] for key in keys}


@pytest.mark.parametrize(
    "plan, inside", [(None, ".conv_pw"), ("plan_linear_probe.yaml", None), ("plan_conv_adapter.yaml", "blocks.")]
)
def test_vision(fit, plan, inside):
    steps = 16 if plan is None else 3
    run = fit(
        "vision_finetune.yaml", *[plan] * (plan is not None), options=[*SHORT, f"--trainer.limit_train_batches={steps}"]
    )
    scores = {name: float(value) for name, value in run.trainer.callback_metrics.items()}
    assert {"val_accuracy", "val_f1", "val_matthews", "val_loss"} <= set(scores)
    if plan is None:
        assert scores["val_accuracy"] > 0.4  # ten classes, 16 steps
    saved = sites("runs/vision/adapter")
    assert "head" in saved
    assert (inside is None) == (saved == {"head"})
    assert inside is None or any(inside in site for site in saved)
    check_saved(run, "runs/vision/adapter")


@pytest.mark.parametrize("plan", [None, "plan_linear_probe.yaml"])
def test_text(fit, plan):
    steps = 20 if plan is None else 3
    run = fit(
        "text_finetune.yaml",
        *[plan] * (plan is not None),
        options=["--trainer.max_epochs=1", f"--trainer.limit_train_batches={steps}"],
    )
    scores = run.trainer.callback_metrics
    if plan is None:
        assert float(scores["val_accuracy"]) > 0.35  # five classes, 20 steps
    assert (sites("runs/text/adapter") == {"head"}) == (plan is not None)
    check_saved(run, "runs/text/adapter")
