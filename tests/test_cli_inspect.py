"""`mmpeft inspect --meta`: a plan's table from the shell, without weights and without a network."""

import json
import socket

import pytest

from mmpeft import cli

pytest.importorskip("transformers")

PLAN = """
- {match: "**.attention.self.{query,value}", method: {LoRA: {rank: 8}}, lr: 1.0e-3}
- {match: classifier, train: full, lr: 1.0e-4, weight_decay: 0.01}
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return str(path)


def test_the_table_of_roberta_large(tmp_path, plan, capsys):
    path = tmp_path / "lora.yaml"
    path.write_text('"**.{query,value}": {LoRA: {rank: 8}}')
    arguments = ["--meta", "hf:FacebookAI/roberta-large", "--batch", "4", "--length", "64", "--plan", str(path)]
    assert cli.main(["inspect", *arguments]) == 0
    out = capsys.readouterr().out
    assert "786,432" in out and "LoRA(rank=8)" in out and "input_ids [4, 64] (predicted)" in out
    assert "base 355,359,744 parameters, 1.32 GiB" in out


def test_json_has_every_number(plan, capsys):
    arguments = ["--meta", "hf:FacebookAI/roberta-base", "--labels", "2", "--dtype", "bfloat16", "--optimizer", "sgd"]
    assert cli.main(["inspect", *arguments, "--batch", "3", "--length", "20", "--plan", plan, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["trainable"] == 887_042 and seen["base_bytes"] == 2 * 124_647_170 and seen["optimizer_bytes"] == 0
    assert seen["gradient_bytes"] == seen["file_bytes"] == 4 * 887_042
    lora, head = seen["rows"]
    assert (
        lora["parameters"] == 294_912
        and len(lora["sites"]) == 24
        and (head["lr"], head["weight_decay"]) == (1e-4, 0.01)
    )
    # The adapters' own forward: 2 (in + out) r a token and site.
    assert lora["cost"]["forward_flops"] == 24 * 60 * 2 * (768 + 768) * 8
    total = seen["base_cost"]["forward_flops"] + sum(row["cost"]["forward_flops"] for row in seen["rows"])
    assert total == seen["cost"]["forward_flops"]
    # At least 2 FLOPs a weight of the blocks and token, and not much more on 20 tokens.
    assert 1 < seen["base_flops"] / (2 * 60 * 12 * 7_077_888) < 1.1


def test_an_architecture_of_timm(tmp_path, capsys):
    pytest.importorskip("timm")
    path = tmp_path / "plan.yaml"
    path.write_text('"blocks.*.attn.qkv[q,v]": {LoRA: {rank: 4}}')
    assert cli.main(["inspect", "--meta", "timm:vit_tiny_patch16_224", "--plan", str(path), "--batch", "5"]) == 0
    out = capsys.readouterr().out
    assert "[5, 3, 224, 224] (predicted)" in out and f"{12 * 2 * 4 * (192 + 192):,}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--meta", "hf:FacebookAI/roberta-larg"], "nearest: FacebookAI/roberta-large"),
        (["--meta", "hf:FacebookAI/roberta-base"], "classifier"),  # no head: the plan's second rule matches nothing
        (["--meta", "hf:FacebookAI/roberta-base", "--labels", "0"], "--labels 0; expected at least 1"),
        (["--meta", "hf:FacebookAI/roberta-base", "--labels", "2", "--dtype", "floaty"], "floaty"),
        (["--meta", "hf:FacebookAI/roberta-base", "--labels", "2", "--optimizer", "adamv"], "nearest: adam, adamw"),
        (["--meta", "hf:FacebookAI/roberta-base", "--labels", "2", "--length", "513"], "--length 513; .* at most 512"),
        (["--meta", "hf:google/vit-base-patch16-224", "--length", "9"], "inputs have fixed shapes"),
    ],
)
def test_wrong_input_is_named(arguments, message, plan, capsys):
    import re

    assert cli.main(["inspect", *arguments, "--plan", plan]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_plan_is_needed(capsys):
    assert cli.main(["inspect", "--meta", "hf:FacebookAI/roberta-base"]) == 2
    assert "needs --plan" in capsys.readouterr().err
