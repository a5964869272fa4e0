"""One list of public names: mmpeft/adapters/__init__.py, which mmpeft gives as its own, at run time and to type checkers."""

import ast
import types
from pathlib import Path

import mmpeft
from mmpeft import adapters

IMPORTS = [
    n for n in ast.parse(Path(adapters.__file__).read_text(encoding="utf-8")).body if isinstance(n, ast.ImportFrom)
]


def test_mmpeft_gives_what_the_page_lists():
    listed = {alias.asname or alias.name for node in IMPORTS for alias in node.names}
    assert set(adapters.__all__) == listed and {"LoRA", "attach", "merge", "Plan"} <= listed
    assert [name for name in listed if getattr(mmpeft, name) is not getattr(adapters, name)] == []


def test_a_sub_module_is_no_name_of_another_package():
    """`import *` would take mmpeft.adapters.plan and its like along."""
    modules = {name: x.__name__ for name, x in vars(mmpeft).items() if isinstance(x, types.ModuleType)}
    assert modules == {name: f"mmpeft.{name}" for name in modules}


def test_every_name_is_re_exported_for_type_checkers():
    """Without `as`, mypy --strict and pyright take an import for the page's own use, and the star passes it over."""
    plain = [f"{node.module}: {alias.name}" for node in IMPORTS for alias in node.names if alias.asname != alias.name]
    assert plain == []


def test_the_package_says_that_it_is_typed():
    assert Path(mmpeft.__file__).with_name("py.typed").is_file()
