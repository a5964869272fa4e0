"""Classification and regression through a frozen encoder of pictures, sounds or texts, with a pooled linear head.

    model = EncoderClassifier("timm:vit_small_patch16_224", classes=37)
    task = ClassificationTask(model, {"head": "full", "encoder.backbone.blocks.*.attn.qkv[q,v]": mmpeft.LoRA(rank=8)})

With `{"head": "full"}` alone it is linear probing. With `classes: 1` it is regression on a number (mean squared error).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmpeft.encoders import Encoder, load_encoder
from mmpeft.errors import BadSample, ConfigError, NameNotFound, nearest
from mmpeft.metrics import load_metric
from mmpeft.tasks.base import AdapterTask


def mean_pool(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T, D], [B, T] -> [B, D]: the mean over valid tokens."""
    if mask is None:
        return tokens.mean(1)
    weight = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weight).sum(1) / weight.sum(1).clamp_min(1)


def first_pool(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T, D] -> [B, D]: the first token (a class token, if the encoder keeps it)."""
    return tokens[:, 0]


def max_pool(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T, D], [B, T] -> [B, D]: the maximum over valid tokens."""
    if mask is not None:
        tokens = tokens.masked_fill(~mask.unsqueeze(-1), torch.finfo(tokens.dtype).min)
    return tokens.amax(1)


POOLS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {"mean": mean_pool, "first": first_pool, "max": max_pool}


class EncoderClassifier(nn.Module):
    """Encoder, pooling, LayerNorm without parameters, linear head.

    Args:
        encoder: a name for `load_encoder`, its arguments as a mapping, or an `Encoder`.
        classes: class names, or their number; 1 is regression.
        pool: "mean", "first" or "max" over tokens.

    Raises:
        NameNotFound: an unknown pooling. ConfigError: no class, or a class named twice.
    """

    def __init__(
        self, encoder: str | Mapping[str, Any] | Encoder, *, classes: int | Sequence[str] = 1, pool: str = "mean"
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise NameNotFound(f"unknown pooling {pool!r}; valid: {', '.join(POOLS)}{nearest(pool, POOLS)}")
        self.names = None if isinstance(classes, int) else [str(c) for c in classes]
        count = classes if isinstance(classes, int) else len(classes)
        if count < 1 or (self.names is not None and len(set(self.names)) < max(2, count)):
            raise ConfigError(f"classes is a number from 1 on (1: regression) or two or more distinct names, not {classes!r}")
        options: Any = {"name": encoder} if isinstance(encoder, str) else encoder
        self.encoder: Encoder = load_encoder(**options) if isinstance(options, Mapping) else options
        self.classes, self.pool = count, POOLS[pool]
        self.norm = nn.LayerNorm(self.encoder.dim, elementwise_affine=False)
        self.head = nn.Linear(self.encoder.dim, count)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, ...] as the encoder takes it -> logits [B, classes], or the regressed numbers [B, 1]."""
        tokens, valid = self.encoder(x, mask)
        pooled = self.norm(self.pool(tokens, valid).to(self.head.weight.dtype))
        logits: Tensor = self.head(pooled)
        return logits


class LabelledProcessor:
    """Samples {"id", "input", "label"} to batches {"x", "mask", "target", "ids"}; runs in the loader's workers."""

    def __init__(self, encoder: Encoder, names: Sequence[str] | None, classes: int) -> None:
        self.preprocess, self.names, self.classes = encoder.preprocess, names, classes

    def encode(self, sample: Mapping[str, Any], *, train: bool) -> tuple[Tensor, float, str]:
        label = sample.get("label")
        if label is None and not train:
            return self.preprocess(sample["input"]), float("nan"), sample["id"]
        return self.preprocess(sample["input"]), self._number(label, sample["id"]), sample["id"]

    def collate(self, items: Sequence[tuple[Tensor, float, str]]) -> dict[str, Any]:
        inputs, targets, ids = zip(*items, strict=True)
        mask = None
        if inputs[0].ndim == 1:  # sounds and texts come in several lengths
            mask = pad_sequence([torch.ones(len(x), dtype=torch.bool) for x in inputs], batch_first=True)
            x = pad_sequence(list(inputs), batch_first=True)
        else:
            x = torch.stack(inputs)
        dtype = torch.float32 if self.classes == 1 else torch.int64
        return {"x": x, "mask": mask, "target": torch.tensor(targets).nan_to_num(-1).to(dtype), "ids": list(ids)}

    def _number(self, label: Any, id: str) -> float:
        if isinstance(label, str) and self.names is not None:
            if label not in self.names:
                hint = nearest(label, self.names)
                raise BadSample(f"sample {id!r}: unknown class {label!r}; classes are {', '.join(self.names)}{hint}")
            return float(self.names.index(label))
        try:
            number = float(label)
        except (TypeError, ValueError):
            raise BadSample(f"sample {id!r}: label {label!r} is no number, and the model's classes have no names") from None
        if self.classes > 1 and not (number.is_integer() and 0 <= number < self.classes):
            raise BadSample(f"sample {id!r}: class {label!r} is not among 0 .. {self.classes - 1}")
        return number


class ClassificationTask(AdapterTask):
    """Cross-entropy over classes, or mean squared error on one number, with torchmetrics' scores.

    Args:
        model, plan: see `AdapterTask`.
        metrics: out of "accuracy", "f1" (macro), "matthews" for classes; "mse", "pearson", "spearman", "r2" for a number.
            None: accuracy and f1, or pearson and spearman.
        label_smoothing: of the cross-entropy.
        common: lr, weight_decay, betas, warmup, schedule, final_lr, adapter, optimizer, start_from: of `AdapterTask`.
    """

    model: EncoderClassifier

    def __init__(
        self,
        model: EncoderClassifier,
        plan: Any = None,
        *,
        metrics: Sequence[str] | None = None,
        label_smoothing: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(model, plan, **common)
        self.regression = model.classes == 1
        if not 0 <= label_smoothing < 1 or (label_smoothing and self.regression):
            raise ConfigError(f"label_smoothing is from 0 to below 1, and for classes only; given {label_smoothing}")
        known = REGRESSION if self.regression else CLASSIFICATION
        names = list(metrics) if metrics is not None else list(known)[:2]
        for name in names:
            if name not in known:
                raise NameNotFound(f"metric {name!r} does not fit; valid here: {', '.join(known)}{nearest(name, known)}")
        self.scores = {name: load_metric(name, **known[name](model.classes)) for name in names}
        self.label_smoothing = label_smoothing
        self.processor = LabelledProcessor(model.encoder, model.names, model.classes)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss_sum = self._loss(self.model(batch["x"], batch["mask"]), batch["target"])
        count = len(batch["ids"])
        self.log("loss", loss_sum.detach() / count, prog_bar=True, batch_size=count)
        return self.shared_loss(loss_sum, count)

    def _loss(self, out: Tensor, target: Tensor) -> Tensor:
        if self.regression:
            return F.mse_loss(out.float().squeeze(-1), target, reduction="sum")
        return F.cross_entropy(out.float(), target, reduction="sum", label_smoothing=self.label_smoothing)

    def _evaluate(self, batch: dict[str, Any], prefix: str) -> None:
        out = self.model(batch["x"], batch["mask"]).float()
        count = len(batch["ids"])
        self.log(f"{prefix}_loss", self._loss(out, batch["target"]) / count, batch_size=count, sync_dist=True)
        for metric in self.scores.values():
            metric.update(out.squeeze(-1) if self.regression else out, batch["target"])

    def _start(self) -> None:
        for metric in self.scores.values():
            metric.to(self.device).reset()

    def _finish(self, prefix: str) -> None:
        for name, metric in self.scores.items():
            self.log(f"{prefix}_{name}", metric.compute(), prog_bar=True)

    def on_validation_epoch_start(self) -> None:
        self._start()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_start(self) -> None:
        self._start()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        out = self.model(batch["x"], batch["mask"]).float()
        if self.regression:
            return [{"id": i, "value": v} for i, v in zip(batch["ids"], out.squeeze(-1).tolist(), strict=True)]
        names = self.model.names or [str(c) for c in range(self.model.classes)]
        best = out.softmax(-1).max(-1)
        rows = zip(batch["ids"], best.indices.tolist(), best.values.tolist(), strict=True)
        return [{"id": i, "label": names[c], "probability": p} for i, c, p in rows]


# Metric name -> its torchmetrics options for a number of classes; the first two are the defaults.
CLASSIFICATION: dict[str, Callable[[int], dict[str, Any]]] = {
    "accuracy": lambda n: {"task": "multiclass", "num_classes": n, "average": "micro"},
    "f1": lambda n: {"task": "multiclass", "num_classes": n, "average": "macro"},
    "matthews": lambda n: {"task": "multiclass", "num_classes": n},
    "auroc": lambda n: {"task": "multiclass", "num_classes": n},
}
REGRESSION: dict[str, Callable[[int], dict[str, Any]]] = {
    "pearson": lambda n: {},
    "spearman": lambda n: {},
    "mse": lambda n: {},
    "mae": lambda n: {},
    "r2": lambda n: {},
}
