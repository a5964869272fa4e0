"""Lightning checkpoints: trainables only, strict by name, and a killed run goes on bit for bit."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import mmpeft
from mmpeft.errors import ConfigError, FileFormatError

from .kit import DROPOUT, PLAN, data_of, task_of


class Losses(lightning.Callback):
    """The loss of each step, and optionally a power cut."""

    def __init__(self, die_at: int | None = None) -> None:
        self.values: dict[int, float] = {}
        self.die_at = die_at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values[trainer.global_step] = float(outputs["loss"])
        if trainer.global_step == self.die_at:
            raise RuntimeError("power cut")


def run(tokenizer, make_trainer, folder, *, steps=8, die_at=None, resume=None, seed=0):
    """Shuffled, with dropout; four batches an epoch, a checkpoint every third step."""
    task = task_of(tokenizer, DROPOUT, lr=1e-2)
    losses = Losses(die_at)
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = make_trainer(max_steps=steps, callbacks=[keep, losses], enable_checkpointing=True, limit_val_batches=0)
    torch.manual_seed(seed)
    trainer.fit(task, datamodule=data_of(batch_size=3), ckpt_path=resume)
    return task, losses.values


def test_a_killed_run_resumes_to_bit_equal_losses(tokenizer, make_trainer, tmp_path):
    whole, expected = run(tokenizer, make_trainer, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        run(tokenizer, make_trainer, tmp_path / "killed", die_at=5)
    # step 3 is in the middle of the first epoch, and the new process starts from other random numbers
    resumed, losses = run(tokenizer, make_trainer, tmp_path / "on", resume=tmp_path / "killed" / "step=3.ckpt", seed=99)
    assert sorted(losses) == [4, 5, 6, 7, 8]
    assert losses == {step: expected[step] for step in losses}  # bit for bit, no tolerance
    assert len(set(expected.values())) == 8
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_dropout_and_shuffling_are_on(tokenizer, make_trainer, tmp_path):
    """Else the test above would prove little: the loss without dropout is another one."""
    _, dropped = run(tokenizer, make_trainer, tmp_path / "a", steps=3)
    task = task_of(tokenizer, PLAN, lr=1e-2)
    losses = Losses()
    torch.manual_seed(0)
    make_trainer(max_steps=3, callbacks=[losses], limit_val_batches=0).fit(task, datamodule=data_of(batch_size=3, shuffle=False))
    assert all(losses.values[s] != dropped[s] for s in (2, 3))


def test_a_checkpoint_holds_trainables_only(tokenizer, make_trainer, tmp_path):
    task, _ = run(tokenizer, make_trainer, tmp_path, steps=3)
    checkpoint = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    held = checkpoint["state_dict"]
    names = {n for n, p in task.named_parameters() if p.requires_grad}
    assert set(held) == names and len(names) == 12  # 4 of the connector, A and B of 4 projections
    assert sum(t.numel() for t in held.values()) == mmpeft.inspect(task.model).trainable
    assert not any("embed_tokens" in n or "encoders" in n for n in held)
    assert {"optimizer_states", "lr_schedulers", "loops"} <= set(checkpoint)


def test_another_plan_is_refused_by_name(tokenizer, make_trainer, tmp_path):
    run(tokenizer, make_trainer, tmp_path, steps=3)
    other = task_of(tokenizer, {"connectors.image": "full", "llm.**.{q,k}_proj": mmpeft.LoRA(rank=4)})
    with pytest.raises(FileFormatError, match=r"(?s)missing .*k_proj.*unknown .*v_proj"):
        make_trainer(max_steps=4).fit(other, datamodule=data_of(), ckpt_path=tmp_path / "step=3.ckpt")
    wide = task_of(tokenizer, {"connectors.image": "full", "llm.**.{q,v}_proj": mmpeft.LoRA(rank=5)})
    with pytest.raises(FileFormatError, match=r"has shape \(4, 32\), expected \(5, 32\)"):
        make_trainer(max_steps=4).fit(wide, datamodule=data_of(), ckpt_path=tmp_path / "step=3.ckpt")


def test_a_strategy_that_loads_the_tensors_itself_gives_the_rest(tokenizer):
    """FSDP2's hands over a checkpoint without its tensors; the length of the schedule must come through."""
    task = task_of(tokenizer, PLAN)
    task.on_load_checkpoint({"mmpeft": {"total_steps": 7, "adapter": "default"}})
    assert task.total_steps == 7


def test_rules_give_the_optimizer_their_rates(tokenizer, make_trainer):
    plan = [
        {"match": "connectors.image", "train": "full", "lr": 0.02, "weight_decay": 0.1},
        {"match": "llm.**.{q,v}_proj", "method": {"LoRA": {"rank": 2, "lr_ratio": 4.0}}},
    ]
    task = task_of(tokenizer, plan, lr=0.001, warmup=0, schedule="constant")
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(task, datamodule=data_of())
    groups = trainer.optimizers[0].param_groups
    assert sorted((g["lr"], g["weight_decay"], len(g["params"])) for g in groups) == [
        (0.001, 0.0, 4), (0.004, 0.0, 4), (0.02, 0.1, 4),
    ]  # fmt: skip
    assert len({g["name"] for g in groups}) == 3


def test_the_schedule_ends_at_one_percent(tokenizer, make_trainer):
    task = task_of(tokenizer, lr=0.01, warmup=0.25)
    rates = []

    class Rates(lightning.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    make_trainer(max_epochs=4, limit_val_batches=0, callbacks=[Rates()]).fit(task, datamodule=data_of(batch_size=6))
    assert len(rates) == 8 and rates[:2] == pytest.approx([0.005, 0.01])
    assert rates[-1] == pytest.approx(1e-4) and task.total_steps == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"plan": None}, "nothing to train"), ({"lr": 0.0}, "lr must be positive"),
        ({"schedule": "cosin"}, "nearest: cosine"), ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"calibrate": True}, "feature_cache"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_at_once(tokenizer, options, words):
    with pytest.raises(ConfigError, match=words):
        task_of(tokenizer, **options)
