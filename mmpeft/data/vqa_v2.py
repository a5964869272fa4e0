"""VQA v2: a questions file and an annotations file (OK-VQA has this form too).

    questions.json    {"data_subtype": "val2014", "questions": [{"question_id", "image_id", "question"}]}
    annotations.json  {"annotations": [{"question_id", "image_id", "answer_type", "multiple_choice_answer",
                                        "answers": [{"answer", "answer_id", ...} x 10]}]}

The training answer is `multiple_choice_answer` (the most frequent of the ten, as the data set gives it), `answers` are
the ten, `kind` is the answer type (yes/no, number, other), by which the official score is broken down.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from mmpeft.data.files import PathLike, existing, read_json
from mmpeft.data.samples import ConversationDataset, Sample, check_keys, question_answer
from mmpeft.errors import ConfigError, FileFormatError

_QUESTION = ("question_id", "image_id", "question")
_ANNOTATION = ("question_id", "answers")


class VQAv2(ConversationDataset):
    """Questions about images with ten answers each.

    Args:
        questions, annotations: paths of the JSON pair; without annotations the samples have no answer (for `predict`).
        images: folder of the image files.
        image_name: file name, `{image_id}` and `{subtype}` (the file's `data_subtype`) filled in.
        prompt: what the user asks, `{question}` filled in.

    Raises:
        NameNotFound: a file, the folder or a key is missing, with the nearest name.
        FileFormatError: not JSON, or the two files do not belong together.
    """

    def __init__(
        self,
        questions: PathLike,
        annotations: PathLike | None = None,
        *,
        images: PathLike,
        image_name: str = "COCO_{subtype}_{image_id:012d}.jpg",
        prompt: str = "{question}",
    ) -> None:
        if "{question}" not in prompt:
            raise ConfigError(f"prompt must contain '{{question}}', got {prompt!r}")
        self.images, self.prompt, self.image_name = existing(images, folder=True), prompt, image_name
        content = _object(questions, "questions")
        self.subtype = str(content.get("data_subtype", ""))
        self.questions: list[dict[str, Any]] = content["questions"]
        for number, question in enumerate(self.questions):
            where = f"{questions}, question {number}"
            check_keys(list(question), known=[*_QUESTION, *question], required=_QUESTION, where=where)
        self.annotations = None if annotations is None else _by_question(annotations)
        if self.annotations is not None:
            self._match(str(questions), str(annotations), self.annotations)

    def _match(self, questions: str, annotations: str, found: dict[Any, dict[str, Any]]) -> None:
        missing = [q["question_id"] for q in self.questions if q["question_id"] not in found]
        if missing:
            raise FileFormatError(
                f"{annotations} has no annotation for {len(missing)} of the {len(self.questions)} questions in "
                f"{questions} (the first is question_id {missing[0]}): do the two files belong to the same split?"
            )
        for question in self.questions:
            image = found[question["question_id"]].get("image_id", question["image_id"])
            if image != question["image_id"]:
                raise FileFormatError(
                    f"question_id {question['question_id']}: image_id {question['image_id']} in {questions}, "
                    f"{image} in {annotations}"
                )

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Sample:
        question = self.questions[index]
        try:
            name = self.image_name.format(image_id=question["image_id"], subtype=self.subtype)
        except (ValueError, KeyError) as error:  # a text id under ":012d", an unknown field
            given = question["image_id"]
            raise ConfigError(f"image_name {self.image_name!r} does not fit image_id {given!r}: {error}") from error
        image = str(self.images / name)
        text = self.prompt.format(question=question["question"])
        id = f"vqa/{question['question_id']}"
        if self.annotations is None:
            return question_answer(id, text, None, images=[image])
        annotation = self.annotations[question["question_id"]]
        answers = [a["answer"] if isinstance(a, dict) else a for a in annotation["answers"]]
        target = annotation.get("multiple_choice_answer") or Counter(answers).most_common(1)[0][0]
        return question_answer(id, text, target, images=[image], kind=annotation.get("answer_type"), answers=answers)


def _object(path: PathLike, key: str) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise FileFormatError(f"{path}: expected an object with {key!r}, got {type(content).__name__}")
    check_keys(list(content), known=[key, *content], required=[key], where=str(path))
    if not isinstance(content[key], list) or not content[key]:
        raise FileFormatError(f"{path}: {key!r} must be a non-empty list")
    return content


def _by_question(path: PathLike) -> dict[Any, dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for number, annotation in enumerate(_object(path, "annotations")["annotations"]):
        where = f"{path}, annotation {number}"
        check_keys(list(annotation), known=[*_ANNOTATION, *annotation], required=_ANNOTATION, where=where)
        if not annotation["answers"]:
            raise FileFormatError(f"{where}: no answers")
        found[annotation["question_id"]] = annotation
    return found
