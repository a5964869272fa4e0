"""`write`: one self-contained HTML page of a run's folder.

The page loads nothing: style and drawings are inline, pictures and videos are data URIs, and its content-security
policy forbids anything else, scripts included. It is drawn twice, first to learn how long it is without media, then with
the media that fit into the rest of the budget.
"""

from __future__ import annotations

import logging
import math
from datetime import UTC, datetime
from pathlib import Path

import mmpeft
from mmpeft.data.demos.store import atomic_write
from mmpeft.errors import ConfigError, NameNotFound
from mmpeft.report import about, answers, comparison, training
from mmpeft.report.logs import read_logs
from mmpeft.report.markup import Html, join, tag
from mmpeft.report.material import Material
from mmpeft.report.media import Media, admit
from mmpeft.report.run import Run
from mmpeft.report.sections import SECTIONS, Section

MEGABYTE = 1_000_000
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; base-uri 'none'; form-action 'none'"
)
STYLE = Path(__file__).with_name("style.css")
log = logging.getLogger(__name__)


def write(
    folder: str | Path, *, title: str | None = None, out: str | Path | None = None, budget_mb: float = 24
) -> Path:
    """Write the report of a run.

    Args:
        folder: of the run; what lies there decides what the page shows (see `mmpeft.report.sections`).
        title: heading; default the task of result.json, or the folder's name.
        out: file to write; default report.html in the folder. What was there is replaced in one move.
        budget_mb: megabytes the page may have. Pictures and videos beyond it are named and linked instead.

    Returns:
        The file.

    Raises:
        NameNotFound: no such folder, or nothing in it that a report shows; it says what was looked for.
        FileFormatError: a file that cannot be read, by name; nothing is written.
        ConfigError: a budget that does not hold the page without any media, an output that is a folder.
    """
    if not isinstance(budget_mb, int | float) or not math.isfinite(budget_mb) or budget_mb <= 0:
        raise ConfigError(f"budget_mb is the page's size in megabytes, a number above 0; got {budget_mb!r}")
    run = Run(folder)
    target = run.folder / "report.html" if out is None else Path(out)
    if target.is_dir():
        raise ConfigError(
            f"out is the file to write, and {str(target)!r} is a folder; did you mean {str(target / 'report.html')!r}?"
        )
    logs = read_logs(run)
    asking = Media(target.parent)
    bare = _page(Material(run, logs, asking), title).encode()
    budget = int(budget_mb * MEGABYTE)
    if len(bare) > budget:
        raise ConfigError(
            f"budget_mb={budget_mb:g} is too small: the page alone, without pictures and videos, has "
            f"{len(bare) / MEGABYTE:.2f} MB"
        )
    admitted = admit(list(asking.asked.values()), budget - len(bare))
    page = _page(Material(run, logs, Media(target.parent, admitted)), title) if admitted else Html(bare.decode())
    for one in asking.asked.values():
        if one.path not in admitted:
            log.warning("%s is not in the page: %s", one.path, one.problem or f"beyond budget_mb={budget_mb:g}")
    try:
        atomic_write(target, page.encode())
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {str(target)!r} ({error})") from error
    return target


def _page(material: Material, title: str | None) -> Html:
    drawn = [(s, content) for s in SECTIONS if (content := s.content(material)) is not None]
    if not any(section.alone for section, _ in drawn):
        raise NameNotFound(_nothing(material.run))
    name = title or _task(material) or material.run.folder.resolve().name
    today = datetime.now(UTC)
    links = [tag("a", section.title, href=f"#{section.name}") for section, _ in drawn]
    body = [
        tag("header", _over(material), tag("h1", name), _tiles(material),
            about.facts(material)),
        tag("nav", links, aria_label="Sections"),
        tag("main", [_section(section, content) for section, content in drawn]),
        tag("footer", tag("p", f"Written by mmpeft {mmpeft.__version__} on {today.day} {today:%B %Y}. One file: it "
                          "needs no network and runs no script.")),
    ]  # fmt: skip
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{name} · mmpeft"),
        tag("style", Html(STYLE.read_text(encoding="utf-8"))),
    ]
    return join(Html("<!doctype html>\n"), tag("html", tag("head", head), tag("body", body), lang="en"), Html("\n"))


def _section(section: Section, content: Html) -> Html:
    return tag("section", tag("h2", section.title, id=section.name), content, aria_labelledby=section.name)


def _tiles(material: Material) -> Html | None:
    """The run in large figures, from the most telling thing it holds."""
    return next((t for draw in (comparison, answers, training) if (t := draw.tiles(material)) is not None), None)


def _over(material: Material) -> Html:
    """The line above the heading: which folder, and when the run ended."""
    parts = (material.run.folder.as_posix(), about.dated(material))
    return tag("p", " · ".join(part for part in parts if part), class_="eyebrow")


def _task(material: Material) -> str | None:
    said = material.run.result.get("task")
    if isinstance(said, str) and said:
        return said
    tasks = {row["task"] for rollout in material.run.rollouts.values() for row in rollout.episodes}
    return tasks.pop() if len(tasks) == 1 else None


def _nothing(run: Run) -> str:
    wanted = sorted({name for section in SECTIONS if section.alone for name in section.reads})
    found = ", ".join(run.relative(p) for p in run.files[:6]) or "no file at all"
    more = f" and {len(run.files) - 6} more" if len(run.files) > 6 else ""
    return f"nothing to report in {str(run.folder)!r}: looked for {', '.join(wanted)}; found {found}{more}"
