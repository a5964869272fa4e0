"""docs/methods.md is what the registry says, and no name of the survey is lost."""

from __future__ import annotations

import re
from pathlib import Path

from names import ALIASES, BUILT, OPTIONS, PENDING, WHERE

import mmpeft
from mmpeft.adapters import catalogue
from mmpeft.adapters.method import REGISTRY

PAGE = Path(__file__).resolve().parents[3] / "docs" / "methods.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == catalogue.page(), (
        "run: python -m mmpeft.adapters.catalogue > docs/methods.md"
    )


def test_every_name_leads_to_a_class_or_to_a_reason():
    known = {cls.__name__ for cls in catalogue.methods()} | {other.name for other in catalogue.OTHERS}
    assert {name: where for name, where in WHERE.items() if where not in known} == {}
    assert len({o.name for o in catalogue.OTHERS}) == len(catalogue.OTHERS)


def test_what_is_pending_is_really_not_there():
    exported = catalogue.methods()
    built = {key.replace("-", "").replace("_", "") for key, cls in REGISTRY.items() if cls in exported} | {
        o.name.lower() for o in catalogue.OTHERS
    }
    assert [name for name in PENDING if name.lower().replace("-", "").replace(" ", "") in built] == []
    assert not set(PENDING) & set(WHERE)


def test_a_row_says_what_the_class_is():
    cells = {cls.__name__: catalogue.row(cls) for cls in catalogue.methods()}
    assert cells["LoRA"][3:] == (
        "[2106.09685](https://arxiv.org/abs/2106.09685)",
        "12,288",
        "matrix",
        "yes",
        "yes",
        "both ways",
    )
    assert cells["OFT"][4:8] == ("11,904", "matrix", "yes", "no")  # 24 blocks of 32 * 31 / 2
    assert cells["RED"][4:8] == ("1,536", "call", "no", "yes")
    assert all(row[2] for row in cells.values()), "every method says what it is"


def resolved(path):
    """The object behind `Name`, `function` or `tasks.Name`."""
    home, _, name = path.rpartition(".")
    return getattr(mmpeft.tasks if home.endswith("tasks") else mmpeft, name)


def test_what_is_asked_for_by_name_is_code_that_a_test_names():
    tests = [p for p in PAGE.parents[1].joinpath("tests").rglob("test_*.py")] + [*Path(__file__).parent.glob("*.py")]
    texts = [p.read_text(encoding="utf-8") for p in tests if p.name != "names.py"]
    for name, path in BUILT.items():
        assert callable(resolved(path)), name
        word = re.compile(rf"\b{path.rpartition('.')[2]}\b")
        assert any(word.search(text) for text in texts), f"no test names {path}"
    for name, (cls, options) in OPTIONS.items():
        assert resolved(cls)(**options), name


def test_the_surveys_other_names_are_aliases_and_the_docstring_or_file_says_so():
    for alias, cls in ALIASES.items():
        assert REGISTRY[alias] is resolved(cls), alias


def test_what_an_entry_puts_in_backticks_exists():
    """Of the entries that are no class: the first word in each pair of backticks that looks like one of ours."""
    known = {"use", "merge"}
    for other in catalogue.OTHERS:
        for code in re.findall(r"`([^`]+)`", other.here):
            word = re.match(r"(?:mmpeft\.)?((?:tasks\.)?[A-Za-z_]\w*)", code)
            if word and word[1] not in known and not code.endswith(".py"):
                assert callable(resolved(word[1])), f"{other.name}: {code}"
