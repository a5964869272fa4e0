"""The examples of reinforcement learning run as a user runs them, shortened: what they write is whole."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def example(name):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "examples" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(result, output):
    assert json.loads(output.read_text())["p_value"] == result["p_value"]
    with output.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["steps"]) == result["steps"] and 0 <= result["clone"] <= 1


def test_minigrid(tmp_path):
    pytest.importorskip("minigrid", reason="minigrid is not installed (pip install 'mmpeft[robot]')")
    output = tmp_path / "result.json"
    args = ["--walks", "2", "--clone-steps", "3", "--total-steps", "1200", "--episodes", "3", "--folder", str(tmp_path)]
    check(example("minigrid_ppo.py").main([*args, "--output", str(output)]), output)


def test_metaworld(tmp_path):
    pytest.importorskip("metaworld", reason="metaworld is not installed (pip install 'mmpeft[robot]')")
    output = tmp_path / "result.json"
    args = ["--demos", "1", "--clone-steps", "3", "--total-steps", "100", "--num-envs", "2", "--decisions", "20"]
    args += ["--max-steps", "60", "--episodes", "2", "--folder", str(tmp_path)]
    check(example("metaworld_ppo.py").main([*args, "--output", str(output)]), output)
