"""How likely a language model finds sentences after a prompt: exact, batched, and with the prompt read once.

The score of a sentence is the log likelihood of its tokens. Longer sentences have more factors: `length="sum"` is the
probability itself and favours short ones; "mean" divides by the number of tokens, and favours those with predictable
ends. What fits must be tried; both are exact.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmpeft.adapters.freeze import evaluating
from mmpeft.errors import ConfigError, Unsupported, nearest

Length = Literal["sum", "mean"]


class Scorer:
    """Log likelihoods of sentences after a prompt, with the keys and values of the prompt kept.

    A prompt that goes on from the last one (a plan that grew by a step) only pays for its new tokens.

    Args:
        llm: `LLM`, `MultimodalLM`, or any object with `tokenizer` and a causal language model as `model` or `llm`.
        batch_size: sentences a forward.
    """

    def __init__(self, llm: Any, *, batch_size: int = 32) -> None:
        # a MultimodalLM's language model is `llm`, a loaded LLM's is `model`
        self.model: Any = getattr(llm, "llm", None) or getattr(llm, "model", None)
        self.tokenizer: Any = getattr(llm, "tokenizer", None)
        if self.model is None or self.tokenizer is None:
            raise ConfigError(f"a planner needs a language model with its tokenizer, given a {type(llm).__name__}")
        if batch_size < 1:
            raise ConfigError(f"batch_size is at least 1, given {batch_size}")
        self.batch_size = batch_size
        # transformers 5.24 renamed the argument
        self.kept = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        self.forget()

    def forget(self) -> None:
        """Drop the kept prompt; needed after the model's weights or adapters changed."""
        self.ids: list[int] = []
        self.cache: Any = None
        self.last: Tensor | None = None  # [vocabulary], log probabilities of what follows the prompt

    @torch.no_grad()
    def __call__(self, prompt: str, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Sums of log probabilities [K] (nats, float64) and numbers of tokens [K].

        A sentence is tokenised on its own and its ids follow the prompt's, so its first character (a space, mostly)
        belongs to it.

        Raises:
            ConfigError: nothing to score, an empty sentence, or more tokens than the model has positions.
            Unsupported: a model whose cache cannot be repeated for several sentences.
        """
        if not sentences:
            raise ConfigError("no sentence to score")
        rows = [list(self.tokenizer(s, add_special_tokens=False)["input_ids"]) for s in sentences]
        empty = [s for s, r in zip(sentences, rows, strict=True) if not r]
        if empty:
            raise ConfigError(f"a sentence without tokens cannot be scored: {empty[0]!r}")
        ids = list(self.tokenizer(prompt)["input_ids"])
        limit, longest = getattr(self.model.config, "max_position_embeddings", None), len(ids) + max(map(len, rows))
        if not ids or (limit is not None and longest > limit):
            raise ConfigError(f"prompt and sentence have {longest} tokens, the model has {limit} positions")
        with evaluating(self.model):
            last = self._read(ids)
            parts = [self._score(last, rows[i : i + self.batch_size]) for i in range(0, len(rows), self.batch_size)]
        return torch.cat(parts), torch.tensor([len(r) for r in rows])

    def _read(self, ids: list[int]) -> Tensor:
        """Take up a prompt; what was read already of it is not read again."""
        if ids == self.ids and self.last is not None:
            return self.last
        shared = next(
            (i for i, (a, b) in enumerate(zip(ids, self.ids, strict=False)) if a != b), min(len(ids), len(self.ids))
        )
        shared = min(shared, len(ids) - 1)
        if shared and shared < len(self.ids):
            try:
                self.cache.crop(-(len(self.ids) - shared))
            except (ValueError, RuntimeError, NotImplementedError):  # a sliding window has dropped what would be needed
                shared = 0
        if not shared:
            self.forget()
        new = torch.tensor([ids[shared:]], device=self.model.device)
        out = self.model(input_ids=new, use_cache=True, **{self.kept: self.cache})
        self.ids, self.cache = ids, getattr(out, self.kept, None)
        if not all(hasattr(part, "batch_repeat_interleave") for part in getattr(self.cache, "layers", [None])):
            self.forget()
            raise Unsupported(
                f"{type(self.model).__name__} keeps no keys and values that could be repeated for each sentence"
            )
        self.last = out.logits[0, -1].double().log_softmax(-1)
        return self.last

    def _score(self, last: Tensor, rows: list[list[int]]) -> Tensor:
        width, lengths = max(map(len, rows)), torch.tensor([len(r) for r in rows])
        ids = torch.tensor([r + [0] * (width - len(r)) for r in rows], device=self.model.device)  # [K, L]
        there = torch.arange(width) < lengths[:, None]
        found = last[ids[:, 0]][:, None]
        if width > 1:
            cache = copy.deepcopy(self.cache)
            cache.batch_repeat_interleave(len(rows))
            start = len(self.ids)
            seen = torch.ones(len(rows), start, dtype=torch.bool)
            out = self.model(
                input_ids=ids[:, :-1], use_cache=True, **{self.kept: cache},
                attention_mask=torch.cat([seen, there[:, :-1]], 1).long().to(ids.device),
                position_ids=torch.arange(start, start + width - 1, device=ids.device).expand(len(rows), -1),
            )  # fmt: skip
            rest = out.logits.double().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            found = torch.cat([found, rest], 1)
        return torch.where(there, found.cpu(), 0.0).sum(1)


def score_sentences(llm: Any, prompt: str, sentences: Sequence[str], *, length: Length = "sum") -> Tensor:
    """[K] float64: the log likelihood of each sentence after the prompt, whole or a token; see `Scorer`."""
    total, tokens = Scorer(llm)(prompt, sentences)
    return total / tokens if check_length(length) == "mean" else total


def check_length(length: str) -> Length:
    """Itself, if it is one; else ConfigError."""
    if length not in get_args(Length):
        raise ConfigError(f"length is 'sum' or 'mean', given {length!r}{nearest(str(length), get_args(Length))}")
    return length  # type: ignore[return-value]
