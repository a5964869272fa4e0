"""Published Q-Former weights into a `QFormer`: transformers' (Blip2*, InstructBlip*) and LAVIS' names, by one table.

The transformer itself must be complete and of equal shape, or nothing is changed. Queries, `ln_vision`, and the
projection are taken when the source has them (a bare `Blip2QFormerModel` has none of the three); a projection made for
another LLM's width is left out. What was loaded, kept and not used is returned, and what was kept is logged.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mmpeft.connectors.published import open_tensors, require_finite_and_shaped
from mmpeft.connectors.qformer import QFormer
from mmpeft.errors import ConfigError, FileFormatError

log = logging.getLogger(__name__)

# Own part of a layer -> published part. `{self}` is "attention" in transformers and "self" in LAVIS.
LAYER_PARTS = {
    "attention.query": "attention.{self}.query",
    "attention.key": "attention.{self}.key",
    "attention.value": "attention.{self}.value",
    "attention.dense": "attention.output.dense",
    "attention.norm": "attention.output.LayerNorm",
    "cross_attention.query": "crossattention.{self}.query",
    "cross_attention.key": "crossattention.{self}.key",
    "cross_attention.value": "crossattention.{self}.value",
    "cross_attention.dense": "crossattention.output.dense",
    "cross_attention.norm": "crossattention.output.LayerNorm",
    "query_ffn.up": "intermediate_query.dense",
    "query_ffn.down": "output_query.dense",
    "query_ffn.norm": "output_query.LayerNorm",
    "text_ffn.up": "intermediate.dense",
    "text_ffn.down": "output.dense",
    "text_ffn.norm": "output.LayerNorm",
}


@dataclass(frozen=True)
class Layout:
    """How one project names a Q-Former: where the BERT lives, its attention's name, and the names around it."""

    prefix: str
    attention: str
    names: Mapping[str, tuple[str, ...]]  # own name -> candidates, first present wins


def _names(
    bert: str, norms: tuple[str, ...], ln_vision: str, projections: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    table = {
        "core.norm": tuple(bert + norm for norm in norms),
        "core.text.word": (f"{bert}embeddings.word_embeddings", "embeddings.word_embeddings"),
        "core.text.position": (f"{bert}embeddings.position_embeddings", "embeddings.position_embeddings"),
        "ln_vision": (ln_vision,),
        "project": projections,
    }
    names = {f"{k}.{p}": tuple(f"{v}.{p}" for v in found) for k, found in table.items() for p in ("weight", "bias")}
    return names | {"queries": ("query_tokens",)}


_HF_NORMS = ("layernorm", "embeddings.layernorm")  # BLIP-2, InstructBLIP
LAYOUTS = (
    Layout(
        "Qformer.bert.", "self",
        _names("Qformer.bert.", ("embeddings.LayerNorm",), "ln_vision", ("opt_proj", "t5_proj", "llm_proj")),
    ),
    Layout(
        "qformer.", "attention",
        _names("qformer.", _HF_NORMS, "vision_model.post_layernorm", ("language_projection",)),
    ),
    Layout(
        "", "attention",
        _names("", _HF_NORMS, "vision_model.post_layernorm", ("language_projection",)),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class LoadReport:
    """Own parameter names that were loaded, that kept their initial values, and source names that were not used."""

    loaded: tuple[str, ...]
    kept: tuple[str, ...]
    unused: tuple[str, ...]


def load_qformer(connector: QFormer, source: str | Path | Mapping[str, Tensor]) -> LoadReport:
    """Load published weights into a `connector` that has its parameters.

    Args:
        source: a folder or file (`.safetensors`, sharded or not, `.bin`, `.pth`, `.pt`), or a state dict, of
            transformers' Blip2QFormerModel / Blip2ForConditionalGeneration / InstructBlip models, or of LAVIS.

    Raises:
        ConfigError: the connector is not built.
        NameNotFound: no such file, or no weights in the folder.
        FileFormatError: no Q-Former inside, or its tensors are missing, of other shapes, or not finite.
    """
    if not hasattr(connector, "core"):
        raise ConfigError("build the QFormer before loading weights into it")
    keys, read, origin = open_tensors(source)
    layout = _find_layout(keys, origin)
    own = connector.state_dict()
    available = set(keys)
    found = {name: key for name in own if (key := _source_key(name, layout, available)) is not None}
    missing = [name for name in own if name.startswith("core.") and name not in found]
    if missing:
        raise FileFormatError(
            f"{origin} lacks {len(missing)} tensors of this Q-Former, first {missing[0]!r}: "
            f"does it have {connector.depth} layers, and a text branch only if text_vocab is set?"
        )
    extra = _extra_layers(keys, layout, connector.depth)
    if extra:
        raise FileFormatError(f"{origin} has layer {extra[-1]}, this Q-Former only depth={connector.depth}")
    tensors = {name: read(key) for name, key in found.items()}
    _check(tensors, own, origin)
    kept = tuple(sorted(set(own) - set(tensors)))
    if kept:
        log.warning("%s: loaded %d tensors; initial values kept for %s", origin, len(tensors), ", ".join(kept))
    connector.load_state_dict(tensors, strict=False)
    used = {found[name] for name in tensors}
    return LoadReport(tuple(sorted(tensors)), kept, tuple(sorted(available - used)))


def _find_layout(keys: list[str], origin: str) -> Layout:
    present = set(keys)
    for layout in LAYOUTS:
        if f"{layout.prefix}encoder.layer.0.crossattention.{layout.attention}.query.weight" in present:
            return layout
    raise FileFormatError(f"{origin} holds no Q-Former ({len(keys)} tensors, e.g. {', '.join(sorted(keys)[:3])})")


def _source_key(name: str, layout: Layout, available: set[str]) -> str | None:
    """Published name of own parameter `name`, or None when the source does not have it."""
    layer = re.fullmatch(r"core\.layers\.(\d+)\.(\w+\.\w+)\.(weight|bias)", name)
    if layer:
        index, part, kind = layer.groups()
        published = LAYER_PARTS[part].replace("{self}", layout.attention)
        candidates: tuple[str, ...] = (f"{layout.prefix}encoder.layer.{index}.{published}.{kind}",)
    else:
        candidates = layout.names.get(name, ())
    return next((key for key in candidates if key in available), None)


def _extra_layers(keys: list[str], layout: Layout, depth: int) -> list[int]:
    pattern = re.compile(re.escape(layout.prefix) + r"encoder\.layer\.(\d+)\.")
    return sorted({int(m[1]) for key in keys if (m := pattern.match(key)) and int(m[1]) >= depth})


def _check(tensors: dict[str, Tensor], own: Mapping[str, Tensor], origin: str) -> None:
    """Refuse wrong shapes and non-finite values; drop a projection made for another LLM."""
    if "project.weight" in tensors and tensors["project.weight"].shape[0] != own["project.weight"].shape[0]:
        for name in ("project.weight", "project.bias"):
            tensors.pop(name, None)
    require_finite_and_shaped(tensors, own, origin)
