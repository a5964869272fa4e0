"""What one training step costs under a plan: FLOPs forward and backward, and the bytes kept between the two.

There is no formula to go wrong. The model is copied without its numbers, adapted as `attach` would, and taken through
one forward and one backward on fake tensors (shapes, strides, dtypes and the device's choice of kernels, but no
memory). torch's own counter counts the FLOPs, so a frozen part costs activation gradients from its first trained site
upwards and no weight gradients; a hook on autograd sees every tensor that is kept.

Only floating tensors are fake. Ids, masks and positions are small, and their values often decide the way a model takes
(is there padding? is this row packed?), so they are computed. A model that looks at a floating value has no fake form:
with an example of the caller's own its step is really taken, on a copy that shares the base's tensors.

Not seen: what kernels outside torch's dispatcher do (their FLOPs are not counted), and the inputs that activation
checkpointing holds on to.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.utils.flop_counter import FlopCounterMode

from mmpeft.adapters.attach import attach, detach
from mmpeft.adapters.plan import Plan, resolve
from mmpeft.adapters.probe import Call, as_call, put_back, tensors_in
from mmpeft.adapters.state import find_state
from mmpeft.errors import ConfigError, MmpeftError

NO_FAKE_FORM = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
Shape = torch.Size


def _attention(q: Shape, k: Shape, v: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Of fused attention, q [B, H, T, D]: two matmuls; a causal mask is not discounted, as in torch's counter."""
    (batch, heads, length, width), keys = q, k[-2]
    return 2 * batch * heads * length * keys * (width + v[-1])


def _attention_backward(grad: Shape, q: Shape, k: Shape, v: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """The scores again, and gradients of scores, v, q and k: five matmuls."""
    (batch, heads, length, width), keys = q, k[-2]
    return 2 * batch * heads * length * keys * (3 * width + 2 * v[-1])


# torch's counter knows fused attention on CUDA only, and not with fewer heads of keys than of queries.
FUSED = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention{place}{direction}"): flops
    for kernel, place in (("flash", ""), ("flash", "_for_cpu"), ("efficient", ""), ("cudnn", ""))
    for direction, flops in (("", _attention), ("_backward", _attention_backward))
}


@dataclass(frozen=True)
class Cost:
    """Of one step on one example."""

    forward_flops: int = 0
    backward_flops: int = 0
    saved_bytes: int = 0  # that autograd keeps from forward to backward, beside parameters, buffers and the input

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward_flops + other.forward_flops,
            self.backward_flops + other.backward_flops,
            self.saved_bytes + other.saved_bytes,
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.forward_flops - other.forward_flops,
            self.backward_flops - other.backward_flops,
            self.saved_bytes - other.saved_bytes,
        )


class NoStep(Exception):
    """The step cannot be taken; `values`: only because it needs the values of tensors, or an operator has no fake
    form."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        self.values = isinstance(error, NO_FAKE_FORM)


def plan_costs(model: nn.Module, plan: Plan, example: Any, *, real: bool = False) -> list[Cost]:
    """The cost of the frozen model's forward, and of a step under the first rule, the first two rules, ... all rules.

    Args:
        example: arguments as in `attach(example=)`; only shapes and dtypes matter unless `real`.
        real: compute, on a copy that shares the base's tensors, instead of pretending to.

    Raises:
        NoStep: the model cannot be called with the example, or not without values.
    """
    call = as_call(example)
    costs = [_run(model, None, call, real)]
    for n in range(1, len(plan.rules) + 1):
        part = Plan(plan.rules[:n])
        try:
            resolve(model, part)
        except ConfigError:  # the whole plan is well-formed, so its beginning can only train nothing as yet
            costs.append(costs[0])
            continue
        costs.append(_run(model, part, call, real))
    return costs


def _run(model: nn.Module, plan: Plan | None, call: Call, real: bool) -> Cost:
    with put_back(nn.Module()):  # the random states
        try:
            twin = _adapted(model, plan, real)
            if not real:
                fakes: dict[int, Tensor] = {}
                with FakeTensorMode(allow_non_fake_inputs=True):
                    _fake(twin, _device(model), fakes)
                    call = _each(call, lambda t: _pretend(t, _device(model), fakes))
        except MmpeftError:  # as `attach` would refuse
            raise
        except Exception as error:  # a model that cannot be copied
            raise NoStep(error) from error
        fakes_log = logging.getLogger("torch._subclasses.fake_tensor")  # it prints a trace for what `NoStep` says
        before = fakes_log.level
        fakes_log.setLevel(logging.CRITICAL)
        try:
            return step_cost(twin, call)
        except Exception as error:  # whatever the model's own code raises
            raise NoStep(error) from error
        finally:
            fakes_log.setLevel(before)


def _adapted(model: nn.Module, plan: Plan | None, real: bool) -> nn.Module:
    """A copy under the plan as it is in training; frozen and in eval without a plan."""
    twin = _copy(model, _alias if real else _ghost)
    if find_state(twin) is not None:
        detach(twin)
    if plan is None:
        return twin.requires_grad_(False).eval()
    with nullcontext() if real else torch.device("meta"):
        return attach(twin, plan, check=False).train()


def step_cost(model: nn.Module, call: Call) -> Cost:
    """One forward, and the backward of the sum of its outputs where something is trained."""
    own = {_storage(t) for t in [*model.parameters(), *model.buffers(), *tensors_in(call)]}
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(t: Tensor) -> _Held:
        kept = _Held(t)
        held.add(kept)
        return kept

    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter, torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            output = model(*call[0], **call[1])
        forward = int(counter.get_total_flops())
        kept = {_storage(h.tensor): h.tensor.untyped_storage().nbytes() for h in held}
        results = [t for t in tensors_in(output) if t.requires_grad]
        if results:
            torch.stack([t.float().sum() for t in results]).sum().backward()  # type: ignore[no-untyped-call]
        total = int(counter.get_total_flops())
    return Cost(forward, total - forward, sum(n for key, n in kept.items() if key not in own))


class _Held:
    """A tensor that autograd keeps; gone when its graph is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _storage(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


# --- copies ----------------------------------------------------------------------------------------------------------


def _copy(model: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """The model's structure with `make` of each tensor; tied tensors stay tied."""
    tensors: Iterable[Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): make(t) for t in tensors})


def _ghost(t: Tensor) -> Tensor:
    if isinstance(t, nn.Parameter):
        return nn.Parameter(torch.empty_like(t, device="meta"), t.requires_grad)
    return torch.empty_like(t, device="meta") if t.is_floating_point() else t.clone()


def _alias(t: Tensor) -> Tensor:
    return nn.Parameter(t.detach(), t.requires_grad) if isinstance(t, nn.Parameter) else t.clone()


def _device(model: nn.Module) -> torch.device:
    """Where a step of the model would run: its own device; the CPU for a model on meta."""
    found = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if found.type == "meta" else found


def _fake(model: nn.Module, device: torch.device, fakes: dict[int, Tensor]) -> None:
    """Replace a ghost's tensors by fake ones on `device`; inside a fake mode."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                if t is not None:
                    tensors[name] = _pretend(t, device, fakes)  # type: ignore[assignment]


def _pretend(t: Tensor, device: torch.device, fakes: dict[int, Tensor]) -> Tensor:
    """A fake tensor like `t`, or `t` itself where it holds ids or a mask; inside a fake mode."""
    if not (t.is_floating_point() or t.is_complex() or t.is_meta or isinstance(t, nn.Parameter)):
        return t
    if id(t) not in fakes:
        fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
        fakes[id(t)] = nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake
    return fakes[id(t)]


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)({k: _each(v, change) for k, v in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(_each(v, change) for v in value)
    return value
