"""A frozen causal language model as the trunk: a sentence of words, pictures and states, as in PaLM-E (Driess et al.
2023, arXiv 2303.03378), with readout tokens at its end.

    [instruction's words] [map cells, frame by frame] [one token a state] [N readouts]  ->  the readouts' hidden states

All N readouts are read in one forward (OpenVLA-OFT's parallel decoding) and see everything before them. Connectors map
each sense to the width of the model and start at the scale of its own embeddings. A plan that leaves the model frozen:
`{"trunk.senses": "full", "trunk.llm.**.{q,v}_proj": mmpeft.LoRA(rank=16), "head": "full"}`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.connectors import MLP
from mmpeft.encoders import LLM, load_llm
from mmpeft.errors import BadSample, ConfigError
from mmpeft.multimodal.language_model import find_decoder
from mmpeft.policies.trunks import Observed, Sizes, Trunk


class LLMTrunk(Trunk):
    """N readouts [B, N, d_l] of a causal language model.

    Args:
        llm: a name for `load_llm`, or an `LLM`.
        depth: Linear layers of each connector.
        dtype, attn_implementation: of an `llm` given by name.
        max_words: an instruction of more tokens is refused.
    """

    reads_text = True

    def __init__(
        self, llm: str | LLM, *, depth: int = 2, dtype: str | None = None, attn_implementation: str | None = None,
        max_words: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        if depth < 1 or max_words < 1:
            raise ConfigError(f"depth and max_words are at least 1, given {depth} and {max_words}")
        loaded = load_llm(llm, dtype=dtype, attn_implementation=attn_implementation) if isinstance(llm, str) else llm
        self.llm: Any = loaded.model
        self.tokenizer = loaded.tokenizer
        self.depth, self.max_words = depth, max_words
        embedding: Any = self.llm.get_input_embeddings()
        self.dim = int(embedding.embedding_dim)
        self._ids: dict[str, list[int]] = {}

    def _build(self, sizes: Sizes) -> None:
        std = float(self.llm.get_input_embeddings().weight.detach().float().std())
        self.senses = Senses(sizes, self.readouts, self.dim, self.depth, std)

    def words(self, sentences: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L, d_l] and mask [B, L], padded on the left.

        Raises:
            BadSample: an empty sentence, or one of more than `max_words` tokens.
        """
        rows = []
        for sentence in sentences:
            if sentence not in self._ids:
                ids = self.tokenizer(sentence, add_special_tokens=False)["input_ids"] if sentence.strip() else []
                if not 1 <= len(ids) <= self.max_words:
                    limit = f"1 to {self.max_words} tokens"
                    raise BadSample(f"an instruction has {limit}, {sentence[:40]!r} has {len(ids)}")
                self._ids[sentence] = ids
            rows.append(self._ids[sentence])
        table, longest = self.llm.get_input_embeddings(), max(map(len, rows))
        device = table.weight.device
        ids_padded = torch.tensor([[0] * (longest - len(r)) + r for r in rows], device=device)
        lengths = torch.tensor([len(r) for r in rows], device=device)
        mask = torch.arange(longest, device=device) >= longest - lengths[:, None]
        return table(ids_padded), mask

    def forward(self, observed: Observed) -> Tensor:
        if observed.instruction is None:
            raise BadSample("an LLMTrunk reads an instruction, but the observation has none")
        embeds, valid = self.words([str(s) for s in observed.instruction])
        batch = len(embeds)
        parts, masks = [embeds], [valid]

        def add(tokens: Tensor, mask: Tensor | None) -> None:
            parts.append(tokens.to(embeds.dtype))
            masks.append(valid.new_ones(batch, tokens.shape[1]) if mask is None else mask)

        for tokens, known in self.senses(observed):
            add(tokens, known)
        add(self.senses.queries.expand(batch, -1, -1), None)
        mask = torch.cat(masks, 1)
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        hidden: Tensor = find_decoder(self.llm)(
            inputs_embeds=torch.cat(parts, 1), attention_mask=mask.long(), position_ids=positions, use_cache=False
        )[0]
        return hidden[:, -self.readouts :].float()


class Senses(nn.Module):
    """What an `LLMTrunk` trains beside the model: connectors, places and readouts, at the `std` of its embeddings."""

    def __init__(self, sizes: Sizes, readouts: int, width: int, depth: int, std: float) -> None:
        super().__init__()

        def connector(into: int) -> MLP:
            made = MLP(in_dim=into, out_dim=width, depth=depth, output_norm=True)
            made.set_output_std(std)
            return made

        self.connectors = nn.ModuleList(connector(c) for c, _, _ in sizes.maps)
        self.cells = nn.ParameterList(torch.randn(h * w, width) * std / 4 for _, h, w in sizes.maps)
        self.frames = nn.Parameter(torch.randn(sizes.history, sizes.views, width) * std / 4) if sizes.maps else None
        self.state = connector(sizes.state) if sizes.state else None
        self.missing = nn.Parameter(torch.randn(width) * std) if sizes.state else None
        self.queries = nn.Parameter(torch.randn(readouts, width) * std)

    def forward(self, observed: Observed) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Tokens [B, N, d_l] and their mask [B, N] (None: all valid), sense by sense."""
        for m, connect, place in zip(observed.maps, self.connectors, self.cells, strict=True):
            assert self.frames is not None
            cells = m.flatten(4).transpose(3, 4)  # [B, T, V, cells, C]
            tokens = connect(cells.flatten(0, 2))[0].unflatten(0, cells.shape[:3]) + place + self.frames.unsqueeze(2)
            each = cells.shape[2] * cells.shape[3]
            yield tokens.flatten(1, 3), None if observed.seen is None else observed.seen.repeat_interleave(each, 1)
        if self.state is not None and observed.state is not None:
            shape, known = observed.state.shape[:2], observed.known
            there = torch.ones(shape, dtype=torch.bool, device=observed.state.device) if known is None else known
            tokens = self.state(torch.where(there.unsqueeze(-1), observed.state, 0))[0]
            assert self.missing is not None
            yield torch.where(there.unsqueeze(-1), tokens, self.missing), observed.seen
