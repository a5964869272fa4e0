"""No example without a test: each file's name stands in a test of this folder."""

from .conftest import ROOT


def test_every_example_is_run_by_a_test():
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "examples").glob("test_*.py"))
    names = [path.name for path in (ROOT / "examples").iterdir() if path.is_file()]
    strategies = [name for name in names if name.startswith("strategy_")]
    for name in sorted(set(names) - set(strategies)):
        assert f'"{name}"' in tests or f"examples/{name}" in tests or f'/ "{name}"' in tests, name
    for name in strategies:
        assert f'"{name.removeprefix("strategy_").removesuffix(".yaml")}"' in tests, name
