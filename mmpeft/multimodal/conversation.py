"""Messages to a training sample: one tokenisation, labels by message span, placeholders expanded once.

The rendered conversation (chat_template.py) is tokenised in one call. Choices made here:

- Wherever a medium stands, and where each supervised answer begins, a special token of the tokenizer is put as a
  divider: every tokenizer splits there. Dividers are found again by counting, so an occurrence that the template wrote
  itself is never mistaken for one. A divider before an answer is dropped; one at a medium becomes as many placeholders
  as `connector.num_tokens(encoder.num_tokens(shape))` says.
- Placeholders hold id 0 and are told apart by `modality_ids`, so no vocabulary entry is added, and none is reserved.
- Labels stand on the answer's tokens and its end-of-turn token, by position. pad, eos and end-of-turn are the same id
  in many tokenizers, so no id decides anything.
- A sample that is too long, has no supervised token, or holds a medium that cannot be read is refused with its name;
  nothing is ever cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mmpeft.errors import BadSample, ConfigError, Unsupported, nearest
from mmpeft.multimodal.chat_template import CLOSE, MEDIA, OPEN, ChatTemplate, Piece, Turn
from mmpeft.multimodal.sample import IGNORE, MODALITIES, MediaItem, MediaReader, Part, Sample

ROLES = ("system", "user", "assistant")
MESSAGE_KEYS = ("role", "content", "supervise")
PART_KEYS: dict[str, tuple[str, ...]] = {  # type of a content part -> the keys it may have beside "type"
    "text": ("text",),
    "image": ("image", "features"),
    "video": ("video",),  # a list of frames: consecutive images
    "audio": ("audio", "sampling_rate", "features"),
    "state": ("state",),  # [d] or [n, d]: robot proprioception, n tokens for the connector
}

Message = Mapping[str, Any]
Conversation = Sequence[Message] | Mapping[str, Any]  # messages, or {"id": ..., "messages": [...]}


class ConversationEncoder:
    """Conversations to samples, with one tokenizer, chat template and set of media readers.

    Args:
        tokenizer: a transformers tokenizer that has at least one special token.
        readers: modality -> reader, for the modalities the model has.
        chat_template, system_prompt: see `ChatTemplate`.
        max_length: longest sample in tokens, placeholders included; None = any.
    """

    def __init__(
        self,
        tokenizer: Any,
        readers: Mapping[str, MediaReader],
        *,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        max_length: int | None = None,
    ) -> None:
        if max_length is not None and max_length < 1:
            raise ConfigError(f"max_length must be 1 or more, or None, given {max_length}")
        self.tokenizer = tokenizer
        self.readers = dict(readers)
        self.template = ChatTemplate(tokenizer, chat_template, system_prompt)
        self.max_length = max_length
        end_of_turn = tokenizer.convert_tokens_to_ids(self.template.end_of_turn)
        self.stop_ids: list[int] = list(
            dict.fromkeys(i for i in (end_of_turn, tokenizer.eos_token_id) if i is not None)
        )
        self.divider, self.divider_id = _divider(tokenizer)
        self._control_ids = set(tokenizer.convert_tokens_to_ids(self.template.control_tokens))

    def encode(self, conversation: Conversation, *, answer: bool = True) -> Sample:
        """One conversation to a Sample.

        Args:
            conversation: messages, or a mapping with "messages" and an "id" that errors name. A message is
                {"role", "content"} with a string or a list of parts (`PART_KEYS`); an assistant message with
                "supervise": False is read but not trained on.
            answer: False gives the prompt alone: a final assistant message is left out, and the sample ends where the
                answer begins. Its ids are those that precede the answer with answer=True.

        Raises:
            BadSample: names the sample: malformed message, unreadable medium, no supervised token, too long.
        """
        where, messages = _messages(conversation)
        if not answer and messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        if not messages:
            raise BadSample(f"{where}: there is no message to answer")
        turns, parts = self._turns(messages, where)
        media = [self._read(part, i, where) for i, part in enumerate(parts)]
        text, dividers = self._text(turns, generation=not answer, where=where)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        sample = self._assemble(ids, dividers, media, where)
        if not answer:
            sample = replace(sample, labels=torch.full_like(sample.labels, IGNORE))
        if answer and not sample.num_supervised:
            raise BadSample(f"{where}: no supervised token (there is no assistant message to train on)")
        if self.max_length is not None and len(sample) > self.max_length:
            placeholders = int((sample.modality_ids != 0).sum())
            raise BadSample(
                f"{where}: {len(sample)} tokens ({placeholders} of them media), the limit is {self.max_length}; raise "
                "max_length, shorten the text or use fewer tokens a medium"
            )
        return sample

    def _turns(self, messages: Sequence[Message], where: str) -> tuple[list[Turn], list[Part]]:
        """Messages to turns of text with MEDIA characters, and the media parts in order."""
        turns, media = [], []
        for message in messages:
            _known(message, MESSAGE_KEYS, f"{where}: message key")
            role, content = message.get("role"), message.get("content")
            if role not in ROLES:
                raise BadSample(f"{where}: unknown role {role!r}; valid: {', '.join(ROLES)}{nearest(str(role), ROLES)}")
            text = ""
            for part in _parts(content, where):
                if part["type"] == "text":
                    text += self._checked(part["text"], where)
                    continue
                if role == "assistant":
                    raise BadSample(f"{where}: an assistant message holds {part['type']!r}; media belong to the user")
                if part["type"] not in self.readers:
                    raise BadSample(
                        f"{where}: the model has no {part['type']} input (it has {', '.join(self.readers) or 'none'})"
                    )
                text += MEDIA
                media.append(part)
            turns.append(Turn(role, text, role == "assistant" and message.get("supervise", True)))
        return turns, media

    def _checked(self, text: Any, where: str) -> str:
        """Text as given; text that would be read as structure of the chat is refused."""
        if not isinstance(text, str):
            raise BadSample(f"{where}: text must be a string, given {type(text).__name__}")
        for token in (*self.template.control_tokens, OPEN, CLOSE, MEDIA):
            if token in text:
                raise BadSample(f"{where}: the text holds the control token {token!r}")
        return text

    def _read(self, part: Part, index: int, where: str) -> MediaItem:
        try:
            return self.readers[part["type"]].read(part)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise BadSample(f"{where}: {part['type']} (medium {index + 1}): {error}") from error

    def _text(self, turns: Sequence[Turn], *, generation: bool, where: str) -> tuple[str, list[str]]:
        """The string to tokenise, and what each occurrence of the divider in it is: "template", "media" or "answer"."""
        text, dividers = "", []
        pieces = self.template.render(turns, generation=generation, where=where)
        if not generation and turns[-1].role == "assistant":  # nothing reads what the template adds after the last turn
            end = self.template.end_of_turn
            pieces[-1] = Piece(pieces[-1].text.partition(end)[0] + end, None)
        for i, piece in enumerate(pieces):
            if piece.turn is None:
                # spaces before an answer go with it: " 7" is one token where " " and "7" would be two
                answered = (
                    i + 1 < len(pieces) and (following := pieces[i + 1].turn) is not None and following.supervised
                )
                ends = answered or (generation and i + 1 == len(pieces))
                body = piece.text.rstrip(" ") if ends else piece.text
                dividers += ["template"] * body.count(self.divider)
                text += body
                if answered:
                    dividers.append("answer")
                    text += self.divider + piece.text[len(body) :]
            else:
                dividers += ["media"] * piece.text.count(MEDIA)
                text += piece.text.replace(MEDIA, self.divider)
        return text, dividers

    def _assemble(self, ids: Sequence[int], dividers: Sequence[str], media: Sequence[MediaItem], where: str) -> Sample:
        """Token ids with dividers to a Sample: expand media, drop answer marks, label up to the end of turn."""
        if sum(i == self.divider_id for i in ids) != len(dividers):
            raise Unsupported(f"{where}: the tokenizer does not keep its special token {self.divider!r} apart")
        input_ids: list[int] = []
        labels: list[int] = []
        modality_ids: list[int] = []
        kinds, items, supervised = iter(dividers), iter(media), False
        for token in ids:
            kind = next(kinds) if token == self.divider_id else "template"
            if kind == "answer":
                supervised = True
                continue
            if kind == "media":
                item = next(items)
                input_ids += [0] * item.count
                labels += [IGNORE] * item.count
                modality_ids += [MODALITIES.index(item.modality) + 1] * item.count
                continue
            input_ids.append(token)
            labels.append(token if supervised and input_ids[1:] else IGNORE)  # nothing predicts the first token
            modality_ids.append(0)
            if token in self._control_ids:
                supervised = False
        return Sample(
            where,
            torch.tensor(input_ids, dtype=torch.int64),
            torch.tensor(labels, dtype=torch.int64),
            torch.tensor(modality_ids, dtype=torch.uint8),
            list(media),
        )


def _messages(conversation: Conversation) -> tuple[str, list[Message]]:
    """The sample's name and its messages."""
    name, messages = "conversation", conversation
    if isinstance(conversation, Mapping):
        if "messages" not in conversation:
            raise BadSample(f"a conversation needs the key 'messages', given {', '.join(map(str, conversation))}")
        name, messages = str(conversation.get("id", name)), conversation["messages"]
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise BadSample(f"{name}: expected a list of messages, given {messages!r:.60}")
    for message in messages:
        if not isinstance(message, Mapping):
            raise BadSample(f"{name}: a message is a mapping with 'role' and 'content', given {message!r:.60}")
    return name, list(messages)


def _parts(content: Any, where: str) -> list[Part]:
    """A message's content as parts; a string is one text part, a video is its frames as images."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or not all(isinstance(p, Mapping) for p in content):
        raise BadSample(f"{where}: content must be a string or a list of parts, given {content!r:.60}")
    parts: list[Part] = []
    for part in content:
        kind = part.get("type")
        if kind not in PART_KEYS:
            raise BadSample(
                f"{where}: unknown part type {kind!r}; valid: {', '.join(PART_KEYS)}{nearest(str(kind), PART_KEYS)}"
            )
        _known(part, ("type", *PART_KEYS[kind]), f"{where}: key of a {kind} part")
        if not any(key in part for key in (kind, "features")):
            raise BadSample(f"{where}: a {kind} part needs the key {kind!r}")
        parts += [{"type": "image", "image": frame} for frame in part["video"]] if kind == "video" else [part]
    return parts


def _known(given: Mapping[str, Any], valid: Sequence[str], what: str) -> None:
    for key in given:
        if key not in valid:
            raise BadSample(f"{what} {key!r} is unknown; valid: {', '.join(valid)}{nearest(str(key), valid)}")


def _divider(tokenizer: Any) -> tuple[str, int]:
    """A special token that splits text without touching its neighbours: its text and id.

    Never the unknown token: its id also stands for unknown words.
    """
    for i, token in tokenizer.added_tokens_decoder.items():
        if token.special and not (token.lstrip or token.rstrip) and token.content != tokenizer.unk_token:
            return token.content, i
    raise Unsupported("the tokenizer has no special token that could mark where media stand")
