"""Llama-type decoders on the fused blocks of `mmpeft.kernels`, and the loss of their language models without logits.

The fused blocks compute causal attention over rows, or over packed documents in them (positions that begin again at 0,
which is how transformers is told), with one adapter, or without gradients with stacked ones, a row of the batch its own
(`rows.py`). So each call is looked at: another active set, a padding on the left, a key/value cache or a request for
attentions go to the module's own forward (`part.py`).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.compiled.few_bits import schemes, storage
from mmpeft.adapters.compiled.graphs import Graphed
from mmpeft.adapters.compiled.part import FusedPart, stored
from mmpeft.adapters.compiled.route import Route
from mmpeft.adapters.compiled.rows import StackedRows
from mmpeft.adapters.state import slots
from mmpeft.errors import ConfigError, Unsupported
from mmpeft.kernels import attention, fuse
from mmpeft.kernels.cross_entropy import linear_cross_entropy
from mmpeft.kernels.documents import Documents

if TYPE_CHECKING:
    from mmpeft.adapters.compiled.model import Compiled

PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")
PACKED = {"varlen": "varlen flash attention", "masked": "a block-diagonal mask"}
IGNORED = ("return_dict", "num_items_in_batch")  # say nothing about what a decoder computes


def decoders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of everything with the parts of a Llama-type decoder."""
    for path, module in model.named_modules():
        if all(hasattr(module, name) for name in PARTS):
            yield path, module


def language_models(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, module) of causal language models around such a decoder."""
    inner = {id(m) for _, m in decoders(model)}
    for path, module in model.named_modules():
        if id(module) not in inner and hasattr(module, "get_output_embeddings"):
            if any(id(child) in inner for child in module.children()):
                yield path, module


class FusedDecoder(FusedPart):
    """One decoder on the fused blocks, and the choice made at each call."""

    dora = few_bits = stacks = True

    def __init__(self, model: nn.Module, path: str, decoder: Any, *, check: bool, graphs: bool = False) -> None:
        super().__init__(model, path, decoder, around=("embed_tokens",))
        found = self.sites(self.bound)
        if sliced := [f"{place}[{rows}]" for place, rows in found if rows is not None]:
            raise Unsupported(f"an adapter on a slice of rows, {sliced[0]}")
        lm = next((lm for _, lm in language_models(model) if any(m is decoder for m in lm.children())), decoder)
        # adapters on head or embedding act as modules do; the written-out step reads the two weights as they are
        self.whole = lm is not decoder and all(".layers." in f".{n}" for n, _, s in slots(lm) if list(s.deltas()))
        owner = lm if self.whole else decoder
        prefix = next((f"{n}." for n, m in owner.named_modules() if m is decoder and n), "")
        adapters = {f"{prefix}{site}": low_rank for (site, _), (low_rank, _) in found.items()}
        with self.alone():
            fused = fuse.from_model(owner, adapters, attached=True, check=check, others=self.others, storage=storage)
        self.arguments, self.packed = _names(decoder), 0  # `packed` counts fused calls on packed documents
        self.bases = _versions(fused, decoder)
        self.rows: StackedRows | tuple[int, Unsupported] | None = None  # or why not, and for which stacks
        self.rows_graphed = Graphed(fused.last_states) if graphs else None
        self.start(fused, [g for block in fused.blocks for g in block.groups()], graphs=graphs)

    def __call__(self, route: Route, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        decoder: Any = self.module
        x = given.get("inputs_embeds")
        indexed = self.state is not None and bool(self.state.indexed)
        try:
            rows = (given["input_ids"] if x is None else x).shape[:2]
            if indexed:
                stacked, index = self.stacked(x, self.why_not(given), rows[0])
            else:
                fused = self.current(self.name_of(x, self.why_not(given)))
            documents = _documents(rows, given.get("attention_mask"), given.get("position_ids"))
        except Unsupported as why:
            self.own(why)
            return route.plain(*args, **kwargs)
        x = decoder.embed_tokens(given["input_ids"]) if x is None else x
        self.packed += documents is not None
        if indexed:
            self.calls["fused"] += 1
            run = self.fused.last_states if self.rows_graphed is None else self.rows_graphed
            y = run(x, documents, index, stacked.stacks)
        else:
            y = self.states(fused, x, documents)
        return _outputs().BaseModelOutputWithPast(last_hidden_state=y)

    def stacked(self, x: Tensor | None, more: Mapping[str, object], samples: int) -> tuple[StackedRows, Tensor]:
        """The stacked adapters and the index of each sample's, for a call without gradients.

        Raises:
            Unsupported: the call is for the module's own forward; the message says why.
        """
        assert self.state is not None
        state = self.state
        reasons = {
            "stacked adapters with gradients": torch.is_grad_enabled(),
            "stacked adapters beside merged ones, or bare": state.bare or state.merged,
            "rows of the batch are run apart": state.override is not None,
        }
        self.refuse(x, reasons | dict(more))
        found = self.stack_now()
        return found, found.index(state, samples)

    def stack_now(self) -> StackedRows:
        """Compute copies of the stacked adapters as `use` left them."""
        assert self.state is not None
        found, generation = self.rows, self.state.generation
        if isinstance(found, tuple) and found[0] == generation:
            raise found[1]
        if not isinstance(found, StackedRows) or found.generation != generation:
            self.rows = found = None  # frees the old ones first, with the graphs that read them
            if self.rows_graphed is not None:
                self.rows_graphed.captures.clear()
            try:
                self.rows = found = StackedRows(self, self.fused.blocks)
            except Unsupported as why:
                self.rows = (generation, why)
                raise
        found.refresh(self.state.restacked, self.mark_now())
        return found

    def prepare(self) -> None:
        """As there; of stacked adapters all that changed."""
        if self.state is None or not self.state.indexed:
            return super().prepare()
        with suppress(Unsupported):  # their own forward is captured then
            self.stack_now()

    def current(self, name: str | None = None) -> Any:
        """As `FusedPart.current`; with DoRA, a base that was written to since has other norms."""
        fused = super().current(name)
        bases = _versions(fused, self.module)
        if bases != self.bases:
            fused.rescale(squares=True)
            self.bases = bases
        return fused

    @property
    def packing(self) -> str:
        """How packed documents attend."""
        return PACKED[attention.packed_kind(self.fused.embedding.new_empty(2 * self.fused.inv_freq.numel()))]

    def why_not(self, given: Mapping[str, Any]) -> dict[str, object]:
        """Reasons for the module's own forward in what it was called with, and whether they hold."""
        decoder: Any = self.module
        used = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", *IGNORED}
        asked = [k for k, v in given.items() if k not in used and v is not None and v is not False]
        cached = given.get("use_cache")
        cached = getattr(decoder.config, "use_cache", False) if cached is None else cached
        return {
            f"called with {', '.join(sorted(asked))}": asked,
            "a key/value cache is asked for": cached and not torch.is_grad_enabled(),
        }


def _versions(fused: Any, decoder: nn.Module) -> list[int]:
    """Versions of the base weights whose norms DoRA keeps; none without it."""
    layers: Any = decoder.get_submodule("layers")
    return [stored(m)._version for m in layers.modules() if isinstance(m, nn.Linear)] if fused.scaled else []


def _documents(rows: tuple[int, int], mask: Tensor | None, positions: Tensor | None) -> Documents | None:
    """The documents that a mask and positions [B, T] of a call mean; None for whole rows, which may be padded on the
    right. As in transformers, positions make documents only where no mask is given.

    Raises:
        Unsupported: they mean something else, which the message names.
    """
    if mask is not None:
        if mask.ndim != 2:
            raise Unsupported("an attention mask of more than [B, T]")
        if bool((mask[:, 1:] > mask[:, :-1]).any()) or not bool(mask[:, 0].all()):
            raise Unsupported("padding on the left")
    if positions is None:
        return None
    plain = torch.arange(positions.shape[-1], device=positions.device)
    known = plain if mask is None else torch.minimum(plain, (mask.long().sum(1, keepdim=True) - 1).clamp_min(0))
    if bool(((positions == plain) | (positions == known)).all()):
        return None
    if mask is not None:
        raise Unsupported("positions that do not count from 0, beside a mask")
    try:
        return Documents.of_positions(positions.expand(rows))
    except (ConfigError, RuntimeError):
        raise Unsupported("positions that do neither count from 0 nor begin again at 0 (packed documents)") from None


def _names(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional arguments of a module's forward."""
    forward: Any = type(module).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return tuple(forward.__code__.co_varnames[1 : forward.__code__.co_argcount])


def _outputs() -> Any:
    return importlib.import_module("transformers.modeling_outputs")


def apply(model: nn.Module, compiled: Compiled, *, check: bool, graphs: bool) -> None:
    """Every decoder of the model onto the fused blocks."""
    found = list(decoders(model))
    if not found:
        raise Unsupported("no module with embed_tokens, layers, norm and rotary_emb: no Llama-type decoder")
    for path, decoder in found:
        part = f"decoder {path or type(decoder).__name__}"
        try:
            fused = FusedDecoder(model, path, decoder, check=check, graphs=graphs)
        except Unsupported as error:
            compiled.skip(part, str(error))
            continue
        compiled.decoders.append(fused)
        kept = schemes(list(decoder.get_submodule("layers").parameters()))
        dora = " with DoRA's factors in them" if fused.fused.scaled else ""
        how = f"{len(fused.fused.blocks)} fused blocks{dora}, adapter {fused.bound!r}, "
        how += "Triton kernels" if fused.fused.embedding.is_cuda else "plain-torch references (no GPU)"
        how += f", {kept} weights made dense a group at a time" if kept else ""
        how += f", packed documents through {fused.packing}"
        how += "; CUDA graphs without gradients" if graphs else ""
        compiled.add(part, how, fused.remove)


class HeadlessLoss:
    """A causal language model called with labels: its decoder, then the head at supervised positions, no logits kept."""

    def __init__(self, lm: Any, *, check: bool) -> None:
        self.lm = lm
        self.decoder = next(m for m in lm.children() if all(hasattr(m, name) for name in PARTS))
        if check:
            self._prove()
        self.arguments = _names(lm)
        self.route = Route(lm, self)

    def loss(self, given: Mapping[str, Any]) -> Tensor:
        """Mean (or sum over `num_items_in_batch`) cross-entropy of the next token."""
        inner = {k: v for k, v in given.items() if k not in ("labels", "logits_to_keep", "num_items_in_batch")}
        hidden = self.decoder(**inner | {"use_cache": False})[0]
        head = self.lm.get_output_embeddings()
        labels = given["labels"][:, 1:].reshape(-1)
        states = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        total = given.get("num_items_in_batch")
        loss = linear_cross_entropy(
            states, head.weight, labels, bias=getattr(head, "bias", None), reduction="mean" if total is None else "sum"
        )
        return loss if total is None else loss / total

    def __call__(self, route: Route, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        given = {k: v for k, v in given.items() if v is not None}
        wants_more = given.get("output_hidden_states") or given.get("output_attentions") or given.get("cache")
        wants_more = wants_more or given.get("past_key_values") or given.get("return_dict") is False
        if "labels" not in given or not torch.is_grad_enabled() or wants_more:
            return route.plain(*args, **kwargs)
        return _outputs().CausalLMOutputWithPast(loss=self.loss(given), logits=None)

    @torch.no_grad()
    def _prove(self) -> None:
        device, V = self.lm.get_input_embeddings().weight.device, self.lm.get_output_embeddings().weight.shape[0]
        ids = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(0)).to(device)
        labels = ids.masked_fill(torch.arange(9, device=device) < 3, -100)
        own = float(self.lm(input_ids=ids, labels=labels, use_cache=False).loss)
        ours = float(self.loss({"input_ids": ids, "labels": labels}))
        close = 1e-2 if self.lm.get_output_embeddings().weight.element_size() < 4 else 1e-4
        if not abs(ours - own) <= close * abs(own):
            raise Unsupported(f"its loss is {own:.5f} and head plus cross-entropy give {ours:.5f}: it does more")


def apply_loss(model: nn.Module, compiled: Compiled, *, check: bool) -> None:
    """Every causal language model's loss without logits."""
    found = list(language_models(model))
    if not found:
        raise Unsupported("no causal language model with a head")
    for path, lm in found:
        part = f"loss {path or type(lm).__name__}"
        try:
            route = HeadlessLoss(lm, check=check).route
        except Unsupported as error:
            compiled.skip(part, str(error))
            continue
        compiled.add(part, "cross-entropy at supervised positions only; with labels its output has no logits", route.remove)
