"""Texts to tokens: transformers' text models (MiniLM, RoBERTa, a T5 encoder, a decoder) and open_clip's text towers."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.encoders.base import Encoder, freeze, resolve_layer
from mmpeft.encoders.hf import cut_blocks, load_backbone, loading, locate, output_of
from mmpeft.encoders.hub import reading
from mmpeft.encoders.image_open_clip import build
from mmpeft.encoders.names import Name
from mmpeft.encoders.options import TextOptions
from mmpeft.encoders.packages import find_package
from mmpeft.errors import BadSample, ConfigError, Unsupported, require


@dataclass(frozen=True)
class TextPreprocess:
    """A text to its token ids [T], special tokens included; picklable.

    Args:
        tokenizer: a transformers tokenizer.
        limit: the most ids that the model takes.
        truncate: cut longer texts (asked for by max_length) instead of refusing them.
        random: never; texts are not augmented.
    """

    tokenizer: Any
    limit: int
    truncate: bool = False
    random: bool = False

    @property
    def signature(self) -> str:
        return f"{type(self.tokenizer).__name__} limit={self.limit} truncate={self.truncate}"

    def __call__(self, raw: Any) -> Tensor:
        if not isinstance(raw, str) or not raw.strip():
            raise BadSample(f"a text encoder reads a non-empty text, not {raw!r}")
        ids = self.tokenizer(raw, truncation=self.truncate, max_length=self.limit if self.truncate else None)[
            "input_ids"
        ]
        if len(ids) > self.limit:
            raise BadSample(
                f"a text of {len(ids)} tokens is longer than {self.limit}: {raw[:40]!r}...; max_length= cuts it"
            )
        return torch.tensor(ids, dtype=torch.long)


@dataclass(frozen=True)
class OpenClipTextPreprocess:
    """A text to the ids [T] of an open_clip tokenizer; what follows the end-of-text token is left out if `end` is given."""

    tokenizer: Any
    end: int | None
    random: bool = False

    @property
    def signature(self) -> str:
        return f"{type(self.tokenizer).__name__} end={self.end}"

    def __call__(self, raw: Any) -> Tensor:
        if not isinstance(raw, str) or not raw.strip():
            raise BadSample(f"a text encoder reads a non-empty text, not {raw!r}")
        ids: Tensor = self.tokenizer([raw])[0]
        if self.end is None:
            return ids
        return ids[: int((ids == self.end).int().argmax()) + 1]


class TextEncoder(Encoder):
    """A text backbone as tokens [B, T, d_v], one for each id."""

    modality = "text"
    preprocess: Any

    def __init__(
        self, backbone: nn.Module, *, name: str, dim: int, preprocess: Any, num_layers: int, layer: int, limit: int
    ) -> None:
        super().__init__(backbone, name=name, dim=dim, preprocess=preprocess)
        self.index = resolve_layer(name, layer, num_layers)
        self.last = self.index == num_layers - 1
        self.limit = limit
        self.prepare(num_layers)

    @abstractmethod
    def prepare(self, num_layers: int) -> None:
        """Remove the blocks after the chosen layer."""

    @abstractmethod
    def encode(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Ids [B, T] and their mask [B, T] to tokens [B, T, d_v] of the chosen layer."""

    def num_tokens(self, shape: Any) -> int:
        """Tokens for ids of shape (T,), or their number T."""
        count = int(shape if isinstance(shape, int) else shape[-1])
        if not 1 <= count <= self.limit:
            raise BadSample(f"{self.name!r} takes 1 to {self.limit} tokens, not {count}")
        return count

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Ids [B, T] and their mask [B, T] (None: all valid) to tokens [B, T, d_v] and the same mask."""
        if x.ndim != 2:
            raise ConfigError(f"{self.name!r} reads ids [B, T], not {list(x.shape)}")
        self.num_tokens(x.shape[1])
        return self.encode(x, mask), mask

    def config(self) -> dict[str, Any]:
        return {"class": type(self).__name__, "layer": self.index, "preprocess": self.preprocess.signature}


class HFText(TextEncoder):
    """A transformers text model; an encoder-decoder gives its encoder."""

    def encode(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        attention = None if mask is None else mask.long()
        if self.block is not None:
            return output_of(self.backbone, self.block, lambda: self.backbone(input_ids=ids, attention_mask=attention))
        tokens: Tensor = self.backbone(input_ids=ids, attention_mask=attention).last_hidden_state
        return tokens

    def prepare(self, num_layers: int) -> None:
        self.block = None if self.last else cut_blocks(self.backbone, num_layers, self.index)
        if self.block is None and not self.last:
            raise Unsupported(f"the blocks of {self.name!r} were not found, so that only its last layer can be had")


class OpenClipText(TextEncoder):
    """The text tower of an open_clip model; it runs at its full context length, so short ids are padded and cut again."""

    def prepare(self, num_layers: int) -> None:
        tower: Any = self.backbone
        tower.prune_intermediate_layers([self.index], prune_norm=not self.last, prune_head=True)
        freeze(tower)

    def encode(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        tower: Any = self.backbone
        pad = tower.pad_id
        if mask is not None:
            ids = ids.masked_fill(~mask.bool(), pad)
        full = F.pad(ids, (0, self.limit - ids.shape[1]), value=pad)
        out = tower.forward_intermediates(
            full, indices=[self.index], normalize_intermediates=self.last, intermediates_only=True, output_fmt="NLC"
        )
        tokens: Tensor = out["text_intermediates"][0][:, : ids.shape[1]]
        return tokens


def load_hf_text(name: Name, options: TextOptions) -> HFText:
    """A frozen transformers text encoder; `load_encoder` says the names, options and errors."""
    transformers: Any = require("transformers", "text")
    text = name.text
    if name.source == "package":
        name = Name(text, "hf", str(find_package(name.rest, "text").path()), name.random)
    model = load_backbone(name, options, "text")
    config = model.config
    if config.is_encoder_decoder:
        model = model.get_encoder()
    place = locate(name)
    with loading(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, revision=options.revision)
    limit = _limit(config, tokenizer)
    if options.max_length is not None and not 1 <= options.max_length <= limit:
        raise ConfigError(f"max_length is in 1..{limit} for {text!r}, not {options.max_length}")
    preprocess = TextPreprocess(tokenizer, options.max_length or limit, truncate=options.max_length is not None)
    return HFText(
        model, name=text, dim=config.hidden_size, preprocess=preprocess, num_layers=config.num_hidden_layers,
        layer=options.layer, limit=limit,
    )  # fmt: skip


def load_open_clip_text(name: Name, options: TextOptions) -> OpenClipText:
    """A frozen open_clip text tower; `load_encoder` says the names, options and errors."""
    open_clip: Any = require("open_clip", "vision")
    if options.max_length is not None:
        raise ConfigError(
            "max_length does not apply to open_clip's text towers: their tokenizers cut at the context length"
        )
    model: Any = build(open_clip, name, options, force_custom_text=True)
    tower = model.text
    if not hasattr(tower, "forward_intermediates"):
        raise Unsupported(f"the text tower of {name.text!r} is a transformers model; load it by its own name, 'hf:...'")
    source = name.rest.partition("/")[0] if not Path(name.rest).is_dir() else f"local-dir:{name.rest}"
    source = name.rest if name.rest.startswith(("hf-hub:", "local-dir:")) else source
    with reading(name.text, None):
        tokenizer = open_clip.get_tokenizer(source, context_length=tower.context_length)
    causal = tower.attn_mask is not None and tower.pool_type in ("argmax", "eos")
    end = getattr(tokenizer, "eot_token_id", None) if causal else None
    if options.dtype is not None:
        tower = tower.to(options.dtype)
    return OpenClipText(
        tower, name=name.text, dim=tower.width, preprocess=OpenClipTextPreprocess(tokenizer, end),
        num_layers=len(tower.transformer.resblocks), layer=options.layer, limit=tower.context_length,
    )  # fmt: skip


def _limit(config: Any, tokenizer: Any) -> int:
    """The most ids a model takes: its positions (RoBERTa's start after the padding id) and its tokenizer's own limit."""
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    limits = [int(tokenizer.model_max_length)]
    if positions:
        limits.append(positions - (config.pad_token_id + 1 if config.model_type in OFFSET_POSITIONS else 0))
    return min(limits)


OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "roberta-prelayernorm")
