"""The Lightning data module for any dataset of samples, usable from YAML with any reader by class path.

    data:
      class_path: mmpeft.data.DataModule
      init_args:
        train: {class_path: mmpeft.data.DigitsVQA, init_args: {split: train, size: 10000}}
        val:   {class_path: mmpeft.data.DigitsVQA, init_args: {split: test, size: 500}}
        batch_size: 32

How a sample becomes tensors is the task's business: the data module takes `trainer.lightning_module.processor` (a
`Processor`), or wraps its `model`, if that is a `MultimodalLM`; outside a trainer, set `datamodule.processor`.
The training loader is resumable, see `loader`.
"""

from __future__ import annotations

from typing import Any, Literal

from torch.utils.data import Dataset

from mmpeft.data.bad_samples import Report, check
from mmpeft.data.encoding import OnBad
from mmpeft.data.loader import Loader
from mmpeft.data.processor import ConversationProcessor, Processor
from mmpeft.errors import ConfigError, NameNotFound, nearest, require

_lightning: Any = require("lightning.pytorch", "train")
Split = Literal["train", "val", "test", "predict"]
SPLITS = ("train", "val", "test", "predict")


class DataModule(_lightning.LightningDataModule):  # type: ignore[misc]
    """Training and evaluation batches.

    Args:
        train, val, test, predict: datasets; leave out what is not used. `predict` defaults to `test`.
        batch_size: samples a step and rank, at most; sizes are equal to within one.
        eval_batch_size: the same for validation, test and prediction; default `batch_size`.
        workers: processes that read, decode and encode.
        bucket: samples of like length share a training batch.
        shuffle: training order drawn anew each epoch from `seed`; off under `Trainer(overfit_batches=...)`.
        on_bad: a missing or corrupt file, a sample without a supervised token or longer than `max_length` is
            refused with its name, or skipped, counted and logged. Nothing is ever cut short.
        max_length: tokens of the longest usable sample; None takes any.
        seed: of order, augmentation and the per-step reseeding that makes resumed runs equal.

    Raises:
        ConfigError: a number out of range, or a split asked for that was not given.
        BadSample: while loading, on_bad="refuse".
    """

    def __init__(
        self,
        train: Dataset | None = None,  # type: ignore[type-arg]
        val: Dataset | None = None,  # type: ignore[type-arg]
        test: Dataset | None = None,  # type: ignore[type-arg]
        predict: Dataset | None = None,  # type: ignore[type-arg]
        *,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        workers: int = 0,
        bucket: bool = True,
        shuffle: bool = True,
        on_bad: OnBad = "refuse",
        max_length: int | None = None,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.datasets: dict[str, Any] = {"train": train, "val": val, "test": test, "predict": predict or test}
        if all(dataset is None for dataset in self.datasets.values()):
            raise ConfigError("DataModule needs at least one dataset: train, val, test or predict")
        numbers = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "max_length": max_length}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self._check_classes()
        if on_bad not in ("refuse", "skip"):
            raise ConfigError(f"on_bad must be 'refuse' or 'skip', got {on_bad!r}")
        if workers < 0:
            raise ConfigError(f"workers must be 0 or more, got {workers}")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.workers, self.bucket, self.shuffle, self.on_bad = workers, bucket, shuffle, on_bad
        self.max_length, self.pin_memory, self.seed = max_length, pin_memory, seed
        self.processor: Processor | None = None
        self.loaders: dict[str, Loader] = {}
        if val is None:  # Lightning then skips validation without a warning about an empty loader
            self.val_dataloader = None  # type: ignore[method-assign, assignment]

    def _check_classes(self) -> None:
        """Labelled splits must number their classes alike, or a head is scored on other classes than it learnt."""
        classes = {split: d.classes for split, d in self.datasets.items() if getattr(d, "classes", None) is not None}
        for split, names in classes.items():
            first = next(iter(classes))
            if list(names) != list(classes[first]):
                raise ConfigError(
                    f"the classes of {split!r} are {names}, those of {first!r} {classes[first]}: give both datasets "
                    "the same classes=[...]"
                )

    def loader(self, split: Split) -> Loader:
        """The batches of one split, for this rank.

        Raises:
            NameNotFound: unknown split; ConfigError: no dataset was given for it.
        """
        if split not in SPLITS:
            raise NameNotFound(f"unknown split {split!r}; splits are {', '.join(SPLITS)}{nearest(split, SPLITS)}")
        dataset = self.datasets[split]
        if dataset is None:
            raise ConfigError(f"DataModule has no {split!r} dataset; give DataModule({split}=...)")
        trainer = self.trainer
        train = split == "train"
        overfit = train and trainer is not None and trainer.overfit_batches > 0
        self.loaders[split] = Loader(
            dataset,
            self._processor(),
            batch_size=self.batch_size if train else self.eval_batch_size,
            train=train,
            shuffle=train and self.shuffle and not overfit,
            seed=self.seed,
            bucket=train and self.bucket,
            on_bad=self.on_bad,
            max_length=self.max_length,
            workers=self.workers,
            pin_memory=self.pin_memory,
            rank=trainer.global_rank if trainer is not None else 0,
            world=trainer.world_size if trainer is not None else 1,
        )
        return self.loaders[split]

    def check(self, split: Split = "train", *, encode: bool = True) -> Report:
        """List the bad samples of a split; with `encode`, also those too long or with nothing supervised."""
        dataset = self.datasets[split]
        if dataset is None:
            raise ConfigError(f"DataModule has no {split!r} dataset")
        return check(dataset, self._processor() if encode else None, max_length=self.max_length)

    @property
    def bad(self) -> dict[str, dict[str, str]]:
        """split -> sample -> reason, of what was skipped so far."""
        return {split: loader.bad for split, loader in self.loaders.items() if loader.bad}

    def _processor(self) -> Processor:
        if self.processor is not None:
            return self.processor
        task = self.trainer.lightning_module if self.trainer is not None else None
        found: Processor | None = getattr(task, "processor", None)
        if found is not None:
            return found
        model = getattr(task, "model", None)
        if hasattr(model, "encode") and hasattr(model, "collate"):
            return ConversationProcessor(model)
        raise ConfigError(
            "DataModule does not know how to encode samples: the LightningModule needs a `processor` (encode and "
            "collate) or a MultimodalLM as its `model`; without a trainer set datamodule.processor"
        )

    def train_dataloader(self) -> Loader:
        return self.loader("train")

    def val_dataloader(self) -> Any:
        return self.loader("val")

    def test_dataloader(self) -> Loader:
        return self.loader("test")

    def predict_dataloader(self) -> Loader:
        return self.loader("predict")
