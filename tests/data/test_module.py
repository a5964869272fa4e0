"""The data module under Lightning: resumes mid-epoch bit-equal, works from YAML, shards over ranks, names bad ones."""

import faulthandler
import gc
import logging
import os
import random
import signal
import time

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from mmpeft.data import DataModule, check
from mmpeft.data.loader import Loader
from mmpeft.data.processor import ConversationProcessor
from mmpeft.data.samples import question_answer
from mmpeft.errors import BadSample, ConfigError, NameNotFound
from mmpeft.multimodal.sample import Sample as Encoded


class Toy(Dataset):
    """`size` samples; `bad` says which raise what."""

    def __init__(self, size: int = 53, bad: dict | None = None):
        self.size, self.trouble = size, bad or {}

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        if i in self.trouble:
            raise self.trouble[i]
        return question_answer(f"toy/{i}", "why? " * (i % 7 + 1), str(i % 3), kind="toy")


class ToyProcessor:
    """Features with augmentation noise from torch and from `random`; the label is in the answer."""

    def encode(self, sample, *, train):
        i = int(sample["id"].split("/")[1])
        noise = 0.1 * torch.randn(4) + 0.1 * random.random() if train else 0
        return {"id": i, "x": torch.tensor([i % 3, i % 2, 1.0, i / 50]) + noise, "y": int(sample["answers"][0])}

    def collate(self, items):
        return {
            "ids": [item["id"] for item in items],
            "x": torch.stack([item["x"] for item in items]),
            "y": torch.tensor([item["y"] for item in items]),
        }


class ToyTask(pl.LightningModule):
    processor = ToyProcessor()

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
        self.losses, self.seen, self.evaluated = [], [], []

    def training_step(self, batch, _):
        loss = nn.functional.cross_entropy(self.net(batch["x"]), batch["y"])
        self.losses.append(loss.item())
        self.seen.append((self.current_epoch, batch["ids"]))
        return loss

    def validation_step(self, batch, _):
        self.evaluated += batch["ids"]
        torch.rand(3)  # an evaluation that samples must not change the training that follows

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Killed(Exception):
    pass


class Kill(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise Killed


def fit(folder, data, *, epochs=3, callbacks=(), ckpt=None, **options):
    pl.seed_everything(1, verbose=False)
    task = ToyTask()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(task, data, ckpt_path=ckpt, weights_only=False)
    return task


@pytest.mark.parametrize(("workers", "kill_at", "val"), [(0, 10, True), (2, 10, False), (0, 7, True), (0, 14, True)])
def test_killed_run_resumes_bit_equal(tmp_path, workers, kill_at, val):
    """7 batches an epoch: killed in the middle of epoch 1, at the end of epoch 0, and at the end of epoch 1."""

    def data():
        return DataModule(Toy(), Toy(5) if val else None, batch_size=8, workers=workers, seed=3)

    whole = fit(tmp_path, data())
    assert len(whole.losses) == 21
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(Killed):
        fit(tmp_path, data(), callbacks=[saver, Kill(kill_at + 1)])  # checkpoints come after Kill
    torch.rand(99)  # the new process is not where the old one was
    resumed = fit(tmp_path, data(), ckpt=tmp_path / f"step={kill_at}.ckpt")
    assert resumed.seen == whole.seen[kill_at:]
    assert resumed.losses == whole.losses[kill_at:]  # bit-equal: shuffling, augmentation and dropout on
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_workers_do_not_change_the_batches(tmp_path):
    runs = [fit(tmp_path, DataModule(Toy(), batch_size=8, workers=w), epochs=2) for w in (0, 2)]
    assert runs[0].losses == runs[1].losses and runs[0].seen == runs[1].seen


def test_epochs_differ_and_evaluation_is_in_order(tmp_path):
    task = fit(tmp_path, DataModule(Toy(), Toy(11), batch_size=8, eval_batch_size=4), epochs=2)
    for epoch in (0, 1):
        assert sorted(i for e, ids in task.seen if e == epoch for i in ids) == list(range(53))
    assert task.seen[0][1] != task.seen[7][1]
    assert task.evaluated == list(range(11)) * 2
    assert sum(p.requires_grad for p in task.parameters()) == 4


def test_validation_cut_short_starts_anew(tmp_path):
    task = fit(tmp_path, DataModule(Toy(), Toy(11), batch_size=8, eval_batch_size=4), epochs=2, limit_val_batches=1)
    assert task.evaluated == list(range(3)) * 2  # batches of 3, 4, 4


def test_overfit_batches_repeats_the_same_batches(tmp_path):
    task = fit(tmp_path, DataModule(Toy(), batch_size=8), epochs=3, overfit_batches=2)
    assert [ids for _, ids in task.seen[:2]] == [ids for _, ids in task.seen[2:4]] == [ids for _, ids in task.seen[4:]]


def test_bad_samples_are_refused_by_name(tmp_path):
    data = DataModule(Toy(bad={5: FileNotFoundError("no file cat.jpg")}), batch_size=8)
    with pytest.raises(BadSample, match=r"Toy\[5\].*cat.jpg.*on_bad='skip'"):
        fit(tmp_path, data)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_skipped_counted_and_logged(tmp_path, caplog, workers):
    broken = {5: FileNotFoundError("no file cat.jpg"), 20: BadSample("sample 'toy/20': corrupt")}
    data = DataModule(Toy(bad=broken), batch_size=8, workers=workers, on_bad="skip")
    with caplog.at_level(logging.WARNING):
        task = fit(tmp_path, data, epochs=2)
    assert sorted(i for _, ids in task.seen[:7] for i in ids) == [i for i in range(53) if i not in broken]
    assert len(task.losses) == 14
    assert set(data.bad["train"]) == {"Toy[5]", "Toy[20]"}
    assert sum("skipped bad sample" in r.message for r in caplog.records) == 2  # once each, not once an epoch


def test_a_wholly_bad_batch_is_replaced_in_training_and_left_out_in_evaluation():
    bad = {i: BadSample(f"sample {i}: corrupt") for i in range(4)}
    options = {"batch_size": 1, "on_bad": "skip"}
    train = Loader(Toy(6, bad), ToyProcessor(), train=True, **options)
    assert [b["ids"][0] for b in train] == [4, 4, 4, 4, 4, 5] and len(train.bad) == 4
    assert [b["ids"][0] for b in Loader(Toy(6, bad), ToyProcessor(), train=False, **options)] == [4, 5]
    everything = {i: BadSample(f"sample {i}: corrupt") for i in range(6)}
    with pytest.raises(BadSample, match="no usable sample"):
        list(Loader(Toy(6, everything), ToyProcessor(), train=True, **options))


class FakeModel(nn.Module):
    """Character ids; supervised where the answer is. Encoded samples as the real model's."""

    def encode(self, conversation, *, answer=True):
        messages = conversation["messages"]
        question = messages[0]["content"][-1]["text"]
        ids = [ord(c) for c in question + messages[-1]["content"] * answer]
        labels = [-100] * len(question) + ids[len(question) :]
        return Encoded(
            conversation["id"], torch.tensor(ids), torch.tensor(labels), torch.zeros(len(ids), dtype=torch.uint8)
        )

    def collate(self, samples):
        pad = nn.utils.rnn.pad_sequence
        return {k: pad([getattr(s, k) for s in samples], batch_first=True) for k in ("input_ids", "labels")}


def test_conversations_too_long_or_unsupervised_are_bad_and_never_cut():
    def loader(dataset, **options):
        return Loader(dataset, ConversationProcessor(FakeModel()), batch_size=4, **options)

    batch = next(iter(loader(Toy(9), train=True, max_length=36)))
    assert batch["ids"] == [f"toy/{i}" for i in range(3)] and batch["inputs"]["input_ids"].shape == (3, 16)
    with pytest.raises(BadSample, match="toy/6.*too long, 36 tokens, max_length is 35"):
        list(loader(Toy(9), train=True, max_length=35))
    skipping = loader(Toy(9), train=True, max_length=35, on_bad="skip")
    assert sum(len(b["ids"]) for b in skipping) == 8 and "too long" in skipping.bad["Toy[6]"]

    class Unanswered(Toy):
        def __getitem__(self, i):
            return question_answer(f"toy/{i}", "why?", "" if i == 2 else "so")

    with pytest.raises(BadSample, match="toy/2.*no supervised token"):
        list(loader(Unanswered(9), train=True))
    evaluated = list(loader(Toy(9), train=False))
    assert [p.input_ids.tolist() for p in evaluated[0]["prompts"]] == [list(b"why? " * n) for n in (1, 2, 3)]
    assert all((p.labels == -100).all() for p in evaluated[0]["prompts"])
    assert evaluated[0]["samples"][1]["answers"] == ["1"] and evaluated[0]["samples"][1]["kind"] == "toy"

    report = check(Unanswered(9), ConversationProcessor(FakeModel()), max_length=5)
    assert report.reasons == {"no supervised token": 1, "too long": 8} and report.good() == []
    with pytest.raises(BadSample, match="9 samples, 9 bad"):
        report.refuse()


def test_bucketing_asks_the_data_set_for_lengths_and_opens_nothing():
    class Hinted(Toy):
        asked = 0

        def length_hint(self, i):
            self.asked += 1
            return i % 7

        def __getitem__(self, i):
            raise AssertionError("opened")

    hinted = Hinted(20)
    part = Subset(hinted, [3, 2, 19])
    loader = Loader(ConcatDataset([part, hinted]), ToyProcessor(), batch_size=4, train=True, bucket=True)
    assert loader.lengths == [3, 2, 5] + [i % 7 for i in range(20)] and hinted.asked == 23
    labelled = [{"id": "a", "input": "four", "label": 0}, {"id": "b", "input": torch.zeros(3), "label": 1}]
    assert Loader(labelled, ToyProcessor(), batch_size=2, train=True, bucket=True).lengths == [4, 0]
    broken = Loader(Toy(3, {1: BadSample("x")}), ToyProcessor(), batch_size=2, train=True, bucket=True)
    assert broken.lengths == [6, 0, 16]


def test_ranks_share_the_data():
    loaders = [Loader(Toy(), ToyProcessor(), batch_size=5, train=True, shuffle=True, rank=r, world=2) for r in range(2)]
    seen = [[batch["ids"] for batch in loader] for loader in loaders]
    assert len(seen[0]) == len(seen[1]) == 6
    assert sorted(i for rank in seen for ids in rank for i in ids) == list(range(53))


def test_state_is_refused_when_it_means_something_else():
    loader = Loader(Toy(), ToyProcessor(), batch_size=8, train=True)
    next(iter(loader))
    state = loader.state_dict()
    assert state == {"epoch": 0, "position": 1, "size": 53, "batch_size": 8, "seed": 0, "world": 1}
    other = Loader(Toy(54), ToyProcessor(), batch_size=4, train=True)
    with pytest.raises(ConfigError, match="size was 53 and is 54, batch_size was 8 and is 4"):
        other.load_state_dict(state)
    other.load_state_dict({**state, "epoch": 1, "position": 0})  # between epochs nothing has to match
    assert other.batch_sampler.epoch == 1


def test_workers_shut_down_at_once():
    """In a reference cycle, torch would wait 5 s for each."""
    loader = Loader(Toy(), ToyProcessor(), batch_size=8, train=True, workers=2)
    assert len(list(loader)) == 7
    start = time.perf_counter()
    del loader
    gc.collect()
    assert time.perf_counter() - start < 4


def test_without_lightning_each_loop_is_an_epoch():
    loader = Loader(Toy(), ToyProcessor(), batch_size=8, train=True, shuffle=True)
    first, second = ([b["ids"] for b in loader] for _ in range(2))
    assert first != second and sorted(sum(first, [])) == sorted(sum(second, []))
    next(iter(loader))  # a look at one batch
    third = [b["ids"] for b in loader]
    assert len(third) == 7 and third != second  # does not move the start


def test_from_yaml_through_the_lightning_cli(tmp_path):
    from lightning.pytorch.cli import LightningCLI

    (tmp_path / "c.yaml").write_text(
        """
data:
  class_path: mmpeft.data.DataModule
  init_args:
    train: {class_path: mmpeft.data.DigitsVQA, init_args: {split: train, kinds: [sum, odd_even], size: 40}}
    val:
      class_path: torch.utils.data.ConcatDataset
      init_args:
        datasets:
        - {class_path: mmpeft.data.DigitsVQA, init_args: {split: test, size: 10}}
        - {class_path: mmpeft.data.DigitsCaptions, init_args: {split: test, size: 7}}
    batch_size: 4
    on_bad: skip
"""
    )
    cli = LightningCLI(
        ToyTask, pl.LightningDataModule, subclass_mode_data=True, run=False, args=["--config", str(tmp_path /
        "c.yaml")], save_config_callback=None,
    )  # fmt: skip
    data = cli.datamodule
    assert isinstance(data, DataModule) and (len(data.datasets["train"]), len(data.datasets["val"])) == (40, 17)
    data.processor = ConversationProcessor(FakeModel())
    assert len(list(data.train_dataloader())) == 10
    assert [len(b["ids"]) for b in data.val_dataloader()] == [3, 3, 4, 3, 4]
    assert not data.check("train").bad


def test_wrong_options_are_refused():
    with pytest.raises(ConfigError, match="at least one dataset"):
        DataModule()
    for options in ({"batch_size": 0}, {"max_length": 0}, {"eval_batch_size": -1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            DataModule(Toy(), **options)
    for options, words in (({"on_bad": "ignore"}, "refuse.*skip"), ({"workers": -1}, "workers")):
        with pytest.raises(ConfigError, match=words):
            DataModule(Toy(), **options)
    data = DataModule(Toy())
    with pytest.raises(ConfigError, match="processor"):
        data.loader("train")
    data.processor = ToyProcessor()
    with pytest.raises(NameNotFound, match="nearest: test"):
        data.loader("tests")
    with pytest.raises(ConfigError, match="no 'test' dataset"):
        data.test_dataloader()
    with pytest.raises(ConfigError, match="cannot feed"):
        Loader(Toy(0), ToyProcessor(), batch_size=2, train=True)


class Aborting(Toy):
    """Its reader's process aborts on its way out, as forked processes of a GPU program were seen to."""

    def __getitem__(self, i):
        from multiprocessing.util import Finalize

        Finalize(None, faulthandler.disable, exitpriority=2)  # its dump would fill the test's output
        Finalize(None, os.abort, exitpriority=1)
        return super().__getitem__(i)


def test_a_worker_that_dies_while_it_is_shut_down_loses_nothing(monkeypatch):
    """Whether torch's handler of dead children raises is a race, so it is also made to."""
    loader = Loader(Aborting(), ToyProcessor(), batch_size=8, train=True, workers=2)
    assert len(list(loader)) == 7
    workers = loader._iterator._workers
    loader._iterator._shutdown_workers()  # as Lightning does when a training is done
    assert -signal.SIGABRT in [w.exitcode for w in workers]

    def dead(self):
        shutdown(self)
        raise RuntimeError("DataLoader worker is killed by signal: Aborted.")

    shutdown = _MultiProcessingDataLoaderIter._shutdown_workers
    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_shutdown_workers", dead)
    said = []
    monkeypatch.setattr("mmpeft.data.loader.log.warning", lambda text, *more: said.append(text % more))
    loader = Loader(Toy(), ToyProcessor(), batch_size=8, train=True, workers=2)
    assert len(list(loader)) == 7
    loader._iterator._shutdown_workers()
    assert set(said) == {"a worker process died while it was shut down: DataLoader worker is killed by signal: Aborted."}
