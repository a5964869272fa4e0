"""Controllers over the project's own DataModule, whose samples have yet to be encoded, beside a part that is trained whole;
and the end of a training, where nothing that was learnt may be lost."""

from __future__ import annotations

import logging

import pytest
import torch

import mmpeft
from mmpeft.errors import ConfigError, Unsupported
from mmpeft.tasks import AdapterCheckpoint, AttachSelected
from tests.tasks.kit import PLAN, Colours, data_of, task_of
from tests.tasks.test_step_control import LORA, deltas, loader, step_control, task

lightning = pytest.importorskip("lightning")

MASKED = PLAN | {"llm.**.up_proj": mmpeft.StructuredMask(group=2)}
SINGLES = {
    "PruneUnits": (PLAN, {"keep": 0.5, "samples": 4}),
    "PruneEntries": (PLAN, {"at": 1, "keep": 0.5, "samples": 4}),
    "WorstSamples": (PLAN, {"density": 0.5, "worst": 2, "every": 2, "pool": 4}),
    "LightPEFT": (MASKED, {"at": 1, "masks": 0.5, "modules": 0.5, "units": 0.5, "samples": 4}),
}


def trainer_of(*callbacks, epochs=1, **options):
    return lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0, limit_val_batches=0, callbacks=list(callbacks), **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", SINGLES)
def test_single_samples_of_the_data_module_beside_a_connector_in_full(name, tokenizer, tmp_path):
    plan, options = SINGLES[name]
    module, data = task_of(tokenizer, plan), data_of()
    trainer_of(step_control(name, **options), AdapterCheckpoint(tmp_path / "adapter")).fit(module, datamodule=data)
    found = {d.site.name: d for d in deltas(module.model)}
    assert any(n.startswith("connectors.image") for n in found), "what is trained whole stays"
    if name in ("PruneUnits", "LightPEFT"):
        ranks = [d.method.rank for d in found.values() if isinstance(d.method, mmpeft.LoRA)]
        before = 4 * len(deltas(_attached(tokenizer, plan)))
        assert 0 < sum(ranks) < before
    other = task_of(tokenizer).model
    mmpeft.load(other, tmp_path / "adapter", check=False)
    batch = other.collate([other.encode(Colours(3)[i]["messages"]) for i in range(3)])
    module.model.eval(), other.eval()
    with torch.no_grad():
        assert torch.equal(module.model(batch).loss_sum, other(batch).loss_sum)


def _attached(tokenizer, plan):
    module = task_of(tokenizer, {k: m for k, m in plan.items() if isinstance(m, mmpeft.LoRA)})
    module.configure_model()
    return module.model


def test_a_single_sample_leaves_the_epoch_where_it_is(tokenizer):
    data = data_of(shuffle=True)
    trainer_of().fit(task_of(tokenizer), datamodule=data)
    plain = [batch["ids"] for batch in data.train_dataloader()]
    found, seen = data.train_dataloader(), []
    for batch in found:
        seen.append(batch["ids"])
        assert found.single(2)["ids"] == ["colour/2"]
    assert plain == seen


def test_a_mask_is_chosen_on_the_data_module(tokenizer, tmp_path):
    plan = {"llm.**.{q,v}_proj": mmpeft.FishMask(density=0.05)}
    module = task_of(tokenizer, plan)
    trainer_of(AttachSelected(samples=4), AdapterCheckpoint(tmp_path / "adapter")).fit(module, datamodule=data_of())
    assert all(d.index.numel() for d in deltas(module.model)) and (tmp_path / "adapter/adapter.json").exists()


def test_a_loop_without_single_samples_is_refused_before_the_first_step():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.randn(6), torch.randn(4)) for _ in range(8)])

    module = task(LORA)
    with pytest.raises(ConfigError, match="PruneUnits looks at single training samples"):
        trainer_of(step_control("PruneUnits", keep=0.5)).fit(module, torch.utils.data.DataLoader(Stream(), 4))
    assert module.global_step == 0
    with pytest.raises(Unsupported, match="krona at layers.0.weight has no units"):
        trainer_of(step_control("PruneUnits", keep=0.5)).fit(task({"layers.0": mmpeft.KronA()}), loader())


def test_what_cannot_be_done_at_the_end_loses_nothing(tmp_path):
    """The adapter of the whole training is saved as it is, and then the error comes."""
    module = task({"layers.{0,2}": mmpeft.VeRA(rank=2)})
    control = step_control("Once", of="mmpeft.compact")
    with pytest.raises(ConfigError, match="no site with components"):
        trainer_of(control, AdapterCheckpoint(tmp_path)).fit(module, loader())
    assert mmpeft.read_metadata(tmp_path)["step"] == module.global_step == 6


def test_a_run_that_had_ended_is_not_pruned_again(tmp_path, caplog):
    def run(epochs, ckpt=None):
        module, control = task({"layers.{0,2}": mmpeft.LoRA(rank=4)}), step_control("PruneUnits", keep=0.5, samples=4)
        trainer = trainer_of(control, epochs=epochs)
        trainer.fit(module, loader(), ckpt_path=ckpt)
        return trainer, sum(d.method.rank for d in deltas(module.model))

    trainer, units = run(1)
    trainer.save_checkpoint(tmp_path / "ended.ckpt")
    with caplog.at_level(logging.WARNING, "mmpeft"):
        _, again = run(2, tmp_path / "ended.ckpt")
    assert units == again == 4 and "not again" in caplog.text


def test_a_callback_serves_a_second_training(caplog):
    control, ranks = step_control("PruneUnits", keep=0.5, samples=4), []
    with caplog.at_level(logging.WARNING, "mmpeft"):
        for _ in range(2):
            module = task({"layers.{0,2}": mmpeft.LoRA(rank=4)})
            trainer_of(control).fit(module, loader())
            ranks.append(sum(d.method.rank for d in deltas(module.model)))
    assert ranks == [4, 4] and "not again" not in caplog.text


def test_functions_tell_two_of_a_kind_apart():
    keys = {step_control("Once", of=f"mmpeft.{of}").state_key for of in ("compact", "plain_prefixes")}
    assert keys == {"StepControl:Once:compact", "StepControl:Once:plain_prefixes"}
