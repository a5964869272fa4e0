"""What every task shares: attach the plan, optimize what it trains, keep checkpoints to that, divide the loss exactly.

A task is a LightningModule around a model and a plan, so any Trainer, strategy, precision, logger and callback works on
it as it is. Choices made here:

- The plan is attached in `configure_model`, before Lightning makes the optimizer or wraps the model for a strategy.
- The loss is a sum over supervised items (tokens, samples). It is divided by their number over all ranks and all
  accumulated micro-batches of the optimizer step: the first micro-batch's number is used in the backward, and the
  gradients are corrected once, before clipping, when the step's true number is known. Without accumulation the
  correction is exactly 1 and skipped.
- A checkpoint holds the adapter's tensors (connectors and heads included), the optimizer and the loops, nothing frozen.
  Loading is strict about those tensors, and says so by name. An adapter that the run has reshaped (pruned, or placed by
  its data) is attached as it was when the checkpoint was written, if the task's plan is still the same.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmpeft.adapters import attach, check_distributed, detach, inspect, load, parameter_groups
from mmpeft.adapters.plan import Plan
from mmpeft.adapters.selection.controller import Controller, idle
from mmpeft.adapters.state import SLOT, find_state, slots, state_of
from mmpeft.errors import ConfigError, FileFormatError, Unsupported, nearest, require
from mmpeft.tasks.schedule import Schedule, check_schedule, lr_factor

_lightning: Any = require("lightning.pytorch", "train")
log = logging.getLogger(__name__)

# Frozen modules stay in eval mode through train(), on purpose. The other is Lightning's own, of no use to its users.
warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")

EXTRA = "mmpeft"  # the checkpoint entry beside Lightning's own


class AdapterTask(_lightning.LightningModule):  # type: ignore[misc]
    """Base class of the tasks; subclasses give `training_step` and evaluation.

    Args:
        model: the model to adapt; changed in place when training is set up.
        plan: what is trained: a mapping pattern -> method, a list of rules, or a YAML file. None leaves a model that
            already has an adapter as it is.
        lr, weight_decay: where a rule of the plan says nothing.
        betas: of AdamW.
        warmup: share of all steps, or (from 1 on) a number of steps.
        schedule: "cosine", "linear" or "constant" after the warm-up.
        final_lr: what is left of the peak learning rate at the end.
        adapter: name of the adapter.
        optimizer: another optimizer: called with the parameter groups, each of which brings its lr and weight decay.
        start_from: folder of a saved adapter, loaded instead of attaching `plan`: to go on training or to evaluate it.

    Attributes:
        recipe: the config that built `model`, where the command line did; `AdapterCheckpoint` keeps it with the adapter.

    Raises:
        ConfigError: values out of range, or neither plan nor adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Any = None,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: float = 0.05,
        schedule: Schedule = "cosine",
        final_lr: float = 0.01,
        adapter: str = "default",
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        start_from: str | None = None,
    ) -> None:
        super().__init__()
        if lr <= 0:
            raise ConfigError(f"lr must be positive, given {lr}")
        if plan is None and start_from is None and find_state(model) is None:
            raise ConfigError("no plan, no start_from and no adapter on the model: there is nothing to train or evaluate")
        check_schedule(warmup, schedule, final_lr)
        self.model = model
        self.plan = None if plan is None else Plan.read(plan)
        self.lr, self.weight_decay, self.betas = lr, weight_decay, betas
        self.warmup, self.schedule, self.final_lr = warmup, schedule, final_lr
        self.adapter, self.make_optimizer, self.start_from = adapter, optimizer, start_from
        self.strict_loading = False  # Lightning's check knows no frozen weights; `on_load_checkpoint` has its own
        self.total_steps: int | None = None  # fixed by the trainer or by BudgetedSteps; the schedule follows it
        self.recipe: dict[str, Any] | None = None
        self._window = _Window()
        self._optimised: list[dict[str, Any]] | None = None  # the adapter's plan when the optimizer was made

    # ---- adapting --------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        with torch.device("cpu"):  # the model exists: Lightning's context, which makes new tensors on the GPU, is not meant
            self.adapt()
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh)

    def adapt(self) -> None:
        """Load or attach the adapter, unless the model has it already."""
        state = find_state(self.model)
        if state is None or self.adapter not in state.entries:
            if self.start_from is not None:
                load(self.model, self.start_from, self.adapter)
            elif self.plan is not None:
                attach(self.model, self.plan, self.adapter)

    def on_fit_start(self) -> None:
        if self.trainer.world_size > 1:
            check_distributed(self.model)
        if self.trainer.accumulate_grad_batches > 1 and "DeepSpeed" in type(self.trainer.strategy).__name__:
            raise Unsupported(
                "DeepSpeed keeps the gradients to itself, so the loss of several accumulated micro-batches cannot be "
                "divided by their count of supervised items; use accumulate_grad_batches=1 or another strategy"
            )
        if self.trainer.is_global_zero:
            seen = inspect(self.model)  # what has to run beside the optimizer is known, and named, when training starts
            print(replace(seen, rows=tuple(replace(row, beside=()) for row in seen.rows)), flush=True)

    def on_train_start(self) -> None:
        running = [c.controller for c in self.trainer.callbacks if isinstance(getattr(c, "controller", None), Controller)]
        for missing in idle(self.model, running):
            log.warning("nothing runs beside the optimizer for %s; the method trains as it starts", missing)

    def configure_optimizers(self) -> Any:
        groups = _named_once(parameter_groups(self.model, lr=self.lr, weight_decay=self.weight_decay))
        make = self.make_optimizer or (lambda g: torch.optim.AdamW(g, lr=self.lr, betas=self.betas))
        optimizer, self._optimised = make(groups), self._rules()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _factor(self, step: int) -> float:
        return lr_factor(
            step, self._total(), warmup=self.warmup, schedule=self.schedule, final=self.final_lr
        )

    def _total(self) -> int:
        if self.total_steps is None:
            steps = self.trainer.estimated_stepping_batches
            self.total_steps = None if steps == float("inf") else int(steps)
        return self.total_steps or PROVISIONAL_STEPS

    # ---- the loss --------------------------------------------------------------------------------------------------

    def shared_loss(self, loss_sum: Tensor, count: int) -> Tensor:
        """This micro-batch's share of the mean over all supervised items of the optimizer step.

        Args:
            loss_sum: scalar, the sum over `count` items.
        """
        trainer = self.trainer
        total = count
        if trainer.world_size > 1:
            total = int(trainer.strategy.reduce(torch.tensor(float(count), device=self.device), reduce_op="sum"))
        accumulate = trainer.accumulate_grad_batches
        reference = self._window.add(total, accumulate)
        factor: float = trainer.world_size * accumulate / reference
        return loss_sum * factor  # undoes what the trainer divides by

    @property
    def correction(self) -> float:
        """What the gradients of the optimizer step under way will be multiplied by, once its micro-batches are complete."""
        return self._window.factor

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Within it, `shared_loss` gives the mean of one batch, and the optimizer step under way does not count it."""
        window, self._window = self._window, _Window()
        try:
            yield
        finally:
            self._window = window

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        factor = self._window.close()
        if factor != 1.0:
            with torch.no_grad():
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        if p.grad is not None:
                            p.grad.mul_(factor)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def kept(self) -> set[str]:
        """Names in `state_dict()` of what a checkpoint holds."""
        found = set()
        for path, _, slot in slots(self.model):
            for adapter, delta in slot.deltas():
                key = ".".join(p for p in ("model", path, SLOT, adapter, delta.site.key(delta.method.name)) if p)
                found |= {f"{key}.{name}" for name in delta.saved}
        return found & set(self.state_dict())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = self.kept()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint[EXTRA] = {
            "total_steps": self.total_steps, "adapter": self.adapter, "plan": self._given(), "rules": self._rules(),
        }  # fmt: skip
        if self._optimised is not None and self._optimised != self._rules():
            checkpoint["optimizer_states"] = []  # of tensors that the adapter no longer has

    def _given(self) -> list[dict[str, Any]] | None:
        """The plan that the task was given, as data."""
        return None if self.plan is None else [rule.to_dict() for rule in self.plan.rules]

    def _rules(self) -> list[dict[str, Any]] | None:
        """The plan that the adapter has now."""
        state = find_state(self.model)
        return None if state is None or self.adapter not in state.entries else list(state.entries[self.adapter].rules)

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Raises FileFormatError, naming every tensor of the adapter that is missing, unknown or misshapen."""
        extra = checkpoint.get(EXTRA, {})
        self.total_steps = extra.get("total_steps")
        if "state_dict" not in checkpoint:
            return  # a strategy that shards the model (FSDP2) reads the tensors into it itself and leaves the rest
        rules, own_rules = extra.get("rules"), self._rules()
        reshaped = rules is not None and own_rules is not None and rules != own_rules
        if reshaped and self.plan is not None and extra.get("plan") == self._given():
            metadata = state_of(self.model).entries[self.adapter].metadata
            detach(self.model, self.adapter)
            attach(self.model, Plan.read(rules), self.adapter, check=False)
            state_of(self.model).entries[self.adapter].metadata = metadata
        given: Mapping[str, Tensor] = checkpoint["state_dict"]
        own = {k: v for k, v in self.state_dict().items() if k in self.kept()}
        problems = [f"missing {k}" for k in sorted(set(own) - set(given))]
        problems += [f"unknown {k}{nearest(k, own, n=1)}" for k in sorted(set(given) - set(own))]
        problems += [
            f"{k} has shape {tuple(given[k].shape)}, expected {tuple(own[k].shape)}"
            for k in sorted(set(own) & set(given))
            if given[k].shape != own[k].shape
        ]
        if problems:
            more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise FileFormatError("the checkpoint does not fit this plan:\n  " + "\n  ".join(problems[:20]) + more)


PROVISIONAL_STEPS = 400  # the schedule's length before BudgetedSteps has measured it: only the warm-up is read from it


class _Window:
    """Supervised items of the micro-batches since the last optimizer step."""

    def __init__(self) -> None:
        self.total, self.reference = 0, 0

    def add(self, count: int, accumulate: int) -> int:
        """Count a micro-batch; the number its loss is to be divided by for now."""
        if self.reference == 0:
            self.reference = max(1, count) * accumulate
        self.total += count
        return self.reference

    @property
    def factor(self) -> float:
        """What the step's gradients must be multiplied by."""
        return self.reference / max(1, self.total) if self.reference else 1.0

    def close(self) -> float:
        """The factor; starts the next step's window."""
        factor = self.factor
        self.total, self.reference = 0, 0
        return factor


def _named_once(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Group names, told apart where two rules read the same: loggers take them as keys."""
    seen: dict[str, int] = {}
    for group in groups:
        name = group["name"]
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            group["name"] = f"{name} #{seen[name]}"
    return groups


def shard(model: nn.Module, mesh: Any) -> None:
    """FSDP2 for Lightning's ModelParallelStrategy: every block of every ModuleList of its own, then the rest."""
    from torch.distributed.fsdp import fully_shard

    data = mesh["data_parallel"] if "data_parallel" in (mesh.mesh_dim_names or ()) else mesh
    if data.size() == 1:
        return
    stacks = [m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and SLOT not in n.split(".")]
    for block in (b for stack in stacks for b in stack):
        if any(p.requires_grad or p.numel() for p in block.parameters()):
            fully_shard(block, mesh=data)
    fully_shard(model, mesh=data)
