"""What runs beside an optimizer, under Lightning: one callback for every `mmpeft.Controller`.

    trainer:
      callbacks:
        - class_path: mmpeft.tasks.StepControl
          init_args:
            controller:
              class_path: mmpeft.FLOPGates          # or APTController, Density, LoRAPruner, RosePruner, ChildMask, ...
              init_args: {sparsity: 0.5, steps: 2000}

The controller is made when training starts, from the task's model, and its hooks are called as its file says: an optimizer
step is one step, whatever is accumulated. Choices made here:

- The gradient of a `penalty` of the parameters is added once an optimizer step, after the micro-batches and before
  clipping. A `loss` of what was seen in a forward joins the loss of that micro-batch (by `add_`, since Lightning hands
  callbacks the loss but takes none from them), divided by their number.
- Under DDP the controller is told how to average what differs between ranks, so that all of them decide alike.
- A checkpoint holds the controller's state beside the adapter's tensors, and a resumed run goes on exactly.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from inspect import isclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mmpeft.adapters.example import waiting
from mmpeft.adapters.freeze import evaluating
from mmpeft.adapters.selection.controller import Controller, Loop, Loss
from mmpeft.errors import ConfigError, MmpeftError, Unsupported, require
from mmpeft.tasks.base import AdapterTask
from mmpeft.tasks.callbacks import AdapterCheckpoint

_lightning: Any = require("lightning.pytorch", "train")
log = logging.getLogger(__name__)


def training_loss(task: Any, batch: Any) -> Tensor:
    """Mean loss of a batch by the task's own `training_step`, with nothing logged and nothing counted."""
    task.log = task.log_dict = lambda *_, **__: None
    try:
        with task.uncounted() if isinstance(task, AdapterTask) else nullcontext():
            found = task.training_step(batch, 0)
    finally:
        del task.log, task.log_dict
    loss: Tensor = found["loss"] if isinstance(found, Mapping) else found
    return loss


def quiet(loss: Callable[[Any, Any], Tensor], trainer: Any, task: Any, batch: Any) -> Loss:
    """The loss of a batch as a function, run in eval, in the trainer's precision, on the task's device."""
    batch = trainer.strategy.batch_to_device(batch, task.device)

    def run() -> Tensor:
        with evaluating(task), trainer.precision_plugin.forward_context():
            return loss(task, batch)

    return run


def single_of(loader: Any) -> Callable[[int], Any] | None:
    """index -> batch of one sample, where the loader is `mmpeft.data`'s or a DataLoader over numbered samples."""
    if hasattr(loader, "single"):
        found: Callable[[int], Any] = loader.single
        return found
    if hasattr(loader, "collate_fn") and not isinstance(loader.dataset, torch.utils.data.IterableDataset):
        return lambda i: loader.collate_fn([loader.dataset[i]])
    return None


def sample_batches(loader: Any, n: int, seed: int) -> list[Any]:
    """Batches of one sample each, n of them drawn from a loader's data set; bad ones that it skips are passed over.

    Raises:
        Unsupported: a loader of another kind.
    """
    single = single_of(loader)
    if single is None:
        raise Unsupported("single samples need one DataLoader over a dataset with numbered samples")
    order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    return list(islice((batch for i in order if (batch := single(i)) is not None), n))


class StepControl(_lightning.Callback):  # type: ignore[misc]
    """Run a controller beside the task's optimizer.

    Args:
        controller: model -> controller: the class with its options in YAML, a lambda or `functools.partial` in Python.
        weight: of what the controller adds to the loss.
        loss: (task, batch) -> scalar loss, for controllers that look at the batch or at single samples; the default is
            the task's own training loss.
        key: tells two callbacks with the same class of controller (or the same function) apart in checkpoints; Lightning
            refuses two of one `state_key`.

    Attributes:
        controller: the controller, from the start of training on; None before.

    Raises:
        ConfigError: what the controller refuses, or a weight of a controller that adds nothing to the loss.
        Unsupported: a strategy or precision under which gradients cannot be seen.
    """

    def __init__(
        self,
        controller: Callable[[nn.Module], Controller],
        *,
        weight: float = 1.0,
        loss: Callable[[Any, Any], Tensor] = training_loss,
        key: str = "",
    ) -> None:
        self.make, self.weight, self.loss, self.key = controller, weight, loss, key
        self.controller: Controller | None = None
        self._restored: dict[str, Any] | None = None
        self._watching = ExitStack()
        self._held: tuple[int, Iterator[Any]] | None = None  # number of the next validation batch, and all from it on
        self._ended = False  # what is restored is of a run that had ended
        self._closed = False  # `close` ran, in this run or in the one it goes on from
        self._refused: MmpeftError | None = None  # what `close` said
        self._drawn, self._stepped = -1, 0  # optimizer steps of the run when last drawn for, and when last stepped

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}:{self.key or _name(self.make)}"

    @property
    def running(self) -> Controller:
        """The controller of the training that is under way."""
        assert self.controller is not None
        return self.controller

    # ---- the life of a training ------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if "DeepSpeed" in type(trainer.strategy).__name__:
            raise Unsupported(f"{self.state_key}: DeepSpeed keeps the gradients to itself; use another strategy")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.controller = made = self.make(pl_module.model)
        if not isinstance(made, Controller):
            raise ConfigError(f"controller gives a {type(made).__name__}; expected an mmpeft.Controller")
        if self.weight != 1 and type(made).penalty is Controller.penalty and type(made).loss is Controller.loss:
            raise ConfigError(f"weight {self.weight}: {type(made).__name__} adds nothing to the loss")
        if type(made).watch is not Controller.watch and getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise Unsupported(f"{type(made).__name__} watches the backward, whose loss 16-mixed scales; use bf16-mixed")
        before = trainer.callbacks[: trainer.callbacks.index(self)]
        if made.reshapes and any(isinstance(c, AdapterCheckpoint) for c in before):
            raise ConfigError(
                f"{type(made).__name__} makes the adapter smaller at the end of training: list it before AdapterCheckpoint"
            )
        made.join(self._loop(trainer, pl_module))
        if self._restored is not None:
            made.load_state_dict(tree_map(lambda t: t.to(pl_module.device) if _is_data(t) else t, self._restored))
        self._closed, self._ended, self._restored = self._ended, False, None  # a second training starts anew
        self._drawn, self._stepped = -1, trainer.global_step

    def _loop(self, trainer: Any, pl_module: Any) -> Loop:
        steps = trainer.estimated_stepping_batches
        average = functools.partial(trainer.strategy.reduce, reduce_op="mean")
        return Loop(
            optimizer=trainer.optimizers[0],
            total=None if steps == float("inf") else int(steps),
            **({"mean": average} if trainer.world_size > 1 else {}),
            samples=functools.partial(self._samples, trainer, pl_module) if single_of(trainer.train_dataloader) else None,
            validation=functools.partial(self._validation, trainer, pl_module) if trainer.val_dataloaders else None,
        )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._closed and self.running.reshapes:
            log.warning("%s: the run this one goes on from had ended, and was pruned then; not again", self.state_key)
            return
        try:
            self.running.close()
            self._closed = True
        except MmpeftError as error:  # hours of training end here: the adapter is saved as it is, and then this is raised
            self._refused = error

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if self._refused is not None:
            error, self._refused = self._refused, None
            raise error

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._watching.close()

    # ---- an optimizer step -----------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self._drawn:  # the first micro-batch
            self._drawn = trainer.global_step
            loss = quiet(self.loss, trainer, pl_module, batch)
            if waiting(pl_module.model):  # the proof of liveness runs the model too; no controller is to see that
                with torch.no_grad():
                    loss()
            self.running.look(loss)
            self.running.draw()
        self._watching.enter_context(self.running.watch())

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if (seen := self.running.loss()) is not None:
            loss.add_(seen.to(loss), alpha=self.weight / trainer.accumulate_grad_batches)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self._watching.close()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        with torch.enable_grad():
            penalty = self.running.penalty()
        if penalty is not None and penalty.requires_grad:
            # The task multiplies the step's gradients by its correction after this.
            share = self.weight / (pl_module.correction if isinstance(pl_module, AdapterTask) else 1.0)
            params = [p for p in pl_module.parameters() if p.requires_grad]
            for p, g in zip(params, torch.autograd.grad(penalty, params, allow_unused=True), strict=True):
                if g is not None:
                    p.grad = share * g if p.grad is None else p.grad + share * g
        self.running.before_step()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._watching.close()  # where a training_step gave no loss
        if trainer.global_step != self._stepped:  # the gradients of the step are there until the next one clears them
            self._stepped = trainer.global_step
            value = self.running.step()
            if value is not None and self.running.measure:
                pl_module.log(self.running.measure, float(value))

    # ---- what a controller may look at -----------------------------------------------------------------------------

    def _samples(self, trainer: Any, pl_module: Any, n: int) -> list[Loss]:
        """`Loop.samples`: drawn by the step's number from the training set."""
        batches = sample_batches(trainer.train_dataloader, n, trainer.global_step)
        return [quiet(self.loss, trainer, pl_module, batch) for batch in batches]

    def _validation(self, trainer: Any, pl_module: Any, n: int) -> Loss:
        """`Loop.validation`: the batches of the first validation loader, in its order."""
        loaders = trainer.val_dataloaders
        loader = loaders[0] if isinstance(loaders, list | tuple) else loaders
        n %= len(loader)
        if self._held is None or self._held[0] != n:
            self._held = (n, islice(loader, n, None))
        batch = next(self._held[1])
        self._held = (n + 1, self._held[1])
        return quiet(self.loss, trainer, pl_module, batch)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        held = (self._restored or {}) if self.controller is None else self.controller.state_dict()
        return held | {"closed": True} if self._closed or self._ended else held

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._ended = state.get("closed", False)
        self._restored = {n: v for n, v in state.items() if n != "closed"} or None


def _is_data(t: Any) -> bool:
    return isinstance(t, Tensor) and t.dtype != torch.uint8  # what a generator's state is, which stays on the CPU


def _name(make: Callable[..., Any]) -> str:
    """The class (or function) that a factory is of, also behind the partial that YAML makes."""
    parts = [make.func, *make.args] if isinstance(make, functools.partial) else [make]
    classes = [part for part in parts if isclass(part) and issubclass(part, Controller)]
    named: str = getattr((classes or parts)[0], "__qualname__", type(make).__qualname__)
    of = make.keywords.get("of") if isinstance(make, functools.partial) else None
    return named if of is None else f"{named}:{getattr(of, '__name__', type(of).__name__)}"
