"""Attaching without renaming: an owner's class is swapped for a generated subclass, cached per class.

The subclass keeps the class's name and `isinstance`, adds a property in front of each adapted tensor (a class property
wins over `nn.Module.__getattr__`, while `parameters()` and `state_dict()` still see the stored base), runs the call
methods and the factored plan in `forward`, hides the slot from containers, and makes the eval mode of frozen parts
survive `train()`. It pickles and deep-copies by reference to the class it came from.
"""

from __future__ import annotations

from functools import partial
from functools import wraps as wraps_function
from typing import Any, cast

from torch import Tensor, nn

from mmpeft.adapters.forward import Op, run, stock_op
from mmpeft.adapters.freeze import set_modes
from mmpeft.adapters.slot import Slot, one_call
from mmpeft.adapters.state import SLOT
from mmpeft.errors import Unsupported

Spec = tuple[type[nn.Module], frozenset[str], bool, bool]
_GENERATED: dict[Spec, type[nn.Module]] = {}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Stock modules that read the weights of modules below them, some several times: within their call W' is formed once.
_READS_BELOW: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("self_attn", "self_attn.out_proj", "linear1", "linear2"),
}


def adapt(owner: nn.Module, tensors: frozenset[str], wraps: bool, root: bool = False) -> None:
    """Swap the class of `owner`: `tensors` get properties, `wraps` runs call methods, `root` guards `train()`."""
    cls, old_tensors, old_wraps, old_root = spec_of(type(owner))
    owner.__class__ = _generate(cls, tensors | old_tensors, wraps or old_wraps, root or old_root)


def reads_below(cls: type[nn.Module]) -> tuple[str, ...]:
    """Paths, from a module of this class, of the modules whose weights its own forward reads."""
    return next((paths for reader, paths in _READS_BELOW.items() if issubclass(cls, reader)), ())


def check_restorable(owner: nn.Module) -> None:
    """Refuse to detach from an owner whose class something else swapped again.

    Raises:
        Unsupported: after `fully_shard` or a parametrization.
    """
    if "_mmpeft_spec" not in type(owner).__dict__:
        raise Unsupported(
            f"{type(owner).__name__} was given another class after attach (fully_shard or a parametrization); "
            "detach before that"
        )


def restore(owner: nn.Module) -> None:
    """Give back the very class the owner had."""
    owner.__class__ = spec_of(type(owner))[0]
    if isinstance(owner, nn.RNNBase):
        owner._flat_weights = [owner._parameters[name] for name in owner._flat_weights_names]


def spec_of(cls: type[nn.Module]) -> Spec:
    """(original class, adapted tensors, wraps calls, is root) of a class, generated or not."""
    return cast(Spec, cls.__dict__.get("_mmpeft_spec", (cls, frozenset(), False, False)))


def _generate(cls: type[nn.Module], tensors: frozenset[str], wraps: bool, root: bool) -> type[nn.Module]:
    spec = (cls, tensors, wraps, root)
    if spec not in _GENERATED:
        _GENERATED[spec] = _make(*spec)
    return _GENERATED[spec]


def _make(cls: type[nn.Module], tensors: frozenset[str], wraps: bool, root: bool) -> type[nn.Module]:
    body: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_mmpeft_spec": (cls, tensors, wraps, root),
        "__reduce_ex__": _reduce,
    }
    for tensor in tensors:
        body[tensor] = _property(cls, tensor)
    if issubclass(cls, nn.RNNBase):
        body["_flat_weights"] = property(_flat_weights, lambda self, value: None)
    op = stock_op(cls) if "weight" in tensors else None
    if op is not None or wraps or tensors or reads_below(cls):
        body["forward"] = _forward(cls, op, wraps)
    if issubclass(cls, _CONTAINERS):
        body |= _container(cls)
    if root:
        body["train"] = _train(cls)
    return type(cls.__name__, (cls,), body)


def _property(cls: type[nn.Module], name: str) -> property:
    def stored(self: nn.Module) -> Any:
        value = self._parameters.get(name)
        if value is None:  # a parametrised tensor, or one that a weight-norm hook recomputes before each call
            inherited = getattr(cls, name, None)
            value = cast(Any, inherited).fget(self) if isinstance(inherited, property) else self.__dict__.get(name)
        return value

    def fget(self: nn.Module) -> Any:
        value = stored(self)
        slot = self._modules.get(SLOT)
        if slot is None or value is None:
            return value
        try:
            return cast(Slot, slot).effective(name, value)
        except AttributeError as error:  # Python would fall back to nn.Module.__getattr__, which answers with the base
            raise RuntimeError(f"{type(self).__name__}.{name}: {error}") from error

    def fset(self: nn.Module, value: Any) -> None:
        inherited = getattr(cls, name, None)
        if isinstance(inherited, property) and inherited.fset is not None:
            inherited.fset(self, value)
        else:
            self.__dict__[name] = value

    return property(fget, fset)


def _forward(cls: type[nn.Module], op: Op | None, wraps: bool) -> Any:
    below = reads_below(cls)

    @wraps_function(cls.forward)  # transformers reads argument names off forward
    def plain(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if op is not None and len(args) + len(kwargs) == 1 and kwargs.keys() <= {"input"} and op.fits(self):
            return run(self, op, args[0] if args else kwargs["input"])
        readable = [self, *(self.get_submodule(path) for path in below)]
        with one_call([cast(Slot, m._modules[SLOT]) for m in readable if SLOT in m._modules]):
            return cls.forward(self, *args, **kwargs)

    @wraps_function(cls.forward)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        slot = cast(Slot, self._modules[SLOT])
        return slot.around(partial(plain, self), args, kwargs)

    return wrapped if wraps else plain


def _flat_weights(self: nn.RNNBase) -> list[Tensor]:
    """The RNN's weights as its kernels want them: read through the properties, so adapted."""
    return [getattr(self, name) for name in self._flat_weights_names]


def _container(cls: type[nn.Module]) -> dict[str, Any]:
    """Overrides that hide the slot from a container's forward, iteration, length and indexing."""

    def visible(self: Any) -> dict[str, nn.Module]:
        return {name: module for name, module in self._modules.items() if name != SLOT}

    def getitem(self: Any, key: Any) -> Any:
        shadow = cls.__new__(cls)
        shadow.__dict__.update(self.__dict__)
        shadow.__dict__["_modules"] = visible(self)
        return cast(Any, cls).__getitem__(shadow, key)

    body: dict[str, Any] = {"__getitem__": getitem, "__len__": lambda self: len(visible(self))}
    if issubclass(cls, nn.ModuleDict):
        return body | {
            "__iter__": lambda self: iter(visible(self)),
            "__contains__": lambda self, key: key in visible(self),
            "keys": lambda self: visible(self).keys(),
            "items": lambda self: visible(self).items(),
            "values": lambda self: visible(self).values(),
        }
    return body | {"__iter__": lambda self: iter(visible(self).values())}


def _train(cls: type[nn.Module]) -> Any:
    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        cls.train(self, mode)
        set_modes(self, mode)
        return self

    return train


def _reduce(self: nn.Module, protocol: Any) -> Any:
    return _rebuild, spec_of(type(self)), cast(Any, self).__getstate__()


def _rebuild(cls: type[nn.Module], tensors: frozenset[str], wraps: bool, root: bool) -> nn.Module:
    made = _generate(cls, tensors, wraps, root)
    return made.__new__(made)
