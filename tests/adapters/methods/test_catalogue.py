"""docs/methods.md is what the registry says, and no name of the survey is lost."""

from __future__ import annotations

from pathlib import Path

from names import PENDING, WHERE

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
