"""What runs beside an optimizer, as one small protocol: gates that are drawn, masks that are set, ranks that grow, places
that move. A method that needs it is a `Controller` of its own few hooks; the loop that calls them is written once
(`mmpeft.tasks.StepControl`), or is yours:

    for every optimizer step:
        controller.draw()                              # before the first forward
        for every micro-batch:
            with controller.watch():                   # around its forward and backward
                loss = task(model(x)) + controller.loss();  loss.backward()
        controller.penalty()                           # of the parameters alone: its gradient, once a step
        controller.before_step()                       # the gradients are complete
        optimizer.step()
        controller.step()                              # the gradients are still there
        optimizer.zero_grad()

A controller decides by what it has seen and by its own random numbers. What it writes into the adapter (masks, gates,
places) is the adapter's and in its files; everything else it remembers is named in `KEEPS`, so that a resumed run goes on
exactly.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmpeft.adapters.state import slots
from mmpeft.errors import ConfigError

Loss = Callable[[], Tensor]


def _alone(t: Tensor) -> Tensor:
    return t


@dataclass(frozen=True)
class Loop:
    """What a training loop tells its controllers.

    Args:
        optimizer: that steps.
        total: optimizer steps of the whole run, where that is known.
        mean: of a tensor over the ranks of a distributed run, which see different data.
        samples: n -> functions that run the model on one training sample each and give its loss; the same ones on every
            rank.
        validation: n -> a function that gives the loss of the n-th validation batch (counted on over the end).
    """

    optimizer: torch.optim.Optimizer | None = None
    total: int | None = None
    mean: Callable[[Tensor], Tensor] = _alone
    samples: Callable[[int], list[Loss]] | None = None
    validation: Callable[[int], Loss] | None = None


class Controller:
    """A controller that does nothing; subclasses give the hooks that they need.

    Attributes:
        KEEPS: attributes that `state_dict` holds (numbers, tensors, containers of them, generators).
        measure: what the number that `step` returns is logged as; "" is not at all.
        reads_samples: whether it looks at single training samples.
        reshapes: whether `close` changes the adapter's tensors, so that it comes before the adapter is saved.
        loop: what the loop has told it by `join`.
    """

    KEEPS: ClassVar[tuple[str, ...]] = ()
    measure: ClassVar[str] = ""
    reshapes: bool = False
    reads_samples: ClassVar[bool] = False
    loop: Loop = Loop()

    def names(self) -> set[str]:
        """What a method's `beside` may call it."""
        return {type(self).__name__}

    def join(self, loop: Loop) -> None:
        """The training begins in this loop; what cannot work in it is refused here."""
        if self.reads_samples and loop.samples is None:
            raise ConfigError(f"{type(self).__name__} looks at single training samples; this loop gives none")
        self.loop = loop

    def look(self, loss: Loss) -> None:
        """Before `draw`; `loss` runs the model, in eval, on the batch at hand and gives its mean loss."""

    def draw(self) -> Any:
        """Before the first forward of an optimizer step."""

    def watch(self) -> AbstractContextManager[Any]:
        """Around the forward and backward of a micro-batch."""
        return nullcontext()

    def loss(self) -> Tensor | None:
        """What the loss of a micro-batch gets, from what was seen in `watch`."""
        return None

    def penalty(self) -> Tensor | None:
        """What the loss of an optimizer step gets, a function of parameters."""
        return None

    def before_step(self) -> None:
        """The gradients of the step are complete."""

    def step(self) -> float | None:
        """The optimizer has stepped and the gradients are still there; the number to log."""
        return None

    def close(self) -> None:
        """Training is over."""

    def state_dict(self) -> dict[str, Any]:
        """What `KEEPS` names, for checkpoints."""
        held = {n: getattr(self, n) for n in self.KEEPS}
        return {n: v.get_state() if isinstance(v, torch.Generator) else v for n, v in held.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From `state_dict()`, on the same plan."""
        for n in self.KEEPS:
            own = getattr(self, n)
            if isinstance(own, torch.Generator):
                own.set_state(state[n].cpu())
            else:
                setattr(self, n, copy.deepcopy(state[n]))


class Penalty(Controller):
    """A function of the model that the loss gets: `mask_l1`, `layer_l1`, `orthogonal_penalty`, or one of your own.

    Args:
        of: called with the model and `options`, gives a scalar.
        options: its other arguments by name.

    Raises:
        ConfigError: options that the function does not take.
    """

    def __init__(
        self, model: nn.Module, *, of: Callable[..., Tensor], options: Mapping[str, Any] | None = None
    ) -> None:
        self.model, self.of, self.options = model, of, dict(options or {})
        check_call(of, model, **self.options)
        with torch.no_grad():
            self.penalty()  # an adapter that is not there is refused now

    def penalty(self) -> Tensor:
        return self.of(self.model, **self.options)


class Once(Controller):
    """A function of the model that is called once: before optimizer step `at` (counted from 0: `begin_delta_lora`), or at
    the end of training (`one_off_drop`, `prune_channels`, `plain_prefixes`).

    Args:
        of: called with the model and `options`.
        at: None is the end; only there may the function change the shapes of what is trained.
        options: its other arguments by name.

    Raises:
        ConfigError: options that the function does not take, or `at` is not in the run.
    """

    KEEPS = ("steps",)

    def __init__(
        self,
        model: nn.Module,
        *,
        of: Callable[..., Any],
        at: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.of, self.at, self.options, self.steps = model, of, at, dict(options or {}), 0
        self.reshapes = at is None
        check_call(of, model, **self.options)

    def names(self) -> set[str]:
        return {*super().names(), getattr(self.of, "__name__", "")}

    def join(self, loop: Loop) -> None:
        super().join(loop)
        if self.at is not None and not 0 <= self.at < (loop.total or self.at + 1):
            raise ConfigError(f"at {self.at}; expected 0 to the run's {loop.total} steps")

    def draw(self) -> None:
        if self.steps == self.at:
            self.of(self.model, **self.options)

    def step(self) -> None:
        self.steps += 1

    def close(self) -> None:
        if self.at is None:
            self.of(self.model, **self.options)


class Draws(Controller):
    """A function that draws what a method takes from chance (`draw_mixout`), before every optimizer step.

    Args:
        of: called with the model, a generator and `options`.
        options: its other arguments by name.

    Raises:
        ConfigError: options that the function does not take.
    """

    KEEPS = ("generator",)

    def __init__(
        self, model: nn.Module, *, of: Callable[..., Any], options: Mapping[str, Any] | None = None, seed: int = 0
    ) -> None:
        self.model, self.of, self.options = model, of, dict(options or {})
        self.generator = torch.Generator().manual_seed(seed)
        check_call(of, model, self.generator, **self.options)

    def names(self) -> set[str]:
        return {*super().names(), getattr(self.of, "__name__", "")}

    def draw(self) -> None:
        self.of(self.model, self.generator, **self.options)


def idle(model: nn.Module, running: Iterable[Controller]) -> list[str]:
    """Methods on the model whose `beside` none of the controllers is: "LoRADropout: Masks"."""
    there = set().union(*(c.names() for c in running))
    methods = {type(d.method) for _, _, slot in slots(model) for _, d in slot.deltas()}
    return sorted(f"{m.__name__}: {' or '.join(m.beside)}" for m in methods if m.beside and not there & set(m.beside))


def check_call(of: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Refuse arguments that a function does not take."""
    try:
        inspect.signature(of).bind(*args, **options)
    except TypeError as error:
        raise ConfigError(f"{getattr(of, '__name__', of)} with options {options}: {error}") from None


@contextmanager
def seeded(seed: int, model: nn.Module) -> Iterator[None]:
    """Within it, torch's generators (of the CPU and the model's devices) start from `seed`; afterwards they go on as if
    nothing had been drawn. A resumed run then draws what the whole run does."""
    devices = sorted({p.get_device() for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def samples_of(loop: Loop, n: int) -> list[Loss]:
    """Losses of n training samples.

    Raises:
        ConfigError: the loop gives none.
    """
    if loop.samples is None:
        raise ConfigError("this controller looks at single training samples; the loop gives it none (`join`)")
    return loop.samples(n)


def trained_by(of: Any) -> list[nn.Parameter]:
    """The trainable parameters of a model, or the parameters given."""
    return [p for p in of.parameters() if p.requires_grad] if isinstance(of, nn.Module) else list(of)
