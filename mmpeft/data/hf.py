"""Hugging Face datasets as conversations or labelled samples: from the hub, a folder on disk, or a `Dataset` in hand.

    HuggingFace("lmms-lab/VQAv2", split="validation", columns={"answer": "multiple_choice_answer"})
    HuggingFace("data/cauldron-vqa")                      # a folder written by save_to_disk; columns images, texts
    HuggingFaceLabels("beans", split="train", modality="image", target="labels")

`columns` maps this package's names to the data set's; a name that is the same need not be given. Rows are read as Arrow
values, so nothing is decoded before it is asked for, in a worker; lengths for bucketing read the text columns only.
"""

from __future__ import annotations

import io
import wave
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmpeft.data.classification import LabelledDataset, Labels
from mmpeft.data.llava import place_media
from mmpeft.data.samples import ConversationDataset, Message, Sample, check_keys, media, question_answer, text
from mmpeft.errors import BadSample, ConfigError, NameNotFound, nearest, require

MEDIA = ("image", "images", "audio", "audios")
TEXTS = ("id", "question", "answer", "answers", "kind", "messages", "texts")


def load_dataset(dataset: Any, name: str | None = None, split: str | None = None) -> Any:
    """A map-style `datasets.Dataset`.

    Args:
        dataset: a Dataset, a folder written by `save_to_disk`, or a hub id (or local path) for `datasets.load_dataset`.
        name: the configuration of a hub data set.
        split: needed where there are several.

    Raises:
        NameNotFound: no such split, with the nearest. ConfigError: a streaming data set. MissingExtra: no `datasets`.
    """
    library = require("datasets", "data")
    found = dataset
    if isinstance(dataset, str | Path):
        folder = Path(dataset).expanduser()
        saved = any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json"))
        found = library.load_from_disk(str(folder)) if saved else library.load_dataset(str(dataset), name)
    if isinstance(found, library.DatasetDict):
        if split is None and len(found) == 1:
            split = next(iter(found))
        if split not in found:
            raise NameNotFound(f"split {split!r}: the data set has {', '.join(found)}{nearest(str(split), found)}")
        found = found[split]
    if not isinstance(found, library.Dataset):
        raise ConfigError(f"expected a map-style datasets.Dataset, got {type(found).__name__}")
    return found


class _Rows:
    """Rows of a data set as plain values, media as {"bytes", "path"}; `columns` gives our name -> the data set's."""

    def __init__(self, dataset: Any, columns: Mapping[str, str], *, known: tuple[str, ...]) -> None:
        check_keys(list(columns), known=known, where="columns")
        for ours, theirs in columns.items():
            if theirs not in dataset.column_names:
                hint = nearest(theirs, dataset.column_names)
                names = ", ".join(dataset.column_names)
                raise NameNotFound(f"columns[{ours!r}]: the data set has no column {theirs!r}; it has {names}{hint}")
        same = {name: name for name in known if name in dataset.column_names and name not in columns}
        self.columns = {**same, **columns}
        self.dataset = dataset
        self._read = self._reader(tuple(self.columns))
        self._read_text = self._reader(tuple(c for c in self.columns if c not in MEDIA))

    def _reader(self, names: tuple[str, ...]) -> Any:
        return self.dataset.select_columns([self.columns[n] for n in names]).with_format("arrow") if names else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._read[index].to_pylist()[0]
        return {ours: row[theirs] for ours, theirs in self.columns.items()}

    def text_length(self, index: int) -> int:
        """Characters in the text columns of a row."""
        return len(str(self._read_text[index].to_pylist()[0])) if self._read_text is not None else 0


class HuggingFace(ConversationDataset):
    """Conversations out of a Hugging Face data set.

    A row needs `question`, `messages`, or `texts` ([{"user", "assistant"}], The Cauldron and FineVision); without any
    of them `prompt` is what the user asks (captioning). `answers` may be strings or {"answer": ...} records; the
    training answer is `answer`, or the most frequent of `answers`.

    Args:
        dataset, name, split: see `load_dataset`.
        columns: this package's names (image, images, audio, audios, id, question, answer, answers, kind, messages,
            texts) -> column names.
        prompt: what the user asks, `{question}` filled in.

    Raises:
        NameNotFound: unknown name, column or split, with the nearest. ConfigError: no column to learn from.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        name: str | None = None,
        split: str | None = None,
        columns: Mapping[str, str] | None = None,
        prompt: str = "{question}",
    ) -> None:
        self.rows = _Rows(load_dataset(dataset, name, split), columns or {}, known=(*MEDIA, *TEXTS))
        self.prompt = prompt
        has = self.rows.columns
        if not {"messages", "texts"} & set(has) and "{question}" in prompt and "question" not in has:
            names = ", ".join(self.rows.dataset.column_names)
            raise ConfigError(
                f"no question, messages or texts among the columns {names}: map one with columns={{'question': ...}}, "
                "or give a fixed prompt"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def length_hint(self, index: int) -> int:
        return self.rows.text_length(index)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        id = str(row.get("id", f"row {index}"))
        images = [open_bytes(id, value) for key in ("image", "images") for value in _listed(row.get(key))]
        audio = [decode_audio(id, value) for key in ("audio", "audios") for value in _listed(row.get(key))]
        kind = row.get("kind")
        if row.get("messages") is not None:
            messages = _messages(id, row["messages"], images, audio)
        elif row.get("texts") is not None:
            turns = [(role, turn[role]) for turn in row["texts"] for role in ("user", "assistant")]
            messages = place_media(id, _with_markers(turns, images, audio), images=images, audio=audio)
        else:
            answers = [a["answer"] if isinstance(a, dict) else a for a in row.get("answers") or []]
            common = Counter(answers).most_common(1)[0][0] if answers else None
            question = self.prompt.format(question=row.get("question"))
            answer = row.get("answer") if row.get("answer") is not None else common
            return question_answer(id, question, answer, images=images, audio=audio, kind=kind, answers=answers or None)
        sample: Sample = {"id": id, "messages": messages}
        last = messages[-1]
        sample["answers"] = row.get("answers") or ([last["content"]] if last["role"] == "assistant" else [])
        return {**sample, "kind": kind} if kind is not None else sample


class HuggingFaceLabels(LabelledDataset):
    """Labelled inputs out of a Hugging Face data set, for classification and regression.

    Args:
        dataset, name, split: see `load_dataset`.
        modality: "image", "audio" or "text".
        input, target: column names; `input` defaults to the modality.
        regression: the target is a number, not a class.
        classes: class names in order; default the data set's own `ClassLabel`, else the sorted labels.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        name: str | None = None,
        split: str | None = None,
        modality: str = "image",
        input: str | None = None,
        target: str = "label",
        regression: bool = False,
        classes: list[str] | None = None,
    ) -> None:
        loaded = load_dataset(dataset, name, split)
        check_keys([modality], known=("image", "audio", "text"), where="modality")
        columns = {modality: input or modality, "target": target}
        self.rows = _Rows(loaded, columns, known=("image", "audio", "text", "target"))
        feature = loaded.features[target]
        labels = loaded.with_format("arrow")[target]
        values = labels.to_pylist() if hasattr(labels, "to_pylist") else list(loaded[target])
        if hasattr(feature, "int2str") and not regression:  # a ClassLabel stores numbers and knows their names
            classes = classes or list(feature.names)
            values = [None if v is None or v < 0 else feature.int2str(v) for v in values]
        super().__init__(modality, Labels(values, classes=classes, regression=regression, where=f"column {target!r}"))

    def read(self, index: int) -> tuple[str, Any]:
        value, id = self.rows[index][self.modality], f"row {index}"
        if self.modality == "image":
            return id, open_bytes(id, value)
        return id, decode_audio(id, value) if self.modality == "audio" else value


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def open_bytes(id: str, value: Any) -> Any:
    """A stored image ({"bytes", "path"}, or a path) as a PIL image whose pixels are not decoded yet, or as its path."""
    if isinstance(value, dict):
        if value.get("bytes") is None:
            value = value.get("path")
        else:
            image = require("PIL.Image", "vision")
            try:
                return image.open(io.BytesIO(value["bytes"]))
            except OSError as error:
                raise BadSample(f"sample {id!r}: its image is no image that can be read: {error}") from error
    if not isinstance(value, str):
        raise BadSample(f"sample {id!r}: no image (the value is {value!r:.60})")
    return value


def decode_audio(id: str, value: Any) -> Any:
    """A stored sound ({"bytes", "path"}) as {"array", "sampling_rate"}, or its path."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or (value.get("bytes") is None and not isinstance(value.get("path"), str)):
        raise BadSample(f"sample {id!r}: no sound (the value is {value!r:.60})")
    if value.get("bytes") is None:
        return value["path"]
    try:
        with wave.open(io.BytesIO(value["bytes"])) as file:
            if file.getsampwidth() == 2:
                pcm = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float32) / 32768
                return {"array": pcm.reshape(-1, file.getnchannels()).T, "sampling_rate": file.getframerate()}
    except (wave.Error, EOFError):
        pass  # not 16-bit WAV
    soundfile = require("soundfile", "audio", "it reads sounds that are no 16-bit WAV")
    try:
        array, rate = soundfile.read(io.BytesIO(value["bytes"]), dtype="float32", always_2d=True)
    except Exception as error:  # soundfile's own class, which is not imported here
        raise BadSample(f"sample {id!r}: its sound cannot be read: {error}") from error
    return {"array": array.T, "sampling_rate": int(rate)}


def _with_markers(turns: list[tuple[str, str]], images: list[Any], audio: list[Any]) -> list[tuple[str, str]]:
    """The turns with markers for all media before the first, unless they have markers."""
    if any("<image>" in words or "<audio>" in words for _, words in turns):
        return turns
    (role, words), *others = turns
    return [(role, "<image>" * len(images) + "<audio>" * len(audio) + words), *others]


def _messages(id: str, given: list[Any], images: list[Any], audio: list[Any]) -> list[Message]:
    """Messages as stored: string contents with markers, or parts, whose media stand for the row's in order."""
    if all(isinstance(message["content"], str) for message in given):
        turns = [(message["role"], message["content"]) for message in given]
        return place_media(id, _with_markers(turns, images, audio), images=images, audio=audio)
    waiting = {"image": iter(images), "audio": iter(audio)}
    messages: list[Message] = []
    for message in given:
        content = message["content"]
        parts = [text(content)] if isinstance(content, str) else [_part(id, part, waiting) for part in content]
        plain = message["role"] != "user" and all(part["type"] == "text" for part in parts)
        messages.append(
            {"role": message["role"], "content": "".join(part["text"] for part in parts) if plain else parts}
        )
    left = sum(len(list(rest)) for rest in waiting.values())
    if left:
        raise BadSample(f"sample {id!r}: {left} media of the row are in no message")
    return messages


def _part(id: str, stored: dict[str, Any], waiting: dict[str, Any]) -> dict[str, Any]:
    """A part without the None that Arrow puts where other parts have a key."""
    part = {key: value for key, value in stored.items() if value is not None}
    kind = part.get("type")
    if kind not in waiting or kind in part:
        return part
    value = next(waiting[kind], None)
    if value is None:
        raise BadSample(f"sample {id!r}: more {kind} parts than {kind} files")
    return media(kind, value)
