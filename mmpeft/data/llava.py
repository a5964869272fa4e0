"""LLaVA conversation JSON.

    [{"id": "1", "image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                       {"from": "gpt", "value": "a cat"}]}]

Each `<image>` in the text stands for the next image ("image" may be a list); the numbers must agree, or the sample is
refused by name (LLaVA itself would train on misplaced features). `audio` with `<audio>`, `system` turns and JSON lines
are read as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from mmpeft.data.files import JsonLinesFile, PathLike, existing, read_json
from mmpeft.data.samples import ConversationDataset, Message, Sample, check_keys, located, media, text
from mmpeft.errors import BadSample, FileFormatError, nearest

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
KEYS = ("id", "image", "images", "audio", "audios", "conversations", "kind")
_MARKER = re.compile(r"\s*<(image|audio)>\s*")


class LLaVA(ConversationDataset):
    """Conversations about images in LLaVA's form.

    Args:
        path: the .json list, or .jsonl.
        images: folder that relative image (and audio) names start from; default the file's own.
        ignore: further keys of the records that may be passed over ("model", "data_source", ...).

    Raises:
        NameNotFound: missing file or folder, missing or unknown key, with the nearest name.
        FileFormatError: no JSON, or no list of objects. BadSample: when a malformed sample is read.
    """

    def __init__(self, path: PathLike, *, images: PathLike | None = None, ignore: Sequence[str] = ()) -> None:
        self.path = existing(path)
        self.root = str(existing(images, folder=True)) if images is not None else str(self.path.parent)
        self.records: Any = JsonLinesFile(path) if self.path.suffix == ".jsonl" else read_json(path)
        if not isinstance(self.records, list | JsonLinesFile) or not len(self.records):
            given = type(self.records).__name__
            raise FileFormatError(f"{path}: expected a non-empty list of conversations, got {given}")
        for number in range(len(self.records)):
            record = self.records[number]
            if not isinstance(record, dict):
                raise FileFormatError(f"{path}, record {number}: expected an object, got {type(record).__name__}")
            where = f"{path}, record {number} (ignore=[...] passes keys over)"
            check_keys(list(record), known=[*KEYS, *ignore], required=("conversations",), where=where)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        id = str(record.get("id", f"{self.path.name}/{index}"))
        turns = record["conversations"]
        for turn in turns:
            if set(turn) != {"from", "value"} or turn["from"] not in ROLES:
                raise BadSample(
                    f"sample {id!r}: a turn needs 'from' ({', '.join(ROLES)}) and 'value', got {turn!r:.80}"
                    f"{nearest(str(turn.get('from')), ROLES)}"
                )
        messages = place_media(
            id,
            [(ROLES[turn["from"]], turn["value"]) for turn in turns],
            images=[located(self.root, name) for name in listed(record, "image")],
            audio=[located(self.root, name) for name in listed(record, "audio")],
        )
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        sample: Sample = {"id": id, "messages": messages, "answers": answers[-1:]}
        return {**sample, "kind": record["kind"]} if "kind" in record else sample


def listed(record: dict[str, Any], key: str) -> list[Any]:
    """`record[key]` (one or a list) or `record[key + "s"]`, as a list."""
    value = record.get(key, record.get(key + "s"))
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def place_media(
    id: str, turns: Sequence[tuple[str, str]], *, images: Sequence[Any], audio: Sequence[Any]
) -> list[Message]:
    """Messages with each `<image>` and `<audio>` marker of the turns replaced by the next image or sound.

    White space around a marker goes with it. An assistant turn stays a string.

    Raises:
        BadSample: more or fewer markers than media, or a marker in an assistant turn.
    """
    waiting: dict[str, Iterator[Any]] = {"image": iter(images), "audio": iter(audio)}
    given = {"image": len(images), "audio": len(audio)}
    used = {"image": 0, "audio": 0}
    messages: list[Message] = []
    for role, value in turns:
        pieces = _MARKER.split(value)  # text, marker, text, marker, ..., text
        if len(pieces) == 1:
            messages.append({"role": role, "content": value if role != "user" else [text(value)]})
            continue
        if role != "user":
            raise BadSample(f"sample {id!r}: a <{pieces[1]}> marker in a turn of the {role}")
        content = [text(pieces[0])] if pieces[0] else []
        for kind, words in zip(pieces[1::2], pieces[2::2], strict=True):
            used[kind] += 1
            content.append(media(kind, next(waiting[kind], None)))
            if words:
                content.append(text(words))
        messages.append({"role": role, "content": content})
    for kind, files in given.items():
        if used[kind] != files:
            raise BadSample(f"sample {id!r}: {used[kind]} <{kind}> markers for {files} {kind} files")
    return messages
