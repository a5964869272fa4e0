"""The layout holds: imports only downwards, a light `import mmpeft`, files that tell one story."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mmpeft"
FLOORS = {
    "errors": 0,
    "lazy": 0,
    "kernels": 0,
    "adapters": 1,
    "encoders": 2,
    "connectors": 2,
    "multimodal": 3,
    "policies": 4,
    "data": 4,
    "metrics": 4,
    "tasks": 5,
    "report": 6,
    "cli": 6,
}
FILES = sorted(p for p in PACKAGE.rglob("*.py"))
# What only one part needs loads with that part, never with the package.
HEAVY = {
    "triton", "sympy",
    "transformers", "tokenizers", "timm", "open_clip", "torchvision", "torchaudio", "datasets", "pandas", "pyarrow", "peft",
    "lightning", "pytorch_lightning", "torchmetrics", "jsonargparse", "tensorboard",
    "gymnasium", "mujoco", "metaworld", "minigrid", "h5py", "av",
    "sklearn", "skimage", "scipy", "matplotlib", "PIL", "gguf",
}  # fmt: skip


def imported(path: Path):
    """(line, module, at import time?) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    typing = {
        id(n)
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test)
        for n in ast.walk(i)
    }
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for name in names:
            yield node.lineno, name, id(node) not in inside and id(node) not in typing


def floor(module: str) -> int | None:
    parts = module.split(".")
    return FLOORS.get(parts[1]) if len(parts) > 1 and parts[0] == "mmpeft" else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path):
    mine = floor(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if mine is None:  # mmpeft/__init__.py and __main__.py see everything
        return
    upward = [f"line {line}: {name}" for line, name, _ in imported(path) if (floor(name) or 0) > mine]
    assert not upward


def test_every_part_has_a_floor():
    parts = {
        p.stem if p.is_file() else p.name
        for p in PACKAGE.iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert parts - {"__init__", "__main__", "version"} <= set(FLOORS)


def test_light_import():
    """The package and each part of it, up to the first use of something that needs more than torch."""
    parts = ["mmpeft", "mmpeft.cli", "mmpeft.policies.rollout_result", *(f"mmpeft.{p.parent.name}" for p in sorted(PACKAGE.glob("*/__init__.py")))]
    code = (
        f"import importlib, sys\nfor part in {parts}:\n    importlib.import_module(part)\n"
        f"    print(part, *sorted({HEAVY} & set(sys.modules)))\nprint('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent).stdout.splitlines()
    assert lines == [*parts, "True"]


@pytest.mark.parametrize("part", ["mmpeft", "mmpeft.data", "mmpeft.data.demos", "mmpeft.policies", "mmpeft.tasks"])
def test_names_of_the_front_pages_have_a_home(part):
    page = importlib.import_module(part)
    for name, home in page._LAZY.items():
        spec = importlib.util.find_spec(importlib.util.resolve_name(home, part))
        assert spec is not None and spec.origin.startswith(str(PACKAGE)), (name, home)
    wrong = f"{next(iter(page._LAZY))}s"
    with pytest.raises(AttributeError, match=f"module '{part}' has no attribute '{wrong}' .nearest: {wrong[:-1]}"):
        getattr(page, wrong)


def test_torchaudio_is_never_imported_at_package_level():
    for path in FILES:
        assert not [n for _, n, top in imported(path) if top and n.split(".")[0] == "torchaudio"], path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    assert ast.get_docstring(ast.parse(text)) or not text.strip(), "a file opens with what it is for"


def test_links_at_the_root_point_into_the_package():
    for name in ("encoders", "connectors", "policies", "kernels"):
        assert (ROOT / name).is_symlink() and (ROOT / name).resolve() == PACKAGE / name
