"""Pictures and videos inside the page, as data URIs, up to a budget; what does not fit is named with its size and linked.

A page is drawn twice: once with no file inside, which tells what is asked for and how long the page is without it, and
once with the files that fit into the rest. Files are admitted by turns (the first of every group, then the second, ...),
so that no arm of a comparison takes the room of another.
"""

from __future__ import annotations

import base64
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from mmpeft.report.markup import Html, tag, text
from mmpeft.report.wording import size

KINDS = {
    ".mp4": "video/mp4", ".webm": "video/webm",
    ".gif": "image/gif", ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg",
}  # fmt: skip
OVERHEAD = 256  # bytes of a player beside its data and its text
# What begins the files, so that a file of another kind, or one cut short, is named instead of shown broken.
_STARTS = {".gif": b"GIF8", ".png": b"\x89PNG", ".jpg": b"\xff\xd8", ".jpeg": b"\xff\xd8", ".webm": b"\x1a\x45\xdf\xa3"}
_PLAYED = (b"avc1", b"av01", b"vp09")  # codecs of mp4 that browsers play: H.264, AV1, VP9


@dataclass(frozen=True)
class Asked:
    """A file that a section wants to show; `turn` is its place in its group."""

    path: Path
    turn: int
    cost: int  # bytes in the page
    problem: str | None  # why it cannot be shown at all


class Media:
    """The files of one drawing of the page.

    Args:
        base: folder the page will lie in, for links. admitted: files to embed; None only asks.
    """

    def __init__(self, base: Path, admitted: frozenset[Path] = frozenset()) -> None:
        self.base, self.admitted = base, admitted
        self.asked: dict[Path, Asked] = {}

    def show(self, path: Path, *, alt: str, turn: int = 0) -> Html:
        """The file as a player or picture, or a line that names it."""
        asked = self.asked.setdefault(path, _ask(path, alt, turn))
        if path not in self.admitted or asked.problem:
            return tag("p", self.named(asked), class_="absent")
        data = f"data:{KINDS[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
        return _PLAYERS[KINDS[path.suffix].partition("/")[0]](data, alt)

    def named(self, asked: Asked) -> Html:
        """A line for a file that is not in the page: its link, its size, and why."""
        why = asked.problem or "not in the page, which would grow beyond its budget"
        link = tag("a", asked.path.name, href=quote(os.path.relpath(asked.path, self.base).replace(os.sep, "/")))
        return tag("span", link, f" ({size(asked.path.stat().st_size)}): {why}")

    def left_out(self) -> list[Asked]:
        """What was asked for and is not in the page."""
        return [a for a in self.asked.values() if a.path not in self.admitted or a.problem]


def admit(asked: list[Asked], room: int) -> frozenset[Path]:
    """The files that fit into so many bytes, by turns; a smaller one may fit where a larger did not."""
    chosen = set()
    for one in sorted(asked, key=lambda a: a.turn):
        if not one.problem and one.cost <= room:
            chosen.add(one.path)
            room -= one.cost
    return frozenset(chosen)


def _ask(path: Path, alt: str, turn: int) -> Asked:
    length = path.stat().st_size
    return Asked(path, turn, 4 * -(-length // 3) + len(text(alt).encode()) + OVERHEAD, _problem(path, length))


def _problem(path: Path, length: int) -> str | None:
    """Why a browser will not show a file, from what it holds."""
    if not length:
        return "the file is empty"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if path.suffix != ".mp4":
            return None if data[:4].startswith(_STARTS[path.suffix]) else f"no {path.suffix[1:]} file"
        boxes = _boxes(data)
        if boxes is None or "moov" not in boxes:
            return "no whole mp4 file"
        playable = any(data.find(codec, *boxes["moov"]) >= 0 for codec in _PLAYED)
        return None if playable else "browsers do not play its codec"


def _boxes(data: mmap.mmap | bytes) -> dict[str, tuple[int, int]] | None:
    """Name -> (first byte, end) of the outer boxes of an mp4 file; None where they do not end with the file."""
    found, at = {}, 0
    while at + 8 <= len(data):
        length, name = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8].decode("latin-1")
        length = {0: len(data) - at, 1: int.from_bytes(data[at + 8 : at + 16])}.get(length, length)
        if length < 8:
            return None
        found[name] = (at, at + length)
        at += length
    return found if at == len(data) and "ftyp" in found else None


def _video(data: str, alt: str) -> Html:
    flags = {"controls": "", "loop": "", "muted": "", "playsinline": "", "preload": "metadata"}
    return tag("video", src=data, aria_label=alt, **flags)


def _image(data: str, alt: str) -> Html:
    return tag("img", src=data, alt=alt)


_PLAYERS: dict[str, Callable[[str, str], Html]] = {"video": _video, "image": _image}
