"""A whole Llama-type training step with low-rank adapters, written out: embedding, blocks, norm, head, loss.

`FusedLlama` is built from parts, so it knows no library; `fuse.from_model` finds the parts in a transformers model. A
block is in `llama_block`. Rows may hold packed documents (`documents.Documents`): positions and attention then restart with
each, and no token is asked to predict the next document's first, so that a packed row's loss and gradients are those of
its documents alone.

Limits: causal attention (right padding is fine), frozen norms, biases and head. Dropout draws one mask an input: q, k and
v of a block share theirs, and gate and up (`dropout`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.kernels import fused_ops, llama_block, llama_forward, recorded
from mmpeft.kernels.documents import Documents
from mmpeft.kernels.group import Dropped, Masters
from mmpeft.kernels.llama_block import Block, Layout, Sites
from mmpeft.kernels.xent import head_loss


@dataclass
class Tape:
    """What a forward keeps for its backward."""

    blocks: list[llama_block.Tape]
    final: tuple[Tensor, Tensor]
    gradient: Tensor | None  # of the final norm's output
    rows: Tensor | None
    shape: tuple[int, int]
    dropped: Dropped | None
    documents: Documents | None = None


@dataclass
class FusedLlama(Masters):
    """embedding -> blocks -> norm -> head -> cross-entropy.

    Args:
        embedding: [V, h]; head: [V, h]; final_norm: [h]. eps: of every norm.
        inv_freq: [d/2], fp32, with `rope_scale` on cos and sin. heads, kv_heads: counts. scale: of q k^T.
        dropout: on every adapter's input, in `forward` and `loss`, one mask for those that share it; masks are a function of
            `self.seed`, which each forward advances, and are redrawn in the backward.
    """

    embedding: Tensor
    blocks: list[Block]
    final_norm: Tensor
    head: Tensor
    eps: float
    inv_freq: Tensor
    heads: int
    kv_heads: int
    scale: float
    rope_scale: float = 1.0
    dropout: float = 0.0
    chunk_rows: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout {self.dropout}; expected 0 <= dropout < 1")
        self.seed = torch.zeros(1, dtype=torch.int64, device=self.embedding.device)
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}
        self.collect(g for block in self.blocks for g in block.groups())

    def loss(
        self,
        ids: Tensor | None,
        labels: Tensor,
        *,
        inputs: Tensor | None = None,
        rows: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the next token, differentiable in the masters (call `refresh` after changing them).

        Args:
            ids: int64 [B, S], or None with `inputs` [B, S, h] (embeddings, which may need a gradient).
            labels: int64 [B, S], -100 where unsupervised; shifted here, within documents.
            rows: int64 indices into [B * S] of the positions the head runs on (those before a supervised token).
        """
        if (ids is None) == (inputs is None):
            raise ConfigError("give either ids or inputs (embeddings)")
        x = inputs if inputs is not None else F.embedding(cast(Tensor, ids), self.embedding)
        return recorded.loss(self, x, labels, rows, documents)

    def states(self, x: Tensor, documents: Documents | None = None) -> Tensor:
        """Embeddings x [B, S, h] -> the last hidden states [B, S, h], final norm included, differentiable in x and the
        masters; without gradients nothing is kept."""
        if not torch.is_grad_enabled():
            return self.record(x, documents)[0] if self.dropout else self.last_states(x, documents)
        return recorded.run(self, x, documents)

    def last_states(
        self,
        x: Tensor,
        documents: Documents | None = None,
        index: Tensor | None = None,
        stacks: llama_forward.Stacks | None = None,
    ) -> Tensor:
        """As `states`, without gradients and without dropout: the short forward of `llama_forward`, which may take every
        sample's adapter out of `stacks`."""
        (B, S, h), layout = x.shape, self._layout((x.shape[0], x.shape[1]), documents)
        flat = x.reshape(B * S, h).contiguous()
        return llama_forward.states(flat, self.blocks, self.final_norm, layout, index, stacks).view(x.shape)

    @torch.no_grad()
    def record(self, x: Tensor, documents: Documents | None = None) -> tuple[Tensor, Tape]:
        """Embeddings x [B, S, h] -> (last hidden states [B, S, h], tape)."""
        saved: list[llama_block.Tape] = []
        dropped = self.draw()
        n, last, rstd = self.hidden(x, saved, dropped, documents)
        return n.view(x.shape), Tape(saved, (last, rstd), None, None, (x.shape[0], x.shape[1]), dropped, documents)

    def draw(self) -> Dropped | None:
        """This forward's dropout masks."""
        dropped = Dropped(self.dropout, self.seed.clone()) if self.dropout else None
        self.seed.add_(4 * len(self.blocks))
        return dropped

    @torch.no_grad()
    def forward(
        self, x: Tensor, labels: Tensor, rows: Tensor | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, Tape]:
        """x [B, S, h], labels [B, S] -> (mean loss, tape)."""
        saved: list[llama_block.Tape] = []
        dropped = self.draw()
        n, last, rstd = self.hidden(x, saved, dropped, documents)
        if documents is not None:
            labels = labels.masked_fill(documents.first(labels.shape[1]), -100)
        targets = F.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)
        if rows is not None:
            n, targets = n[rows], targets[rows]
        scale = 1.0 / (targets != -100).sum().clamp_min(1).to(torch.float32).reshape(1)
        loss, gradient = head_loss(n, self.head, targets, scale, chunk_rows=self.chunk_rows)
        return loss, Tape(saved, (last, rstd), gradient, rows, (x.shape[0], x.shape[1]), dropped, documents)

    @torch.no_grad()
    def hidden(
        self,
        x: Tensor,
        saved: list[llama_block.Tape],
        dropped: Dropped | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, h] -> (final norm's output [T, h], its input, its rstd); appends to `saved` what a backward needs."""
        B, S, h = x.shape
        layout = self._layout((B, S), documents)
        x, delta, scaling = x.reshape(B * S, h).contiguous(), None, None
        self.blocks[0].sweep_config(B * S, dropped is not None)  # tuned now, while memory is still free
        for i, block in enumerate(self.blocks):
            x, delta, kept = block.forward(x, delta, scaling, layout, _sites(dropped, i))
            scaling = block.down.scaling
            saved.append(kept)
        n = torch.empty_like(x)
        return (n, *fused_ops.add_rmsnorm(x, delta, self.final_norm, self.eps, n, scaling))

    @torch.no_grad()
    def backward(self, tape: Tape, flat: Tensor, *, accumulate: bool = False, need_dx: bool = False) -> Tensor | None:
        """Writes (or adds) the masters' gradients into flat [numel], fp32; returns the inputs' [B, S, h] if asked.

        The tape is consumed block by block, so its memory falls as the backward goes.
        """
        if not tape.blocks:
            raise ConfigError(
                "this tape's backward has run: its tensors were freed on the way (retain_graph is not supported)"
            )
        x, rstd = tape.final
        T, h = x.shape
        dn = cast(Tensor, tape.gradient)
        if tape.rows is not None:
            dn = torch.zeros_like(x).index_add_(0, tape.rows, dn)
        layout = self._layout(tape.shape, tape.documents)
        g = self.blocks[-1].down.wide(T, h)
        fused_ops.rmsnorm_backward(dn, x, rstd, self.final_norm, None, g[:, :h], None)
        del x, dn
        tape.final, tape.gradient = None, None  # type: ignore[assignment]
        for i in range(len(self.blocks) - 1, -1, -1):
            below = self.blocks[i - 1].down if i else self.blocks[i].down
            g = self.blocks[i].backward(
                below, g, tape.blocks.pop(), flat, accumulate, layout, need_dx or i > 0, _sites(tape.dropped, i)
            )
        return g[:, :h].reshape(*tape.shape, h) if need_dx else None

    def _layout(self, shape: tuple[int, int], documents: Documents | None) -> Layout:
        if shape[1] == 1:  # rows of one token have nothing to keep apart
            documents = None
        tables = self._cos_sin(shape[1])
        if documents is not None:  # by token: 2 d bytes a token and table, two launches a step
            tables = (tables[0][documents.positions], tables[1][documents.positions])
        return Layout(shape, tables, self.heads, self.kv_heads, self.scale, self.eps, documents)

    def _cos_sin(self, S: int) -> tuple[Tensor, Tensor]:
        """cos and sin of every position: two [S, d/2], fp32."""
        if S not in self._tables:
            angles = torch.arange(S, device=self.inv_freq.device, dtype=torch.float32)[:, None] * self.inv_freq.float()
            self._tables[S] = (angles.cos() * self.rope_scale, angles.sin() * self.rope_scale)
        return self._tables[S]


def _sites(dropped: Dropped | None, block: int) -> Sites:
    """Dropout of a block's four groups."""
    if dropped is None:
        return None, None, None, None
    qkv, o, gate_up, down = (dropped.at(4 * block + i) for i in range(4))
    return qkv, o, gate_up, down
