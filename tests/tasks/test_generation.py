"""GenerationTask end to end on a tiny problem: it learns, answers freely, caches features, keeps the adapter."""

import json

import lightning
import pytest
import torch

import mmpeft
from mmpeft.adapters.store import adapter_tensors
from mmpeft.errors import ConfigError, NameNotFound
from mmpeft.tasks import AdapterCheckpoint, QuestionReport
from mmpeft.tasks.features import CachedProcessor

from .kit import PLAN, STRONG, Colours, data_of, task_of, tiny

FAST = {"lr": 1e-2, "betas": (0.9, 0.98)}
STEPS = 60


@pytest.fixture(scope="module")
def learned(tokenizer, tmp_path_factory):
    """Fitted until it answers: the task, its trainer, and the folder of its callbacks."""
    folder = tmp_path_factory.mktemp("learned")
    task = task_of(tokenizer, STRONG, **FAST, feature_cache=str(folder / "features"), calibrate=True)
    torch.manual_seed(0)
    callbacks = [AdapterCheckpoint(str(folder / "adapter")), QuestionReport(str(folder), quick=4, shown=3)]
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=STEPS, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder, callbacks=callbacks, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(task, datamodule=data_of(batch_size=6))
    return task, trainer, folder


def test_it_learns_and_answers_held_out_questions_freely(learned):
    task, trainer, folder = learned
    trainer.limit_val_batches = 1.0
    result = json.loads((folder / "result.json").read_text())
    assert result["accuracy"] == {"long": 1.0, "short": 1.0, "all": 1.0} and result["questions"] == 6
    assert result["accuracy_before"]["all"] < 1.0 and result["blank_images"]["all"] < 1.0
    # three colours in turn: the majority answer of a question's text is right a third of the time
    assert result["majority_answer"]["all"] == pytest.approx(1 / 3)
    assert result["accuracy_language_only"]["all"] >= result["blank_images"]["all"]
    assert result["steps"] == STEPS and result["reloaded_equal"] is None
    said = json.loads((folder / "answers.json").read_text())
    assert [row["answer"] for row in said] == ["7", "12", "yes"] * 2


def test_validate_logs_scores_by_kind_and_keeps_the_answers(learned, make_trainer):
    task, _, _ = learned
    (scores,) = make_trainer().validate(task, datamodule=data_of(), verbose=False)
    assert scores["val_exact_match"] == scores["val_exact_match/long"] == scores["val_exact_match/short"] == 1.0
    assert scores["val_loss"] < 1.0  # chance is 5.8
    assert [a["answer"] for a in task.answers] == ["7", "12", "yes"] * 2
    predicted = make_trainer().predict(task, dataloaders=None, datamodule=predicting())
    assert [row["answer"] for batch in predicted for row in batch] == ["7", "12", "yes"] * 2


def predicting():
    data = data_of()
    data.datasets["predict"] = Colours(6, seed=1)
    return data


def test_a_fresh_model_loads_the_folder_and_answers_the_same(learned, tokenizer):
    task, _, folder = learned
    model = tiny(tokenizer)
    mmpeft.load(model, folder / "adapter")
    questions = [Colours(6, seed=1)[i]["messages"] for i in range(6)]
    assert model.generate(questions, max_new_tokens=3) == ["7", "12", "yes"] * 2
    assert mmpeft.read_metadata(folder / "adapter")["step"] == STEPS


def test_start_from_evaluates_and_goes_on(learned, tokenizer, make_trainer):
    _, _, folder = learned
    task = task_of(tokenizer, plan=None, start_from=str(folder / "adapter"))
    (scores,) = make_trainer().validate(task, datamodule=data_of(), verbose=False)
    assert scores["val_exact_match"] == 1.0
    before = {k: v.clone() for k, v in adapter_tensors(task.model, "default").items()}
    make_trainer(max_steps=1, limit_val_batches=0).fit(task, datamodule=data_of())
    after = adapter_tensors(task.model, "default")
    assert all(not torch.equal(before[k], after[k]) for k in before)


def test_cached_features_train_like_the_encoder_itself(tokenizer, make_trainer, tmp_path):
    found = []
    for options in ({}, {"feature_cache": str(tmp_path)}):
        task = task_of(tokenizer, **options)
        torch.manual_seed(0)
        make_trainer(max_steps=4, limit_val_batches=0).fit(task, datamodule=data_of())
        found.append(adapter_tensors(task.model, "default"))
        assert isinstance(task.processor, CachedProcessor) == bool(options)
    assert max(float((found[0][k] - found[1][k]).abs().max()) for k in found[0]) < 1e-5
    assert list(tmp_path.rglob("tokens-*.safetensors"))


def test_an_adapted_encoder_is_not_cached(tokenizer, tmp_path):
    plan = PLAN | {"encoders.image.backbone": mmpeft.LoRA(rank=2)}
    with pytest.raises(ConfigError, match="feature_cache.*encoders.image"):
        task_of(tokenizer, plan, feature_cache=str(tmp_path))


def test_frozen_tensors_never_change(learned, tokenizer):
    task, _, _ = learned
    fresh = dict(tiny(tokenizer).state_dict())
    for name, tensor in task.model.state_dict().items():
        if name in fresh and not name.startswith("connectors."):
            assert torch.equal(tensor, fresh[name]), name


# ---- AdapterCheckpoint ------------------------------------------------------------------------------------------------


def test_the_best_adapter_is_kept(tokenizer, make_trainer, tmp_path):
    class Staged(AdapterCheckpoint):
        """Validations that say .1, .7, .4."""

        scores = iter([0.1, 0.7, 0.4])

        def on_validation_end(self, trainer, pl_module):
            trainer.callback_metrics["score"] = torch.tensor(next(self.scores))
            super().on_validation_end(trainer, pl_module)

    keep = Staged(str(tmp_path / "best"), monitor="score")
    task = task_of(tokenizer)
    make_trainer(max_epochs=3, callbacks=[keep]).fit(task, datamodule=data_of(batch_size=4))
    assert keep.best == pytest.approx(0.7)
    assert mmpeft.read_metadata(tmp_path / "best")["step"] == 6  # the second epoch's


def test_an_unknown_monitor_is_refused_with_the_nearest(tokenizer, make_trainer, tmp_path):
    keep = AdapterCheckpoint(str(tmp_path / "best"), monitor="val_exact_mach")
    with pytest.raises(NameNotFound, match="nearest: val_exact_match"):
        make_trainer(max_epochs=1, callbacks=[keep]).fit(task_of(tokenizer), datamodule=data_of())
    with pytest.raises(ConfigError, match="'max' or 'min'"):
        AdapterCheckpoint("x", mode="best")
