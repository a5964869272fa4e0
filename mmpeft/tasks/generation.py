"""Visual question answering, captioning, speech: whatever a `MultimodalLM` answers in words.

    task = GenerationTask(model, {"connectors.image": "full", "llm.**.{q,v}_proj": mmpeft.LoRA(rank=8)}, lr=1e-3)
    Trainer(max_epochs=1).fit(task, datamodule=DataModule(train=..., val=...))

Training minimises cross-entropy on the answers' tokens. Validation and test answer freely, as a user would be answered,
and score the answers with the metrics of `mmpeft.metrics`, overall and by question kind; validation logs the loss too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmpeft.adapters.plan import resolve
from mmpeft.data.processor import ConversationProcessor
from mmpeft.errors import ConfigError
from mmpeft.metrics import load_metric
from mmpeft.multimodal import MultimodalLM
from mmpeft.tasks.base import AdapterTask
from mmpeft.tasks.features import CachedProcessor, calibrate_connectors, fill_caches, media_of


class GenerationTask(AdapterTask):
    """A `MultimodalLM`, a plan, and how its answers are scored.

    Args:
        model, plan: see `AdapterTask`.
        metrics: names out of `mmpeft.metrics`, or name -> options.
        max_new_tokens: longest answer in validation and test.
        feature_cache: folder in which the frozen encoders' tokens are kept, so that each medium is encoded once; None
            encodes in every step. Refused where the plan adapts an encoder.
        row_length: pack each training batch into rows of this many tokens (no attention between samples); None pads.
        calibrate: start the connectors from standardised features (`Connector.calibrate`); needs `feature_cache`.
        common: lr, weight_decay, betas, warmup, schedule, final_lr, adapter, optimizer, start_from: of `AdapterTask`.

    Attributes:
        answers: what the last validation, test or prediction said: {"id", "kind", "answer", "answers", "question"}.
    """

    model: MultimodalLM

    def __init__(
        self,
        model: MultimodalLM,
        plan: Any = None,
        *,
        metrics: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("exact_match",),
        max_new_tokens: int = 32,
        feature_cache: str | None = None,
        row_length: int | None = None,
        calibrate: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(model, plan, **common)
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, given {max_new_tokens}")
        if calibrate and feature_cache is None:
            raise ConfigError("calibrate=True reads its statistics from the feature cache: give feature_cache=")
        if feature_cache is not None and self.plan is not None:
            adapted = {t.site.name for t in resolve(model, self.plan) if t.site.path.startswith("encoders.")}
            if adapted:
                raise ConfigError(
                    f"feature_cache: the plan trains {min(adapted)} (and {len(adapted) - 1} more) inside an encoder, so "
                    "its features change from step to step; leave feature_cache out"
                )
        options = metrics if isinstance(metrics, Mapping) else {name: {} for name in metrics}
        self.metrics = [load_metric(name, **dict(given or {})) for name, given in options.items()]
        self.max_new_tokens = max_new_tokens
        self.feature_cache, self.calibrate = feature_cache, calibrate
        self.processor: ConversationProcessor = ConversationProcessor(model, row_length=row_length)
        self.answers: list[dict[str, Any]] = []

    def setup(self, stage: str) -> None:
        if self.feature_cache is None or isinstance(self.processor, CachedProcessor):
            return
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "datasets"):
            raise ConfigError("feature_cache needs a mmpeft.data.DataModule, whose datasets it can go through")
        media = {split: media_of(self.model, d) for split, d in data.datasets.items() if d is not None}
        if not self.trainer.is_global_zero:
            self.trainer.strategy.barrier("features")  # the first rank encodes, the others read
        caches = fill_caches(self.model, list(media.values()), self.feature_cache)
        if self.trainer.is_global_zero:
            self.trainer.strategy.barrier("features")
        if self.calibrate and stage == "fit" and self.start_from is None:
            calibrate_connectors(self.model, caches, media["train"])
        self.processor = CachedProcessor(self.model, caches, row_length=self.processor.row_length)

    # ---- training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        output = self.model(batch["inputs"])
        mean = output.loss_sum.detach() / max(1, output.num_supervised)
        self.log("loss", mean, prog_bar=True, batch_size=max(1, output.num_supervised))
        return self.shared_loss(output.loss_sum, output.num_supervised)

    # ---- free answers ----------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        output = self.model(batch["inputs"])
        if output.num_supervised:
            mean = output.loss_sum / output.num_supervised
            self.log("val_loss", mean, batch_size=output.num_supervised, sync_dist=True, prog_bar=True)
        self._answer(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._answer(batch)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        return self._answer(batch, score=False)

    def _answer(self, batch: dict[str, Any], *, score: bool = True) -> list[dict[str, Any]]:
        prompts, samples = list(batch["prompts"]), batch["samples"]
        said = self.model.generate(prompts, max_new_tokens=self.max_new_tokens, batch_size=len(prompts))
        records = [
            {"id": s["id"], "kind": s.get("kind"), "answer": a, "answers": s.get("answers")}
            for s, a in zip(samples, said, strict=True)
        ]
        self.answers.extend(records)
        scored = [(r["answer"], r["answers"], r["kind"]) for r in records if r["answers"]] if score else []
        if scored:
            answers, references, kinds = zip(*scored, strict=True)
            for metric in self.metrics:
                metric.update(list(answers), list(references), list(kinds))
        return records

    def _start(self) -> None:
        self.answers = []
        for metric in self.metrics:
            metric.to(self.device).reset()

    def _scores(self, prefix: str) -> None:
        for metric in self.metrics:
            for name, value in metric.compute().items():
                self.log(f"{prefix}_{name}", value.to(self.device), rank_zero_only=False, sync_dist=False)

    def on_validation_epoch_start(self) -> None:
        self._start()

    def on_test_epoch_start(self) -> None:
        self._start()

    def on_predict_epoch_start(self) -> None:
        self._start()

    def on_validation_epoch_end(self) -> None:
        self._scores("val")

    def on_test_epoch_end(self) -> None:
        self._scores("test")
