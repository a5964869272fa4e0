"""A whole training step at one batch shape: forward, backward and optimizer, replayed as one CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.kernels import documents as packing
from mmpeft.kernels.adamw import FlatAdamW
from mmpeft.kernels.documents import Documents
from mmpeft.kernels.llama import FusedLlama


class TrainStep:
    """Forward, backward and optimizer at one batch shape, as one CUDA graph where there is a GPU.

    step = TrainStep(model, model.optimizer(lr=1e-4), batch=8, length=1024); loss = step(ids, labels)
    step = TrainStep(..., documents=64); loss = step(ids, labels, documents=batch["document_ids"])   # packed rows

    `documents`: the most documents a batch holds, padding at a row's end included; fixed, as a graph's shapes are. A step
    made for documents needs them at every call.

    The loss is a device tensor that the next call overwrites; nothing here waits for the device, unless document ids are
    given on it (they are counted: give them as the collator makes them, on the CPU).
    """

    def __init__(
        self,
        model: FusedLlama,
        optimizer: FlatAdamW,
        *,
        batch: int,
        length: int,
        rows: int | None = None,
        documents: int | None = None,
    ) -> None:
        device = model.embedding.device
        self.model, self.optimizer = model, optimizer
        self.ids, self.labels = (torch.zeros(batch, length, dtype=torch.int64, device=device) for _ in range(2))
        self.rows = None if rows is None else torch.zeros(rows, dtype=torch.int64, device=device)
        self.documents = None if documents is None else packing.empty(batch, length, documents, device)
        self._graph: Any = None

    def __call__(
        self, ids: Tensor, labels: Tensor, rows: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """One update on ids, labels [B, S]; returns the mean loss before it.

        Args:
            rows: as in `FusedLlama.loss`. documents: document ids [B, S], a run of one id in a row being a document.

        Raises:
            ConfigError: other shapes than this step was made for, or more documents.
        """
        given = (tuple(ids.shape), tuple(labels.shape), rows is not None, documents is not None)
        if given != (tuple(self.ids.shape),) * 2 + (self.rows is not None, self.documents is not None):
            made = f"rows {_yes(self.rows is not None)}, documents {_yes(self.documents is not None)}"
            raise ConfigError(
                f"ids {given[0]}, labels {given[1]}, rows {_yes(given[2])}, documents {_yes(given[3])}; "
                f"this step was made for {tuple(self.ids.shape)}, {made}"
            )
        if self.documents is not None and documents is not None:
            if documents.shape != ids.shape:
                raise ConfigError(f"document ids {tuple(documents.shape)}; expected one a token, {tuple(ids.shape)}")
            most = self.documents.starts.shape[0] - 1
            self.documents.copy_(Documents.of_ids(documents, most=most))
        self.ids.copy_(ids, non_blocking=True)
        self.labels.copy_(labels, non_blocking=True)
        if self.rows is not None and rows is not None:
            self.rows.copy_(rows, non_blocking=True)
        if not self.ids.is_cuda:
            loss = self._run()
        else:
            if self._graph is None:
                self._capture()
            self._graph.replay()
            loss = self._loss
        torch.autograd.graph.increment_version(self.model.masters)  # written by a kernel, or through another view
        return loss

    def _run(self) -> Tensor:
        loss, tape = self.model.forward(F.embedding(self.ids, self.model.embedding), self.labels, self.rows, self.documents)
        self.model.backward(tape, self.optimizer.grad)
        self.optimizer.step()
        return loss

    def _capture(self) -> None:
        state = [t.clone() for t in self._state()]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run()  # compiles the kernels and picks the attention; undone below
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        for t, before in zip(self._state(), state, strict=True):
            t.copy_(before)
        self.optimizer.refresh()
        del state, t, before
        torch.cuda.empty_cache()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = self._run()

    def _state(self) -> Sequence[Tensor]:
        o = self.optimizer
        return o.flat, o.m, o.v, o.steps, self.model.seed


def _yes(given: bool) -> str:
    return "yes" if given else "no"
