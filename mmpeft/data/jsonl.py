"""Your own data as JSON lines: one question and answer, or one conversation, a line.

    {"image": "cat.jpg", "question": "What is it?", "answer": "a cat"}
    {"images": ["a.jpg", "b.jpg"], "question": "Which is larger?", "answers": ["first", "the first"], "kind": "compare"}
    {"audio": "hello.wav", "question": "Write down what is said.", "answer": "hello"}
    {"images": ["a.jpg"], "messages": [{"role": "user", "content": "<image> What is it?"},
                                       {"role": "assistant", "content": "a cat"}]}          (on one line)

In `messages`, `<image>` and `<audio>` stand for the next file of the line (the form of ms-swift), or the parts are
written out as in `samples`. Relative names start from the file's own folder, or from `root`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmpeft.data.files import JsonLinesFile, PathLike, existing
from mmpeft.data.llava import listed, place_media
from mmpeft.data.samples import ConversationDataset, Sample, check_keys, check_messages, located, question_answer
from mmpeft.errors import FileFormatError

MEDIA = ("image", "images", "audio", "audios")
QUESTION = (*MEDIA, "id", "kind", "system", "question", "answer", "answers")
CONVERSATION = (*MEDIA, "id", "kind", "messages", "answers")


class JsonLines(ConversationDataset):
    """Questions or conversations, one a line.

    Args:
        path: the .jsonl file; it is read whole, its lines are parsed when asked for.
        root: folder that relative media names start from; default the file's own.
        prompt: what the user asks, `{question}` filled in (not used for `messages`).
        ignore: further keys that may be passed over.

    Raises:
        NameNotFound: missing file, missing or unknown key (with the line and the nearest key).
        FileFormatError: a line that is no JSON object, or gives both a name and its plural.
    """

    def __init__(
        self, path: PathLike, *, root: PathLike | None = None, prompt: str = "{question}", ignore: Sequence[str] = ()
    ) -> None:
        self.file = JsonLinesFile(path)
        self.root = str(existing(root, folder=True)) if root is not None else str(self.file.path.parent)
        self.prompt = prompt
        for index in range(len(self.file)):
            record, where = self.file[index], self.file.where(index)
            known = CONVERSATION if "messages" in record else QUESTION
            required = () if "messages" in record else ("question",)
            check_keys(list(record), known=[*known, *ignore], required=required, where=where)
            for one in ("image", "audio"):
                if one in record and one + "s" in record:
                    raise FileFormatError(f"{where}: both {one!r} and {one + 's'!r}; give one of them")

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, index: int) -> Sample:
        record = self.file[index]
        id = str(record.get("id", self.file.where(index)))
        images, audio = ([located(self.root, name) for name in listed(record, kind)] for kind in ("image", "audio"))
        answers = record.get("answers")
        if "messages" not in record:
            return question_answer(
                id,
                self.prompt.format(question=record["question"]),
                record.get("answer", answers[0] if answers else None),
                images=images,
                audio=audio,
                kind=record.get("kind"),
                answers=answers,
                system=record.get("system"),
            )
        check_messages(id, record["messages"])
        messages = self._messages(id, record["messages"], images, audio)
        last = messages[-1]
        answers = answers or ([last["content"]] if last["role"] == "assistant" else [])
        sample: Sample = {"id": id, "messages": messages, "answers": answers}
        return {**sample, "kind": record["kind"]} if "kind" in record else sample

    def _messages(self, id: str, given: list[Any], images: list[str], audio: list[str]) -> list[Any]:
        if all(isinstance(message["content"], str) for message in given):
            return place_media(id, [(m["role"], m["content"]) for m in given], images=images, audio=audio)
        messages = []
        for message in given:  # parts written out: only their relative names are completed
            content = message["content"]
            if isinstance(content, list):
                content = [
                    {**part, part["type"]: located(self.root, part[part["type"]])}
                    if part["type"] != "text" and isinstance(part.get(part["type"]), str)
                    else part
                    for part in content
                ]
            messages.append({**message, "content": content})
        return messages
