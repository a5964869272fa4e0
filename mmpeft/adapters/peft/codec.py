"""What the methods have in common that PEFT puts around one module each: a `Codec` a method, and the two loops that run
it, `decode_modules` and `encode_modules`.

A codec says which modules PEFT wraps, which tensors the file has below a module's path, how they become the tensors of
this engine's method and back, and which fields of the configuration a site needs. What all codecs share is here:
finding the modules, shapes, differing fields (which become PEFT's patterns), what PEFT has no place for, options of
training that this engine lacks.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.adapters.method import Delta
from mmpeft.adapters.peft.codecs import Item, is_stock, wrapped_path
from mmpeft.adapters.peft.targets import late_pattern_value, pattern_key, pattern_value
from mmpeft.adapters.site import Layout, Site, _is_hf_conv1d
from mmpeft.errors import ConfigError

if TYPE_CHECKING:
    from mmpeft.adapters.peft.read import Reader
    from mmpeft.adapters.peft.write import Writer

log = logging.getLogger("mmpeft")

Sent = tuple[Mapping[str, Tensor], Mapping[str, Any]]  # tensors by name below the module, fields of the configuration


@dataclass(frozen=True)
class Codec:
    """One PEFT method that wraps modules.

    Args:
        kind: PEFT's name of it.
        methods: ours that are written so; the file is read as the first.
        layers: what PEFT wraps, `hf_conv1d` HF's transposed linear layer too.
        leaves: the file's parameter names, each with what follows it ("" or ".weight").
        read, write: one site, each way.
        patterns: fields of the configuration that may differ by module, and the field that says so.
        late_patterns: whether a pattern matches the ending of a path only (PEFT's older rule).
        fixed: fields of every configuration.
        dropout: the field of the dropout on the input.
        training: further options that act in training only and that nothing here repeats; they are logged and left.
        unfit: why PEFT has no adapter for a layer of these classes after all.
        differs: why PEFT's forward of a layer isn't that of the adapted weight; its files are read, none is written.
        slices: whether row slices of a fused weight can be written.
        even: makes all sites alike, where PEFT has one size for all.
    """

    kind: str
    methods: tuple[str, ...]
    layers: tuple[type[nn.Module], ...]
    leaves: Mapping[str, str]
    read: Callable[[Place], Item | None]
    write: Callable[[Source], Sent]
    hf_conv1d: bool = False
    patterns: Mapping[str, str] = field(default_factory=dict)
    late_patterns: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    dropout: str | None = None
    training: tuple[str, ...] = ()
    unfit: Callable[[nn.Module], str | None] = lambda owner: None
    differs: Callable[[nn.Module], str | None] = lambda owner: None
    slices: bool = False
    even: Callable[[dict[str, Sent], Mapping[str, Source]], None] | None = None

    def fits(self, module: nn.Module) -> bool:
        return isinstance(module, self.layers) or (self.hf_conv1d and _is_hf_conv1d(module))

    def value(self, config: Mapping[str, Any], path: str, name: str, default: Any) -> Any:
        """A field of the configuration at a path."""
        base = config.get(name, default)
        if name not in self.patterns:
            return base
        look = late_pattern_value if self.late_patterns else pattern_value
        return look(config.get(self.patterns[name]), path, base)


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """One wrapped module of a file: what a codec's `read` asks."""

    reader: Reader
    codec: Codec
    path: str
    site: Site
    owner: nn.Module

    @property
    def layout(self) -> Layout:
        assert self.site.layout is not None
        return self.site.layout

    def value(self, name: str, default: Any) -> Any:
        return self.codec.value(self.reader.config, self.path, name, default)

    def count(self, name: str, default: int) -> int:
        return self.reader.count(self.value(name, default), name)

    def number(self, name: str, default: float) -> float:
        return self.reader.number(self.value(name, default), name)

    def take(self, **shapes: tuple[int, ...]) -> list[Tensor] | None:
        """Tensors below the module, by name and shape; None where one is missing or misshapen (which is noted)."""
        key = wrapped_path(self.path, self.reader.wrappers)
        found = [self.reader.take(f"{key}.{n}{self.codec.leaves[n]}", s) for n, s in shapes.items()]
        return None if any(t is None for t in found) else [t for t in found if t is not None]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that a tensor has in the file; () where it is missing."""
        key = f"{wrapped_path(self.path, self.reader.wrappers)}.{name}{self.codec.leaves[name]}"
        found = self.reader.left.get(key)
        return () if found is None else tuple(found.shape)

    def dropout(self) -> float:
        return self.reader.dropout(self.owner, "weight", self.codec.dropout) if self.codec.dropout else 0.0

    def refuse(self, reason: str) -> None:
        self.reader.refused.append(f"{self.path}: {reason}")


def decode_modules(reader: Reader, codec: Codec) -> list[Item]:
    """All sites of an adapter."""
    config = reader.config
    for option in codec.training:
        if config.get(option):
            log.warning("%s: %s=%r acts in training only and is left out here", reader.source, option, config[option])
    targets = reader.targets(codec.fits, codec.kind)
    reader.wrappers |= dict.fromkeys(targets, 1)
    found = []
    for path in targets:
        site, owner = reader.site(path, "weight"), reader.modules[path]
        if site is None or not reader.alone(site):
            continue
        place = Place(reader, codec, path, site, owner)
        if (reason := codec.unfit(owner)) is not None:
            place.refuse(reason)
            continue
        try:
            item = codec.read(place)
            if item is not None:
                item.method.check(item.site)
                found.append(item)
        except ConfigError as error:  # PEFT allows values that the method here refuses, such as ranks above full rank
            place.refuse(str(error))
    return found


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """One adapted module on its way out: its deltas (one, or one a row slice), and the site of the whole weight."""

    codec: Codec
    path: str
    site: Site
    owner: nn.Module
    deltas: Sequence[Delta]

    @property
    def delta(self) -> Delta:
        return self.deltas[0]

    @property
    def method(self) -> Any:
        return self.deltas[0].method

    @property
    def out(self) -> int:
        return self.site.shape[-2]

    @property
    def layout(self) -> Layout:
        assert self.site.layout is not None
        return self.site.layout

    def joined(self, down: str, up: str) -> tuple[Tensor, Tensor]:
        """A pair for the whole weight: the slices' A stacked, their B side by side with zeros in the other rows."""
        A = torch.cat([d._parameters[down].detach() for d in self.deltas], -2)  # type: ignore[union-attr]
        B = [self.padded(d, d._parameters[up].detach()) for d in self.deltas]  # type: ignore[union-attr]
        return A, torch.cat(B, -1)

    def padded(self, delta: Delta, rows: Tensor) -> Tensor:
        """A slice's rows [*, n, r] with zeros for the others."""
        begin, stop = delta.site.rows or (0, self.out)
        return F.pad(rows, (0, 0, begin, self.out - stop))


def encode_modules(writer: Writer, codec: Codec) -> dict[str, Any]:
    """The configuration of an adapter; its tensors go to the writer."""
    sent: dict[str, Sent] = {}
    sources: dict[str, Source] = {}
    for (path, tensor), deltas in writer.sites.items():
        owner = writer.owner(path)
        reason = _no_place(codec, writer, path, tensor, deltas)
        if reason is None:
            try:
                sources[path] = Source(codec, path, writer.site(path, tensor), owner, deltas)
                sent[path] = codec.write(sources[path])
            except ConfigError as error:
                reason = str(error)
        if reason is not None:
            writer.refused.append(f"{deltas[0].site.name}: {reason}")
    if codec.even is not None and sent:
        codec.even(sent, sources)
    writer.targets = dict.fromkeys(sent)
    writer.wrappers = dict.fromkeys(sent, 1)
    for path, (tensors, _) in sent.items():
        key = wrapped_path(path, writer.wrappers)
        writer.tensors |= {f"{key}.{name}{codec.leaves[name]}": t for name, t in tensors.items()}
    config = _fields(writer, codec, {path: fields for path, (_, fields) in sent.items()})
    if codec.hf_conv1d:
        config["fan_in_fan_out"] = writer.transposed(sent)
    _say_dropout(writer, codec, config)
    return {
        "peft_type": codec.kind,
        **codec.fixed,
        **config,
        "target_modules": [path for path in writer.modules if path in sent],
    }


def _no_place(codec: Codec, writer: Writer, path: str, tensor: str, deltas: Sequence[Delta]) -> str | None:
    """Why PEFT cannot hold these deltas, or None."""
    owner = writer.owner(path)
    what = codec.kind
    if not path:
        return "PEFT cannot wrap the root module"
    if isinstance(writer.owner(path.rpartition(".")[0]), nn.MultiheadAttention):
        return "nn.MultiheadAttention reads out_proj's weight, where PEFT's wrapper has no effect"
    if tensor != "weight" or not codec.fits(owner) or not is_stock(owner):
        return f"PEFT has no {what} for a {type(owner).__name__}"
    if deltas[0].site.rows is not None and not codec.slices:
        return f"PEFT has no {what} for a slice of a weight"
    return codec.unfit(owner) or codec.differs(owner)


def _fields(writer: Writer, codec: Codec, needs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One configuration for what every site needs: the commonest value of each field, the others as patterns."""
    config: dict[str, Any] = {}
    for name in dict.fromkeys(n for fields in needs.values() for n in fields):
        values = {path: fields[name] for path, fields in needs.items()}
        common, _ = Counter(values.values()).most_common(1)[0]
        config[name] = common
        others = {path: value for path, value in values.items() if value != common}
        if others and name in codec.patterns:
            keys = {p: p if codec.late_patterns else pattern_key(p, values) for p in others}
            config[codec.patterns[name]] = {keys[path]: value for path, value in others.items()}
            others = {p: v for p, v in values.items() if codec.value(config, p, name, common) != v}
        if others:
            path, value = next(iter(others.items()))
            usual = next(p for p, v in values.items() if v == common)
            writer.refused.append(
                f"{path}: PEFT has one {name} for all of an adapter's modules; {value} here, {common} at {usual}"
            )
    return config


def _say_dropout(writer: Writer, codec: Codec, config: dict[str, Any]) -> None:
    """Dropout on the input, which is training's alone: one value, and none where the sites differ."""
    drops = {float(getattr(d.method, "dropout", 0.0)) for deltas in writer.sites.values() for d in deltas}
    if codec.dropout:
        config[codec.dropout] = drops.pop() if len(drops) == 1 else 0.0
    elif drops - {0.0}:
        log.warning("PEFT's %s has no dropout on its input; it is left out of the export", codec.kind)


def widen(rank: int, *pairs: tuple[Tensor, int]) -> list[Tensor]:
    """Tensors with zeros up to `rank` along an axis each."""
    wider = []
    for t, axis in pairs:
        shape = list(t.shape)
        shape[axis] = rank - shape[axis]
        wider.append(torch.cat([t, t.new_zeros(shape)], axis))
    return wider


def blocks_of_one_kind(sent: dict[str, Sent], size: str, count: str, side: Callable[[str], int]) -> None:
    """PEFT wants one block size for all modules, or one number of blocks: where sizes differ, the number."""
    numbers = {path: side(path) // fields[size] for path, (_, fields) in sent.items()}
    if len({fields[size] for _, fields in sent.values()}) > 1 and len(set(numbers.values())) == 1:
        for path, (tensors, fields) in sent.items():
            sent[path] = tensors, {**fields, size: 0, count: numbers[path]}
