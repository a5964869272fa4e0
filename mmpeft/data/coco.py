"""COCO captions: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`.

NoCaps has this form too. For training every caption is a sample of its own; for evaluation every image is one, with
all its captions as `answers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmpeft.data.files import PathLike, existing, read_json
from mmpeft.data.samples import ConversationDataset, Sample, check_keys, question_answer
from mmpeft.errors import FileFormatError


class CocoCaptions(ConversationDataset):
    """Images with captions.

    Args:
        annotations: path of the captions JSON.
        images: folder of the image files.
        per: "caption" (training: a sample a caption) or "image" (evaluation: a sample an image).
        prompt: what the user asks.

    Raises:
        NameNotFound: a file, the folder or a key is missing, with the nearest name.
        FileFormatError: not JSON, or a caption of an image that is not listed, or an image without captions.
    """

    def __init__(
        self,
        annotations: PathLike,
        *,
        images: PathLike,
        per: str = "caption",
        prompt: str = "Describe the image in one sentence.",
    ) -> None:
        check_keys([per], known=("caption", "image"), where="CocoCaptions(per=...)")
        self.images, self.prompt, self.per = existing(images, folder=True), prompt, per
        content = read_json(annotations)
        if not isinstance(content, dict):
            raise FileFormatError(f"{annotations}: expected an object, got {type(content).__name__}")
        check_keys(list(content), known=list(content), required=("images", "annotations"), where=str(annotations))
        self.names: dict[Any, str] = {}
        for number, image in enumerate(content["images"]):
            check_keys(
                list(image), known=list(image), required=("id", "file_name"), where=f"{annotations}, image {number}"
            )
            self.names[image["id"]] = image["file_name"]
        self.captions: dict[Any, list[str]] = {id: [] for id in self.names}
        for number, entry in enumerate(content["annotations"]):
            where = f"{annotations}, annotation {number}"
            check_keys(list(entry), known=list(entry), required=("image_id", "caption"), where=where)
            if entry["image_id"] not in self.names:
                raise FileFormatError(f"{where}: image_id {entry['image_id']} is not among the images")
            self.captions[entry["image_id"]].append(entry["caption"].strip())
        bare = [self.names[id] for id, captions in self.captions.items() if not captions]
        if bare or not self.names:
            which = f" (the first is {bare[0]})" if bare else ""
            raise FileFormatError(f"{annotations}: {len(bare)} of {len(self.names)} images have no caption{which}")
        self.index: Sequence[tuple[Any, int]] = [
            (id, k) for id, captions in self.captions.items() for k in range(len(captions) if per == "caption" else 1)
        ]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Sample:
        id, k = self.index[index]
        captions = self.captions[id]
        name = f"coco/{id}/{k}" if self.per == "caption" else f"coco/{id}"
        image = str(self.images / self.names[id])
        return question_answer(name, self.prompt, captions[k], images=[image], kind="caption", answers=captions)
