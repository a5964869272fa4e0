"""What a method is: a config dataclass, an init and its maths; and `Delta`, the module that holds its tensors.

A method is one of three shapes (the engine does everything else: calls, row slices, dropout, mixing, merging, files):

    weight   `weight(W, p) -> W'` on a matrix view `[*, out, in]` (or on a vector, `space = "vector"`), and, where the
             update has the form  W' = diag(row) (W diag(col) + scale * B A),  `factors(W, p) -> Factors`
    call     `around(p, call, *args, **kwargs)`: a function around a frozen call
    tokens   a call method whose `around` inserts tokens and drops them again (see `tokens.py`)

`p` is the site's `Delta`: `p.A` is the tensor that `init` returned under the name "A".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mmpeft.adapters.site import Site, matrix_tensors, own_tensors, read_shape
from mmpeft.errors import ConfigError, NameNotFound, Unsupported, nearest

REGISTRY: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class Factors:
    """W' = diag(row) (W diag(col) + scale * B A); A [r, in], B [out, r], row [out], col [in]; absent parts are None."""

    A: Tensor | None = None
    B: Tensor | None = None
    scale: float = 1.0
    row: Tensor | None = None
    col: Tensor | None = None

    @property
    def additive(self) -> bool:
        """Whether the update is W plus something that does not depend on W (then adapters add up)."""
        return self.row is None and self.col is None


@dataclass(frozen=True)
class Tensors:
    """What `init` returns: trained tensors, frozen ones saved with them, frozen ones made again from the config, and
    plain facts about the site that the maths needs (`p.facts`)."""

    trained: Mapping[str, Tensor]
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    derived: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What `init` may look at beside its own site."""

    root: nn.Module
    module: nn.Module  # the owner
    shared: dict[Any, Any]  # one per adapter: tensors that several sites share (VeRA's projections)
    sites: tuple[Site, ...]  # all sites of the same rule


class Method:
    """Base class. A subclass is a frozen dataclass; its fields carry the paper's own names."""

    name: ClassVar[str]
    kind: ClassVar[str] = "weight"
    space: ClassVar[str] = "matrix"  # weight methods: "matrix" | "vector" | "any"
    identity_at_init: ClassVar[bool] = True
    mixes: ClassVar[bool] = True  # may different rows of a batch use different adapters of it
    beside: ClassVar[tuple[str, ...]] = ()  # what has to run beside the optimizer, one of these, to make it what it is
    dropout: float = (
        0.0  # a field of the methods that have one; a weight method's acts on the site's input, in training
    )

    def __init_subclass__(cls, *, name: str | None = None, aliases: Iterable[str] = (), **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is None:
            return
        cls.name = name
        for key in (cls.__name__, name, *aliases):
            if REGISTRY.get(key.lower(), cls).__qualname__ != cls.__qualname__:
                raise ConfigError(f"method name {key!r} is taken by {REGISTRY[key.lower()].__name__}")
            REGISTRY[key.lower()] = cls

    # --- where it attaches -------------------------------------------------------------------------------------------

    def tensors(self, path: str, module: nn.Module) -> list[str]:
        """Names of the owner's tensors this method adapts when a pattern matches the module `path`."""
        return matrix_tensors(module) if self.kind == "weight" else [""]

    def owners(self, path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """Call methods: the modules to wrap when a pattern matches `path` (a token method wraps a stack's blocks)."""
        return [(path, module)]

    def check(self, site: Site) -> None:
        """Refuse a site this configuration cannot work on (rank larger than the matrix, ...)."""

    # --- maths -------------------------------------------------------------------------------------------------------

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        """The site's tensors. `base` is the site's `[*, out, in]` view (None for call methods); never written to."""
        raise Unsupported(f"{type(self).__name__} defines no init")

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        """The adapted weight `[*, out, in]`. The default follows from `factors`."""
        f = self.factors(W, p)
        if f is None:
            raise Unsupported(f"{type(self).__name__} defines neither weight nor factors")
        out = W if f.col is None else W * f.col
        if f.A is not None and f.B is not None:
            out = out + f.scale * (f.B @ f.A)
        return out if f.row is None else out * f.row.unsqueeze(-1)

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        """The update as data, where it has the factored form; None otherwise."""
        return None

    def around(self, p: Delta, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call methods: the adapted call."""
        raise Unsupported(f"{type(self).__name__} is not a call method")

    # --- bookkeeping -------------------------------------------------------------------------------------------------

    def lr_ratio_of(self, parameter: str) -> float:
        """Factor on the rule's learning rate for one of the method's tensors (LoRA+ trains B faster)."""
        return 1.0

    def flops(self, site: Site, tensors: Mapping[str, Tensor]) -> int:
        """Forward FLOPs the adapter adds for one row (token) of input; default 2 per trained number."""
        return 2 * sum(t.numel() for t in tensors.values())

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data; `Method.from_dict` reads it back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {"method": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def method_from(value: Any) -> Method:
    """A method from an instance, a name ('LoRA'), `{"LoRA": {"rank": 8}}`, `{"method": "lora", "rank": 8}`, or
    the CLI's `{"class_path": "mmpeft.LoRA", "init_args": {...}}`.

    Raises:
        NameNotFound: unknown method, with the nearest names.
        ConfigError: unknown or invalid fields.
    """
    if isinstance(value, Method):
        return value
    if isinstance(value, str):
        return _make(value, {})
    if isinstance(value, Mapping):
        given = dict(value)
        if "class_path" in given:
            return _make(str(given["class_path"]).rpartition(".")[2], given.get("init_args") or {})
        if "method" in given:
            return _make(str(given.pop("method")), given)
        if len(given) == 1:
            ((key, args),) = given.items()
            return _make(str(key), args or {})
    raise ConfigError(f"{value!r} is no method; expected e.g. LoRA(rank=8), 'LoRA' or {{'LoRA': {{'rank': 8}}}}")


def _make(name: str, args: Mapping[str, Any]) -> Method:
    cls = REGISTRY.get(name.lower())
    if cls is None:
        names = sorted({c.__name__ for c in REGISTRY.values()})
        close = nearest(name.lower(), [n.lower() for n in names])
        raise NameNotFound(f"unknown method {name!r}{close}; known: {', '.join(names)}")
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    for key in args:
        if key not in known:
            raise ConfigError(
                f"{cls.__name__} has no field {key!r}{nearest(key, known)}; it has {', '.join(sorted(known))}"
            )
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in args.items()})


class Delta(nn.Module):
    """The tensors of one method at one site. fp32 (or wider) whatever precision the model around it is cast to."""

    def __init__(self, method: Method, site: Site, tensors: Tensors, rule: int) -> None:
        super().__init__()
        self.method = method
        self.site = site
        self.rule = rule  # index into the adapter's plan
        self.saved = (*tensors.trained, *tensors.frozen)
        self.trained = tuple(tensors.trained)
        self.facts = dict(tensors.facts)
        for name, tensor in {**tensors.trained, **tensors.frozen, **tensors.derived}.items():
            # A Parameter is shared with another site (VeRA's projections, IA3's gain) and keeps its own flag.
            own = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, name in tensors.trained)
            self.register_parameter(name, own)

    if TYPE_CHECKING:  # tensors are read as attributes, `p.A`

        def __getattr__(self, name: str) -> Any: ...

    def extra_repr(self) -> str:
        return f"{self.method} at {self.site.name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Delta:
        def keep_wide(t: Tensor) -> Tensor:
            # `model.bfloat16()` and Lightning's bf16-true cast every parameter; a rounded adapter cannot be restored,
            # so ask what the cast would do to an empty tensor and follow it in device only.
            if t.is_floating_point():
                probe = fn(torch.empty(0, dtype=t.dtype, device=t.device))
                if torch.finfo(probe.dtype).bits < 32:
                    return t.to(probe.device)
            return fn(t)

        super()._apply(keep_wide, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # A base checkpoint knows nothing of adapters and must still load strictly; one that holds some of this site's
        # tensors is checked as usual.
        if any(prefix + name in state_dict for name in self._parameters):
            super()._load_from_state_dict(state_dict, prefix, *args)

    def state_to_save(self) -> dict[str, Tensor]:
        """Tensors that go into the adapter file."""
        return {name: self._parameters[name].detach() for name in self.saved}  # type: ignore[union-attr]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of an adapter on a base of `dtype`: at least fp32."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32


def zeros(*shape: int, like: Tensor) -> Tensor:
    """A zero tensor for a trained parameter beside `like`."""
    return torch.zeros(*shape, dtype=wide(like.dtype), device=like.device)


def check_rank(rank: int, site: Site) -> None:
    """Refuse rank 0 and ranks above the matrix's smaller side (a rank that large is `full`)."""
    most = min(site.shape[-2:])
    if not 1 <= rank <= most:
        raise ConfigError(f"rank {rank} at {site.name} of shape {tuple(site.shape)}; expected 1 to {most}")


def vector_tensors(module: nn.Module, names: Iterable[str]) -> list[str]:
    """The module's own one-dimensional parameters among `names` (by exact name or `*bias` ending)."""
    wanted = tuple(names)
    return [t for t in own_tensors(module) if t.endswith(wanted) and len(read_shape(module, t)) == 1]
