"""A multimodal language model: any frozen encoders and connectors in front of any causal language model.

    model = MultimodalLM("package:smollm2-135m-instruct", image="package:efficientnet-lite0", connector=MLP(depth=2))
    model.chat([{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": "What is it?"}]}])

The path of a batch: ids are embedded, each modality's media go through encoder and connector in one flat batch, their
tokens take the places of the placeholders, the decoder runs, and the head sees supervised positions only. Choices:

- `encoders`, `connectors` and `llm` are plain submodules, so plans, saving and any Lightning strategy work on them as they are.
- The loss is a sum with its count. Who knows the counts of other ranks and accumulation steps divides (`global_mean`).
- Connectors stay fp32 beside a bf16 language model: their tokens are cast to its embeddings' dtype.
- Nothing here freezes: `mmpeft.attach` does. A frozen encoder gets no autograd graph, as nothing in it asks for one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmpeft.connectors import Connector
from mmpeft.encoders import LLM, Encoder, load_llm
from mmpeft.errors import BadSample, ConfigError, Unsupported
from mmpeft.kernels.cross_entropy import linear_cross_entropy
from mmpeft.multimodal import generation
from mmpeft.multimodal.collate import Batch, MediaGroup, collate
from mmpeft.multimodal.conversation import Conversation, ConversationEncoder
from mmpeft.multimodal.language_model import find_decoder, head_logits, logit_rules, verify_packing
from mmpeft.multimodal.parts import make_connectors, make_encoder, make_reader
from mmpeft.multimodal.rows import rows_of
from mmpeft.multimodal.sample import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Output:
    """What `forward` gives for a batch with N supervised tokens."""

    loss_sum: Tensor  # scalar, fp32: the sum over supervised tokens; divide with `global_mean`
    num_supervised: int  # N
    targets: Tensor  # [N] int64
    target_samples: Tensor  # [N] int64: which sample of the batch each belongs to
    logits: Tensor | None = None  # [N, V], only if asked for
    predictions: Tensor | None = None  # [N] int64: the most likely tokens, with logits


class MultimodalLM(nn.Module):
    """Encoders, connectors and a causal language model.

    Args:
        llm: a name for `load_llm`, or an `LLM` already loaded.
        image, audio: a name for `load_encoder`, its arguments as a mapping ({"name": ..., "image_size": 64}), or an `Encoder`.
        state: width of robot state vectors, if conversations hold any.
        connector: for the one modality there is, or by modality; MLP(depth=2) where none is given. Widths are filled in.
            One that is not built yet may serve several modalities: each gets its own copy.
        dtype, attn_implementation: of an `llm` given by name ("bfloat16"; "eager" is the faster one on CPU for short rows).
        chat_template, system_prompt: see `ChatTemplate`.
        max_length: longest sample in tokens; longer ones are refused, never cut.

    Attributes:
        encoders, connectors: ModuleDicts by modality.
        llm, tokenizer: of transformers.

    Raises:
        ConfigError: parts that do not fit together.
        Unsupported: an architecture whose logits mmpeft cannot reproduce.
    """

    llm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        llm: str | LLM,
        *,
        image: str | Mapping[str, Any] | Encoder | None = None,
        audio: str | Mapping[str, Any] | Encoder | None = None,
        state: int | None = None,
        connector: Connector | Mapping[str, Connector] | None = None,
        dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(llm, str):
            llm = load_llm(llm, dtype=dtype, attn_implementation=attn_implementation)
        elif dtype is not None or attn_implementation is not None:
            raise ConfigError("dtype and attn_implementation are for an llm given by name; load_llm takes them too")
        self.name = llm.name
        self.llm, self.tokenizer = llm.model, llm.tokenizer
        encoders = {m: make_encoder(m, given) for m, given in (("image", image), ("audio", audio)) if given is not None}
        language_model: Any = self.llm
        embedding: Tensor = language_model.get_input_embeddings().weight.detach()
        widths = {m: encoder.dim for m, encoder in encoders.items()} | ({} if state is None else {"state": state})
        connectors = make_connectors(connector, widths, embedding)
        self.encoders, self.connectors = nn.ModuleDict(encoders), nn.ModuleDict(connectors)
        self._logit_rules = logit_rules(self.llm)
        self._packing_verified = False
        self.conversations = ConversationEncoder(
            self.tokenizer,
            {m: make_reader(m, encoders.get(m), c) for m, c in connectors.items()},
            chat_template=chat_template,
            system_prompt=system_prompt,
            max_length=max_length,
        )

    # ---- conversations to batches --------------------------------------------------------------------------------

    def encode(self, conversation: Conversation, *, answer: bool = True) -> Sample:
        """A conversation to a Sample; with answer=False the prompt alone. See `ConversationEncoder.encode`."""
        return self.conversations.encode(conversation, answer=answer)

    def collate(
        self,
        samples: Sequence[Sample],
        *,
        padding: str = "right",
        row_length: int | None = None,
        max_media: int | None = None,
    ) -> Batch:
        """Samples to a Batch: padded, or with `row_length` packed. See `collate`."""
        return collate(samples, padding=padding, row_length=row_length, max_media=max_media)

    def example_inputs(self) -> tuple[Batch]:
        """The arguments of a small forward with every input the model has: two samples, random media, short texts.

        `mmpeft.attach` and `mmpeft.inspect` run it to prove that each site is alive.
        """
        generator = torch.Generator().manual_seed(0)
        readers = self.conversations.readers
        media: dict[str, Callable[[], Any]] = {
            "image": lambda: torch.randint(256, (64, 64, 3), generator=generator).to(torch.uint8).numpy(),
            "audio": lambda: torch.randn(16_000, generator=generator).numpy(),
            "state": lambda: torch.randn(readers["state"].width, generator=generator),
        }
        samples = []
        for answer in ("yes", "no, it is not"):
            parts = [{"type": m, m: media[m]()} for m in readers]
            question = {"role": "user", "content": [*parts, {"type": "text", "text": "Is it?"}]}
            samples.append(self.encode([question, {"role": "assistant", "content": answer}]))
        batch: Batch = generation.to_device(self.collate(samples), self.llm.device)
        return (batch,)

    def expand_rows(self, rows: Sequence[Any], batch: Batch) -> dict[str, list[Any]]:
        """One entry a sample to one entry a medium, by modality, in the order in which its encoder sees the media.

        Raises:
            ConfigError: not one entry a sample.
            Unsupported: a modality whose media differ in size, so that its encoder runs more than once.
        """
        if len(rows) != len(batch["sample_ids"]):
            raise ConfigError(f"expected {len(batch['sample_ids'])} rows, one a sample, given {len(rows)}")
        for modality, groups in batch["media"].items():
            if len(groups) > 1:
                raise Unsupported(
                    f"the batch holds {modality} inputs of {len(groups)} sizes: rows need one size a batch"
                )
        return {m: [rows[i] for i in groups[0]["samples"]] for m, groups in batch["media"].items()}

    # ---- forward --------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, *, need_logits: bool = False) -> Output:
        """The summed loss over a batch's supervised tokens.

        Args:
            need_logits: also give logits [N, V] and predictions [N] at the supervised positions, without gradient.

        Raises:
            BadSample: a connector gave another number of tokens than its `num_tokens` promised; names the samples.
            Unsupported: a packed batch and an architecture that would leak between documents.
        """
        states = self.hidden(batch).flatten(0, 1)
        hidden = states.index_select(0, batch["target_positions"])  # [N, H]
        language_model: Any = self.llm
        head = language_model.get_output_embeddings()
        loss_sum = linear_cross_entropy(
            hidden, head.weight, batch["target_ids"], bias=getattr(head, "bias", None), ignore_index=None,
            logit_scale=self._logit_rules.scale, softcap=self._logit_rules.softcap,
        )  # fmt: skip
        targets = batch["target_ids"]
        output = Output(loss_sum + self._untouched(batch), targets.numel(), targets, batch["target_samples"])
        if need_logits:
            with torch.no_grad():
                output.logits = head_logits(self.llm, hidden, self._logit_rules)
                output.predictions = output.logits.argmax(-1)
        return output

    def hidden(self, batch: Batch) -> Tensor:
        """The decoder's last hidden states [B, T, H], final norm included; the head is not run."""
        options: dict[str, Tensor] = {}
        if batch["layout"] == "packed":
            if not self._packing_verified:
                verify_packing(self.llm)
                self._packing_verified = True
            options = {"position_ids": batch["position_ids"]}  # restarting positions make the mask, see packing.py
        elif batch["layout"] == "left":
            options = {"position_ids": batch["position_ids"], "attention_mask": batch["attention_mask"].long()}
        states: Tensor = find_decoder(self.llm)(inputs_embeds=self.embed(batch), use_cache=False, **options)[0]
        return states

    def embed(self, batch: Batch) -> Tensor:
        """Input embeddings [B, T, D] with the media's tokens in their places."""
        language_model: Any = self.llm
        embeds: Tensor = language_model.get_input_embeddings()(batch["input_ids"])
        flat = embeds.flatten(0, 1)
        for modality, groups in batch["media"].items():
            if modality not in self.connectors:
                raise ConfigError(
                    f"the batch holds {modality} inputs, the model has {', '.join(self.connectors) or 'none'}"
                )
            for group in groups:
                tokens = self._media_tokens(modality, group, batch["sample_ids"])
                flat = flat.index_copy(0, group["positions"], tokens.to(flat.dtype))
        return flat.view_as(embeds)

    def _media_tokens(self, modality: str, group: MediaGroup, sample_ids: Sequence[str]) -> Tensor:
        """A group of media through encoder and connector: [sum of counts, D], checked against the promised counts."""
        tokens, mask = group["x"], group["mask"]
        with rows_of(self, group["samples"]):
            if not group["encoded"]:
                tokens, mask = self.encoders[modality](tokens, mask)
            out, valid = self.connectors[modality](tokens, mask)  # [n, Q, D], [n, Q] or None
        given = [out.shape[1]] * out.shape[0] if valid is None else valid.sum(1).tolist()
        wrong = [
            (n, m, sample_ids[i]) for n, m, i in zip(given, group["counts"], group["samples"], strict=True) if n != m
        ]
        if wrong:
            n, m, name = wrong[0]
            raise BadSample(
                f"{name}: its {modality} became {n} tokens, num_tokens promised {m} ({len(wrong)} media of the batch "
                f"differ); the encoder's and the connector's num_tokens must agree with their forward"
            )
        flat: Tensor = out.flatten(0, 1) if valid is None else out[valid]
        return flat

    def _untouched(self, batch: Batch) -> Tensor | float:
        """Zero, in whose graph are the trainable parts that this batch has no media for.

        Ranks of DistributedDataParallel wait for each other's gradients: a rank with a text-only batch must have some.
        """
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return 0.0
        zero: Tensor | float = 0.0
        for modality in set(self.connectors) - set(batch["media"]):
            parts = [self.connectors[modality], *([self.encoders[modality]] if modality in self.encoders else [])]
            parameters = [p for part in parts for p in part.parameters() if p.requires_grad]
            zero = zero + sum((0.0 * p.float().sum() for p in parameters), start=0.0)
        return zero

    # ---- text out -------------------------------------------------------------------------------------------------

    def generate(
        self,
        conversations: Sequence[Conversation | Sample],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        repetition_penalty: float = 1.0,
        batch_size: int = 32,
    ) -> list[str]:
        """Answers to conversations, or to samples encoded with answer=False, in their order.

        A conversation's final assistant message, if any, is left out, so the samples of a data set can be asked as they
        are. Decoding stops at the end of turn.

        Args:
            max_new_tokens: longest answer in tokens.
            temperature: 0 is greedy (or beam) decoding; above 0 samples from torch's global generator.
            top_p, top_k: sample from the smallest set of probability top_p, from the top_k likeliest (1.0, 0: all).
            num_beams, length_penalty: beam search, and its preference for long answers.
            repetition_penalty: above 1 makes tokens that the answer already holds less likely.
            batch_size: conversations generated together, after sorting by length.

        Raises:
            ConfigError: an option out of range, or prompt and answer longer than the model's positions.
            BadSample: a conversation that cannot be encoded.
        """
        options = generation.Options(
            max_new_tokens, temperature, top_p, top_k, num_beams, length_penalty, repetition_penalty
        )
        samples = [c if isinstance(c, Sample) else self.encode(c, answer=False) for c in conversations]
        return generation.generate(self, samples, options, batch_size=batch_size)

    def chat(
        self, messages: Conversation, *, max_new_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0
    ) -> str:
        """The answer to one conversation; see `generate`."""
        return self.generate([messages], max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)[0]


def global_mean(loss_sum: Tensor, counts: int | Sequence[int] | Tensor, *, averaged_over: int = 1) -> Tensor:
    """The loss of this micro-batch's tokens as its share of the mean over all supervised tokens of an optimizer step.

    A mean of means would weigh a token by how few others are in its micro-batch (transformers#35438).

    Args:
        loss_sum: summed loss of this micro-batch.
        counts: supervised tokens of every micro-batch of the step on every rank, this one's included.
        averaged_over: over how many micro-batches the trainer averages gradients afterwards (ranks under DDP, times
            accumulation steps where the trainer divides by them, as Lightning does); this undoes it.

    Returns:
        loss_sum * averaged_over / sum(counts); 0 where nothing is supervised.
    """
    total = torch.as_tensor(counts, device=loss_sum.device).sum().clamp_min(1)
    return loss_sum * averaged_over / total
