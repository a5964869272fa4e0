"""docs/methods.md is what the registry says, and no name of the survey is lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from formulas import env_of, evaluate, varied
from names import ALIASES, BESIDE, BUILT, OPTIONS, PENDING, RANGES, ROWS, WHERE

import mmpeft
from mmpeft.adapters import catalogue
from mmpeft.adapters.families import FACTS, FAMILIES
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
        "low-rank and structured, LR1",
        "`rank (in + out)`",
        "12,288",
        "matrix",
        "yes",
        "yes",
        "",
        "both ways",
    )
    assert cells["LoRADropout"][10] == "`Masks`"
    assert cells["OFT"][6:10] == ("11,904", "matrix", "yes", "no")  # 24 blocks of 32 * 31 / 2
    assert cells["RED"][6:10] == ("1,536", "call", "no", "yes")
    assert all(row[2] for row in cells.values()), "every method says what it is"
    unpublished = {"Full", "Sparse"}  # what they are needs no paper
    elsewhere = {"HiRA", "DnA", "SHPEFT"}  # ICLR 2025 and ECCV 2022 without a preprint; a source that could not be read
    assert {name for name, row in cells.items() if not row[3]} == unpublished | elsewhere


def test_no_row_of_the_survey_is_missing():
    """Every number of every family's range, each of its names in WHERE and each name of WHERE in a row (or BESIDE)."""
    assert list(ROWS) == [f"{family}{n}" for family, most in RANGES.items() for n in range(1, most + 1)]
    named = [name for names in ROWS.values() for name in names]
    assert set(named) | set(BESIDE) == set(WHERE) and not set(named) & set(BESIDE)
    for facts in FACTS.values():
        letters = facts.row.rstrip("0123456789")
        assert letters in FAMILIES and (facts.row in ROWS or letters not in RANGES or facts.row == letters), facts


def test_a_methods_row_is_that_of_its_name():
    """The row that `families.py` gives a class is one where names.py has the class."""
    rows = {}
    for row, names in ROWS.items():
        for name in names:
            rows.setdefault(WHERE[name], set()).add(row)
    for name, facts in FACTS.items():
        if name in rows:
            assert facts.row in rows[name], (name, facts.row, rows[name])


@pytest.mark.parametrize("cls", catalogue.methods(), ids=lambda c: c.__name__)
def test_the_formula_is_the_count(cls):
    """At two shapes, for the default fields, for each field changed alone, and for each option with a formula of its own;
    each on the meta device."""
    facts, tried = FACTS[cls.__name__], 0
    for shape in ((96, 64), (64, 128)):
        for method, formula, count in varied(cls, facts, shape):
            assert evaluate(formula, env_of(method, shape)) == count, f"{method} at {shape}: {formula}"
            tried += 1
    assert tried >= 2 * (1 + len(facts.other))


def test_formulas_are_read_as_products_and_powers():
    env = {"rank": 3, "in": 5, "out": 7, "b": 2}
    assert evaluate("rank (in + out)", env) == 36 and evaluate("2 in b^3 - out", env) == 73
    assert evaluate("in out / (b b) rank", {**env, "in": 4}) == 21 and evaluate("max(in, out) b", env) == 14
    assert evaluate("(rank (in + out) if 2 rank < out else in out)", env) == 36
    assert evaluate("round(b in / 4)", env) == 2 and evaluate("ceil(out / rank) in", env) == 15


def resolved(path):
    """The object behind `Name`, `function` or `tasks.Name`."""
    home, _, name = path.rpartition(".")
    return getattr(mmpeft.tasks if home.endswith("tasks") else mmpeft, name)


def test_what_is_asked_for_by_name_is_code_that_a_test_names():
    tests = [p for p in PAGE.parents[1].joinpath("tests").rglob("test_*.py")] + [*Path(__file__).parent.glob("*.py")]
    words = {w for p in tests if p.name != "names.py" for w in re.findall(r"\w+", p.read_text(encoding="utf-8"))}
    classes = {cls.__name__ for cls in catalogue.methods()}
    assert not classes & set(BUILT.values()) & set(WHERE.values()), "WHERE names these already"
    for name, path in BUILT.items() | {(name, where) for name, where in WHERE.items() if where in classes}:
        assert callable(resolved(path)), name
        assert path.rpartition(".")[2] in words, f"no test names {path}"
    for name, (cls, options) in OPTIONS.items():
        assert resolved(cls)(**options), name


def test_the_surveys_other_names_are_aliases_and_the_docstring_or_file_says_so():
    silent = []
    for alias, name in ALIASES.items():
        cls = resolved(name)
        assert REGISTRY[alias.lower()] is cls, alias
        if alias.lower() == name.lower():
            continue
        words = r"[-_ ]".join(map(re.escape, re.split(r"[-_ ]", alias)))  # predict-lora is "Predict LoRA"
        said = f"{cls.__doc__}\n{catalogue.module_doc(cls)}"
        if not re.search(rf"(?<!\w){words}(?![\w+])", " ".join(said.split()), re.IGNORECASE):
            silent.append(f"{name}: {alias}")
    assert silent == []


def test_what_an_entry_puts_in_backticks_exists():
    """Of the entries that are no class: the first word in each pair of backticks that looks like one of ours."""
    known = {"use", "merge"}
    for other in catalogue.OTHERS:
        for code in re.findall(r"`([^`]+)`", other.here):
            word = re.match(r"(?:mmpeft\.)?((?:tasks\.)?[A-Za-z_]\w*)", code)
            if word and word[1] not in known and not code.endswith(".py"):
                assert callable(resolved(word[1])), f"{other.name}: {code}"
