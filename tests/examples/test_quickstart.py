"""`make quickstart`, shortened: the script trains in one process and answers again in a fresh one."""

import json
import os
import subprocess
import sys

from .conftest import LLM, ROOT


def test_quickstart_trains_and_a_fresh_process_answers_alike(small_llm, workplace):
    # Encoder features and logits depend on the batch they are computed in, by rounding; an LLM cut to three layers and
    # trained for three steps has next words as likely as each other to bfloat16's eight bits. In float32 they differ.
    options = [
        f"{LLM}={small_llm}", "--model.init_args.model.init_args.dtype=float32", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false",
        "--data.init_args.train.init_args.size=72", "--data.init_args.val.init_args.size=30",
    ]  # fmt: skip
    command = [sys.executable, "examples/quickstart.py", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((workplace / "runs/quickstart/result.json").read_text())
    assert result["reloaded_equal"] is True and result["reloaded_accuracy"] == result["accuracy"]["all"]
    assert result["questions"] == 30 and result["steps"] == 3 and 0 < result["seconds"] < 600
    kinds = {"which_digit", "odd_even", "larger_than", "larger_of_two", "sum", "all"}
    assert set(result["accuracy"]) == set(result["accuracy_before"]) == set(result["accuracy_language_only"]) == kinds
    # what a person sees: the plan, before beside after beside the control, answered questions, where the rest is
    for words in ("llm.**.{q,v}_proj", "language only", "which_digit", "(truth: ", "answers.png", "the same accuracy"):
        assert words in done.stdout, words
    assert "30 of 30 answers alike" in done.stdout
