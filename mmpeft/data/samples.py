"""The one sample form that every reader gives: `{"id", "messages", "kind"?, "answers"?}`.

`messages` is the chat form of `MultimodalLM.encode`:

    [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is this?"}]},
     {"role": "assistant", "content": "a cat"}]

`kind` groups a score ("yes/no", "which_digit"); `answers` are the references a metric compares with (ten in VQA v2,
five in COCO). Media stay paths, PIL images or arrays until the encoder's `preprocess` decodes them, in a worker.
What a message may hold is said by `multimodal.conversation`, which reads it.
This file holds the constructors, the walk over the media of a conversation, and the check that a sample is well formed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from mmpeft.encoders.audio_preprocess import load_audio
from mmpeft.encoders.image_preprocess import load_image
from mmpeft.errors import BadSample, ConfigError, NameNotFound, nearest
from mmpeft.multimodal.conversation import MESSAGE_KEYS, PART_KEYS, ROLES

Sample = dict[str, Any]
Message = dict[str, Any]

SAMPLE_KEYS = ("id", "messages", "kind", "answers")


class ConversationDataset(Dataset[Sample]):
    """Base of the readers: map-style, `len` and integer index, samples in the form above, media not yet decoded.

    Any other map-style dataset of such samples works as well; the base adds iteration and the estimate for bucketing.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def length_hint(self, index: int) -> int:
        """About how long sample `index` is, in characters; batches are bucketed by it. Must not decode media."""
        return length_hint(self[index])


def length_hint(sample: Mapping[str, Any]) -> int:
    """Characters of a conversation, each image or sound counted as 256 (about 64 tokens), or of a labelled text."""
    if "messages" not in sample:
        value = sample.get("input")
        return len(value) if isinstance(value, str) else 0
    total = 0
    for message in sample["messages"]:
        content = message["content"]
        parts = [text(content)] if isinstance(content, str) else content
        total += sum(len(part["text"]) if part["type"] == "text" else 256 for part in parts)
    return total


def text(value: str) -> dict[str, Any]:
    """A text part of a message."""
    return {"type": "text", "text": value}


def media(modality: str, value: Any) -> dict[str, Any]:
    """An image or audio part of a message; `value` is a path, PIL image, array or tensor."""
    return {"type": modality, modality: value}


def question_answer(
    id: str,
    question: str,
    answer: str | None,
    *,
    images: Sequence[Any] = (),
    audio: Sequence[Any] = (),
    kind: str | None = None,
    answers: Sequence[str] | None = None,
    system: str | None = None,
) -> Sample:
    """One question over some media (which come first, as LLaVA trains) and its answer; no answer, no such turn."""
    content = [*(media("image", i) for i in images), *(media("audio", a) for a in audio), text(question)]
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": content})
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    sample: Sample = {"id": id, "messages": messages}
    if kind is not None:
        sample["kind"] = kind
    given = answers if answers is not None else [answer] if answer is not None else []
    sample["answers"] = list(given)
    return sample


def media_parts(sample: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The image and audio parts of a sample, in the order in which the model sees them."""
    for message in sample["messages"]:
        if isinstance(message["content"], list):
            yield from (part for part in message["content"] if part["type"] != "text")


def question_text(sample: Mapping[str, Any]) -> str:
    """All that a language-only model sees: the text of every turn before the last assistant turn."""
    turns = sample["messages"][:-1] if sample["messages"][-1]["role"] == "assistant" else sample["messages"]
    words = []
    for message in turns:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
        words.extend(parts)
    return " ".join(words)


def check_messages(id: str, messages: Any) -> None:
    """Refuse a malformed conversation.

    Raises:
        BadSample: naming the sample, the turn and the nearest valid name.
    """
    if not isinstance(messages, list) or not messages:
        raise BadSample(f"sample {id!r}: messages must be a non-empty list, got {messages!r:.80}")
    for turn, message in enumerate(messages):
        where = f"sample {id!r}, message {turn}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise BadSample(f"{where}: expected {{'role', 'content'}}, got {message!r:.80}")
        _refuse_unknown(message, MESSAGE_KEYS, where)
        if message["role"] not in ROLES:
            role = str(message["role"])
            raise BadSample(f"{where}: unknown role {role!r}; roles are {', '.join(ROLES)}{nearest(role, ROLES)}")
        content = message["content"]
        if not isinstance(content, str | list):
            raise BadSample(f"{where}: content must be a string or a list of parts, got {type(content).__name__}")
        for part in content if isinstance(content, list) else ():
            _check_part(where, part)


def _check_part(where: str, part: Any) -> None:
    if not isinstance(part, Mapping) or part.get("type") not in PART_KEYS:
        given = str(part.get("type")) if isinstance(part, Mapping) else repr(part)
        hint = nearest(given, PART_KEYS)
        raise BadSample(f"{where}: unknown part type {given!r}; types are {', '.join(PART_KEYS)}{hint}")
    kind = part["type"]
    _refuse_unknown(part, ("type", *PART_KEYS[kind]), f"{where}, a part of type {kind}")
    if len({kind, "features"} & set(part)) != 1:
        needed = " or ".join(key for key in PART_KEYS[kind] if key in (kind, "features"))
        raise BadSample(f"{where}: a part of type {kind} needs one of {needed}; has {sorted(part)}")
    if kind == "text" and not isinstance(part["text"], str):
        raise BadSample(f"{where}: text must be a string, got {type(part['text']).__name__}")


def _refuse_unknown(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise BadSample(f"{where}: unknown key {key!r}; keys are {', '.join(known)}{nearest(str(key), known)}")


def check_sample(sample: Any) -> None:
    """Refuse a sample that is not of the form above, or that teaches nothing (no non-empty assistant turn).

    Raises:
        BadSample: naming the sample.
    """
    if not isinstance(sample, Mapping) or not {"id", "messages"} <= set(sample):
        raise BadSample(f"a sample needs the keys 'id' and 'messages', got {sample!r:.120}")
    unknown = sorted(set(sample) - set(SAMPLE_KEYS))
    if unknown:
        hints = nearest(unknown[0], SAMPLE_KEYS)
        raise BadSample(f"sample {sample['id']!r}: unknown keys {unknown}; keys are {', '.join(SAMPLE_KEYS)}{hints}")
    check_messages(sample["id"], sample["messages"])
    answered = [m for m in sample["messages"] if m["role"] == "assistant" and _plain(m["content"]).strip()]
    if not answered:
        raise BadSample(f"sample {sample['id']!r}: no supervised token (no assistant turn with text)")


def _plain(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


def check_media_files(sample: Mapping[str, Any]) -> None:
    """Decode every image and sound of a sample.

    Raises:
        BadSample: naming the sample, for a file that is missing or cannot be decoded.
        MissingExtra: a sound that is no 16-bit WAV, without the library to read it.
    """
    for part in media_parts(sample):
        kind = part["type"]
        try:
            for image in part["video"] if kind == "video" else [part["image"]] if "image" in part else []:
                open_image(image, sample["id"])
            if "audio" in part:
                load_audio(part["audio"], int(part.get("sampling_rate", 1)))
        except BadSample as error:
            named = repr(sample["id"]) in str(error)
            raise error if named else BadSample(f"sample {sample['id']!r}: {error}") from error


def open_image(value: Any, id: str = "?") -> Any:
    """A decoded RGB `PIL.Image` of a path, picture or array.

    Raises:
        BadSample: naming the sample, for what is missing, truncated or no image.
    """
    try:
        return load_image(value)
    except BadSample as error:
        raise BadSample(f"sample {id!r}: {error}") from error


def check_keys(given: Sequence[str], *, known: Sequence[str], required: Sequence[str] = (), where: str) -> None:
    """Refuse unknown and missing keys or columns, with the nearest valid name.

    Raises:
        NameNotFound: naming the key, the place, and the nearest name.
    """
    for key in given:
        if key not in known:
            hint = nearest(str(key), known)
            raise NameNotFound(f"{where}: unknown key {key!r}; known keys are {', '.join(known)}{hint}")
    for key in required:
        if key not in given:
            hint = nearest(key, [str(g) for g in given])
            raise NameNotFound(f"{where}: missing key {key!r}; it has {', '.join(map(str, given)) or 'none'}{hint}")


def located(folder: str | os.PathLike[str] | None, name: str) -> str:
    """`name` under `folder`, unless it is absolute already."""
    return name if folder is None or os.path.isabs(name) else os.path.join(folder, name)


def positive(name: str, value: int) -> int:
    """`value`, refused unless it is 1 or more."""
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value}")
    return value
