"""The Q-Former (BLIP-2): learned queries read a frozen encoder's tokens through a BERT with cross-attention.

`QFormerCore` is the transformer itself: post-norm BERT layers in which queries (and, for InstructBLIP, instruction
tokens) attend to each other, every other layer lets the queries cross-attend to the media, and queries and text have
feed-forward networks of their own. BLIP-2's second stage drops the text branch (105.2 M are left, queries included);
`text_vocab` keeps it. All layers' keys and values of the media come from one product (`shared_kv`). `QFormer` is the connector around it: `ln_vision` before, Linear(width, d_l) after.

Published weights (transformers' and LAVIS') load with `mmpeft.connectors.load_qformer`.

Papers: Li et al., BLIP-2, 2023; Dai et al., InstructBLIP, 2023.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.connectors.attention import attend, join_masks
from mmpeft.connectors.base import Connector, check_mask, require_heads, require_positive
from mmpeft.connectors.shared_kv import keys_and_values
from mmpeft.errors import ConfigError

NORM_EPS = 1e-12  # BERT's


class Attention(nn.Module):
    """BERT attention: x [B, Q, D] over `context` [B, T, D_c] -> LayerNorm(x + dense(attention)), [B, Q, D]."""

    def __init__(self, width: int, context_dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_dim, width)
        self.value = nn.Linear(context_dim, width)
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, context: Tensor, mask: Tensor | None, projected: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """`projected`: the context's keys and values [B, T, D], where they are known already."""
        p = self.dropout.p if self.training else 0.0
        key, value = (self.key(context), self.value(context)) if projected is None else projected
        out = attend(self.query(x), key, value, heads=self.heads, mask=mask, dropout=p)
        result: Tensor = self.norm(x + self.dropout(self.dense(out)))
        return result


class FeedForward(nn.Module):
    """BERT feed-forward: x [B, Q, D] -> LayerNorm(x + down(gelu(up(x))))."""

    def __init__(self, width: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden_dim)
        self.down = nn.Linear(hidden_dim, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))
        return out


class QFormerLayer(nn.Module):
    """Self-attention of queries and text, cross-attention of the queries (`cross`), then one FFN for each."""

    def __init__(
        self, width: int, media_dim: int, heads: int, hidden_dim: int, dropout: float, *, cross: bool, text: bool
    ) -> None:
        super().__init__()
        self.attention = Attention(width, width, heads, dropout)
        self.cross_attention = Attention(width, media_dim, heads, dropout) if cross else None
        self.query_ffn = FeedForward(width, hidden_dim, dropout)
        self.text_ffn = FeedForward(width, hidden_dim, dropout) if text else None

    def forward(
        self, x: Tensor, num_queries: int, mask: Tensor | None, media: Tensor, media_mask: Tensor | None,
        projected: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        x = self.attention(x, x, mask)
        queries, text = x[:, :num_queries], x[:, num_queries:]
        if self.cross_attention is not None:
            queries = self.cross_attention(queries, media, media_mask, projected)
        queries = self.query_ffn(queries)
        return queries if self.text_ffn is None else torch.cat([queries, self.text_ffn(text)], dim=1)


class TextEmbeddings(nn.Module):
    """Instruction ids [B, L] -> word + position embeddings [B, L, D]."""

    def __init__(self, vocab: int, positions: int, width: int) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab, width)
        self.position = nn.Embedding(positions, width)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.word(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        return out


class QFormerCore(nn.Module):
    """Queries [B, Q, width] (+ instruction ids) and media [B, T, media_dim] -> queries [B, Q, width].

    Equal to transformers' `Blip2QFormerModel` (and, with `text_vocab`, `InstructBlipQFormerModel`) for equal weights.
    """

    def __init__(
        self,
        *,
        media_dim: int,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden_dim: int = 3072,
        cross_every: int = 2,
        dropout: float = 0.1,
        text_vocab: int | None = None,
        text_positions: int = 512,
    ) -> None:
        super().__init__()
        text = text_vocab is not None
        self.text = TextEmbeddings(text_vocab, text_positions, width) if text_vocab is not None else None
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            QFormerLayer(width, media_dim, heads, hidden_dim, dropout, cross=i % cross_every == 0, text=text)
            for i in range(depth)
        )
        for module in self.modules():  # BERT's initialisation; cross-attention too, as in BLIP-2
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self,
        queries: Tensor,
        media: Tensor,
        media_mask: Tensor | None = None,
        instruction: Tensor | None = None,
        instruction_mask: Tensor | None = None,
    ) -> Tensor:
        num_queries = queries.shape[1]
        x: Tensor = queries
        mask: Tensor | None = None
        if self.text is not None and instruction is not None:
            text = self.text(instruction).to(queries.dtype)
            x = torch.cat([queries, text], dim=1)
            mask = join_masks((queries, None), (text, instruction_mask))
        x = self.dropout(self.norm(x))
        readers = {i: layer.cross_attention for i, layer in enumerate(self.layers) if isinstance(layer, QFormerLayer)}
        cross = {i: attention for i, attention in readers.items() if attention is not None}
        found = keys_and_values(media, [m for a in cross.values() for m in (a.key, a.value)])
        projected = {} if found is None else dict(zip(cross, zip(found[::2], found[1::2], strict=True), strict=True))
        for i, layer in enumerate(self.layers):
            x = layer(x, num_queries, mask, media, media_mask, projected.get(i))
        return x[:, :num_queries]


class QFormer(Connector):
    """[B, T, d_v] -> [B, num_queries, d_l] whatever T; a sample without one valid token gives no valid output.

    Args:
        num_queries: Q, the number of learned queries (32).
        width, depth, heads, hidden_dim: of the BERT (768, 12, 12, 3072: bert-base).
        cross_every: cross-attention in layers 0, cross_every, 2 cross_every, ...
        dropout: on attention weights and sub-layer outputs, in training.
        input_norm: LayerNorm over d_v before (`ln_vision`); False when the encoder ends in its own.
        text_vocab: keep the text branch for instructions of this vocabulary (InstructBLIP: 30523); None drops it.
        text_positions: longest instruction.
        pretrained: folder or file of published weights, loaded when built (see `load_qformer`); None = BERT's init.
        output_norm: end with a LayerNorm over d_l; see `Connector.set_output_std`.

    Raises:
        ConfigError: a size that is not positive, heads that do not divide width, a dropout outside [0, 1).
        NameNotFound, FileFormatError: from `load_qformer`.
    """

    queries: nn.Parameter

    def __init__(
        self,
        *,
        in_dim: int | None = None,
        out_dim: int | None = None,
        num_queries: int = 32,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden_dim: int = 3072,
        cross_every: int = 2,
        dropout: float = 0.1,
        input_norm: bool = True,
        text_vocab: int | None = None,
        text_positions: int = 512,
        pretrained: str | None = None,
        output_norm: bool = False,
    ) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, output_norm=output_norm)
        sizes = {"num_queries": num_queries, "width": width, "depth": depth, "heads": heads, "hidden_dim": hidden_dim}
        require_positive(self, **sizes, cross_every=cross_every, text_vocab=text_vocab, text_positions=text_positions)
        require_heads(self, width, heads)
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(f"QFormer: dropout must be in [0, 1), given {dropout}")
        self.num_queries = num_queries
        self.width = width
        self.depth = depth
        self.heads = heads
        self.hidden_dim = hidden_dim
        self.cross_every = cross_every
        self.dropout = dropout
        self.input_norm = input_norm
        self.text_vocab = text_vocab
        self.text_positions = text_positions
        self.pretrained = pretrained
        self._build_if_given(in_dim, out_dim)

    def _build(self, in_dim: int, out_dim: int) -> None:
        self.ln_vision = nn.LayerNorm(in_dim) if self.input_norm else nn.Identity()
        self.queries = nn.Parameter(torch.empty(1, self.num_queries, self.width))
        nn.init.normal_(self.queries, std=0.02)
        self.core = QFormerCore(
            media_dim=in_dim,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            hidden_dim=self.hidden_dim,
            cross_every=self.cross_every,
            dropout=self.dropout,
            text_vocab=self.text_vocab,
            text_positions=self.text_positions,
        )
        self.project = nn.Linear(self.width, out_dim)
        if self.pretrained is not None:
            from mmpeft.connectors.qformer_weights import load_qformer

            load_qformer(self, self.pretrained)

    def num_tokens(self, t: int) -> int:
        require_positive(self, t=t)
        return self.num_queries

    def channel_readers(self) -> list[nn.Linear | nn.LayerNorm]:
        if self.pretrained is not None:
            raise ConfigError(
                "QFormer: calibrate would change what the pretrained weights make of their encoder's features; leave "
                "calibrate or pretrained out"
            )
        if isinstance(self.ln_vision, nn.LayerNorm):
            return [self.ln_vision]
        found: list[nn.Linear | nn.LayerNorm] = []
        for layer in self.core.layers:
            if isinstance(layer, QFormerLayer) and layer.cross_attention is not None:
                found += [layer.cross_attention.key, layer.cross_attention.value]
        return found

    def connect(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        instruction: Tensor | None = None,
        instruction_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        queries = self.queries.to(tokens.dtype).expand(len(tokens), -1, -1)
        out = self.core(queries, self.ln_vision(tokens), mask, instruction, instruction_mask)
        valid = None if mask is None else mask.any(1, keepdim=True).expand(-1, self.num_queries)
        return self.project(out), valid

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        instruction: Tensor | None = None,
        instruction_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `Connector.forward`; `instruction` is ids [B, L] that the queries attend to (InstructBLIP), with its mask.

        Raises:
            ConfigError: also for an instruction given to a Q-Former without `text_vocab`, or longer than it can take.
        """
        tokens = self._receive(tokens, mask)
        if instruction is not None:
            if self.text_vocab is None:
                raise ConfigError("this QFormer has no text branch: build it with text_vocab=... to give instructions")
            if instruction.dim() != 2 or len(instruction) != len(tokens) or instruction.shape[1] > self.text_positions:
                raise ConfigError(
                    f"instruction must be ids [{len(tokens)}, L <= {self.text_positions}], "
                    f"given {list(instruction.shape)}"
                )
            if instruction_mask is not None:
                check_mask(self, instruction_mask, instruction.unsqueeze(-1))
        return self._deliver(*self.connect(tokens, mask, instruction, instruction_mask))
