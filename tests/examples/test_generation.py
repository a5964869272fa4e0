"""Questions and captions: each example trains, lowers the loss of its base, and its adapter's folder answers alike."""

import json

import pytest
import torch

import mmpeft

from .conftest import LLM, loss, reloaded

VAL, TRAIN = "--data.init_args.val.init_args.size", "--data.init_args.train.init_args.size"

CHECK = "--trainer.check_val_every_n_epoch=1"


def check_saved(run, folder, dataset):
    """The adapter helps, and a model built from its folder alone gives the same loss and the same answers, bit for bit."""
    samples = [dataset[i] for i in range(min(12, len(dataset)))]
    adapted = loss(run, samples)
    with mmpeft.use(run.model, None):
        assert adapted < loss(run, samples)
    again = reloaded(folder)
    assert loss(run, samples, again) == adapted
    asked = [s["messages"] for s in samples]
    answers = run.model.generate(asked, max_new_tokens=6)
    assert again.generate(asked, max_new_tokens=6) == answers
    assert len(answers) == len(samples)
    return again


def test_questions_through_a_qformer(fit, small_llm, workplace):
    run = fit("vqa_qformer.yaml", options=[f"{LLM}={small_llm}", f"{TRAIN}=64", f"{VAL}=16"])
    steps = -(-64 // run.data.batch_size)
    assert run.trainer.global_step == steps
    result = json.loads((workplace / "runs/qformer/result.json").read_text())
    kinds = {s["kind"] for s in run.data.datasets["val"]}
    for key in ("accuracy", "accuracy_before", "accuracy_language_only"):
        assert set(result[key]) == kinds | {"all"}
        assert all(0 <= value <= 1 for value in result[key].values())
    assert result["steps"] == steps and result["questions"] == 16
    assert (workplace / "runs/qformer/answers.png").stat().st_size > 1000
    connector = run.model.connectors["image"]
    x = torch.randn(3, 16, connector.in_dim)
    out, _ = connector(x)
    changed, _ = connector(x + torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1) * torch.randn(connector.in_dim))
    assert out.shape == (3, connector.num_tokens(16), 576) == (3, 8, 576)
    assert torch.equal(out[0], changed[0]) and not torch.allclose(out[1], changed[1])
    check_saved(run, "runs/qformer/adapter", run.data.datasets["train"])


def test_captions(fit, small_llm, workplace, capsys):
    """Scores of captions; the second command in the file's comment gives those that the training ended with."""
    from mmpeft.cli import main

    options = [f"{LLM}={small_llm}", f"{VAL}=20", "--trainer.enable_progress_bar=false"]
    run = fit("caption_digits.yaml", options=[*options, f"{TRAIN}=64"])
    scores = run.trainer.callback_metrics
    for name, top in (("cider", 10), ("bleu_1", 1), ("bleu_4", 1), ("rouge_l", 1), ("exact_match", 1), ("loss", 100)):
        assert 0 <= float(scores[f"val_{name}"]) <= top, name
    saved = mmpeft.read_metadata("runs/captions/adapter")
    assert saved["metrics"]["val_cider"] == pytest.approx(float(scores["val_cider"]))
    check_saved(run, "runs/captions/adapter", run.data.datasets["train"])
    again = ["--config", "examples/caption_digits.yaml", "--model.init_args.start_from", "runs/captions/adapter"]
    assert main(["validate", *again, *options]) == 0
    assert f"{float(scores['val_loss']):.4f}"[:5] in capsys.readouterr().out


def test_own_data(fit, small_llm, workplace, capsys):
    from mmpeft.cli import main

    run = fit("vqa_own_data.yaml", options=[f"{LLM}={small_llm}", "--trainer.max_epochs=1", CHECK])
    assert run.trainer.global_step == 6
    kinds = {"what", "is_it", "which_of_two"}
    assert {name.rsplit("/", 1)[-1] for name in run.trainer.callback_metrics if "exact_match/" in name} == kinds
    check_saved(run, "runs/own/adapter", run.data.datasets["train"])
    question = ["--image", "examples/data/cat_3.png", "What is in the picture?"]
    capsys.readouterr()
    assert main(["generate", "--adapter", "runs/own/adapter", "--max-new-tokens", "8", *question]) == 0
    sample = run.data.datasets["val"][0]
    assert capsys.readouterr().out.strip() == run.model.chat(sample["messages"], max_new_tokens=8).strip()


def test_own_data_is_checked(workplace):
    """What the example's data set holds: every line readable, no picture of the held-out lines seen in training."""
    from mmpeft.data import JsonLines, check
    from mmpeft.data.samples import media_parts

    train, val = (JsonLines(f"examples/data/{name}.jsonl") for name in ("train", "val"))
    shown = [{part["image"] for sample in split for part in media_parts(sample)} for split in (train, val)]
    for split in (train, val):
        check(split).refuse()
    assert not shown[0] & shown[1] and len(shown[0] | shown[1]) == 16


def test_script(small_llm, workplace, capsys, run_example):
    from mmpeft.data import DigitsVQA

    example = run_example("vqa_script.py")
    model = example.main(steps=3, questions=20, llm=small_llm)
    assert "val_exact_match" in capsys.readouterr().out
    held_out = DigitsVQA("test", size=20)
    asked = [held_out[i]["messages"] for i in range(8)]
    fresh = example.build(small_llm)
    mmpeft.load(fresh, "runs/script/adapter")
    assert fresh.eval().generate(asked, max_new_tokens=4) == model.generate(asked, max_new_tokens=4)
