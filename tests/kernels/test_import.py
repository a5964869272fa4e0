"""The link `kernels -> mmpeft/kernels` at the root never stands in for the hub library of that name."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, *path: Path) -> str:
    """Run code in a fresh interpreter with `path` in front of sys.path."""
    code = f"import sys; sys.path[:0] = {[str(p) for p in path]}\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


pytestmark = pytest.mark.skipif(not (ROOT / "kernels").exists(), reason="a checkout without the link")


def test_transformers_and_peft_run_with_the_root_on_the_path():
    pytest.importorskip("peft")
    out = run(
        """
        import importlib.util
        assert importlib.util.find_spec("kernels") is not None  # the link is seen, so the test tests something
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.utils import is_kernels_available
        from peft import LoraConfig, get_peft_model
        sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=11)
        model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), LoraConfig(target_modules=["q_proj"]))
        ids = torch.arange(6)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        print(is_kernels_available())
        """,
        ROOT,
    )
    installed = run("import importlib.metadata as m; print('kernels' in {d.name for d in m.distributions()})")
    assert out == installed


def test_names_cannot_be_imported_from_the_link():
    run(
        """
        for name in ("lowrank_linear", "get_kernel"):
            try:
                exec(f"from kernels import {name}")
            except ImportError:
                continue
            raise SystemExit(f"{name} came from the link")
        try:
            import kernels.lowrank
        except ModuleNotFoundError:
            pass
        else:
            raise SystemExit("a submodule came from the link")
        """,
        ROOT,
    )


def test_an_installed_hub_library_is_found_behind_the_link(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from kernels.hub import get_kernel\n__version__ = '9.9'\n")
    (tmp_path / "kernels" / "hub.py").write_text("def get_kernel(): return 'the hub library'\n")
    assert (
        run("import kernels; print(kernels.get_kernel(), kernels.__version__)", ROOT, tmp_path) == "the hub library 9.9"
    )


def test_our_own_import_loads_no_kernel_file():
    out = run("import mmpeft.kernels, sys; print([m for m in sys.modules if m.endswith('tritonlib')])", ROOT)
    assert out == "[]"
