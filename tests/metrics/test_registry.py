"""Metrics by name, and the same numbers when samples are spread over ranks."""

import inspect
import json
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch

from mmpeft.errors import ConfigError, NameNotFound
from mmpeft.metrics import METRICS, load_metric, metric_entry
from tests.two_ranks import two_ranks

TEXT = [name for name, entry in METRICS.items() if entry.family == "text"]
OPTIONS = {name: {"task": "multiclass", "num_classes": 3} for name in ("accuracy", "f1", "matthews", "auroc")}


def corpus(n, seed=0):
    rng = random.Random(seed)
    words = ["yes", "no", "a", "cat", "dog", "red", "on", "the", "mat", "café", "2", "two"]
    references = [
        [" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(rng.randint(1, 4))] for _ in range(n)
    ]
    predictions = [rng.choice(r) if rng.random() < 0.5 else " ".join(rng.choices(words, k=3)) for r in references]
    return predictions, references, [rng.choice(["other", "number", None]) for _ in range(n)]


def corpus_for(name, n):
    predictions, references, kinds = corpus(n)
    return (predictions, [["yes"], ["no"]] * (n // 2) + [["no"]] * (n % 2), kinds) if name == "yes_no" else (
        predictions, references, kinds)  # fmt: skip


@pytest.mark.parametrize("name", METRICS)
def test_every_entry_can_be_made_pickled_and_has_a_direction(name):
    metric = load_metric(name, **OPTIONS.get(name, {}))
    assert metric_entry(name).summary
    pickle.loads(pickle.dumps(metric))
    if metric.higher_is_better is not None:
        assert metric.higher_is_better == metric_entry(name).higher_is_better
    if metric_entry(name).family == "text":
        assert list(inspect.signature(metric.update).parameters) == ["predictions", "references", "kinds"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-6, equal_nan=True) for k in a)


@pytest.mark.parametrize("name", TEXT)
def test_batches_and_merged_states_change_nothing(name):
    predictions, references, kinds = corpus_for(name, 13)
    whole, left, right = load_metric(name), load_metric(name), load_metric(name)
    whole.update(predictions, references, kinds)
    left.update(predictions[:5], references[:5], kinds[:5])
    right.update(predictions[5:9], references[5:9], kinds[5:9])
    right.update([], [], [])
    right.update(predictions[9:], references[9:], kinds[9:])
    left.merge_state(right)
    assert equal(left.compute(), whole.compute())
    whole.reset()
    whole.update(predictions, references, kinds)
    assert equal(left.compute(), whole.compute())


def scores_of(rank, corpora, folder):
    """What one rank, which holds a share of every corpus, computes of all."""
    scores = {}
    for name, lists in corpora.items():
        metric = load_metric(name)
        mine = slice(0, 3) if rank == 0 else slice(3, None)  # unequal shares, in unequal numbers of batches
        metric.update(*(entries[mine] for entries in lists))
        if rank:
            metric.update([], [], [])
        scores[name] = {key: value.item() for key, value in metric.compute().items()}
    (folder / f"{rank}.json").write_text(json.dumps(scores))


def test_two_ranks_give_what_one_gives(tmp_path):
    corpora = {name: corpus_for(name, 11) for name in TEXT}
    two_ranks(scores_of, corpora, tmp_path)
    for name, lists in corpora.items():
        single = load_metric(name)
        single.update(*lists)
        expected = {k: v.item() for k, v in single.compute().items()}
        for rank in range(2):
            scores = json.loads((tmp_path / f"{rank}.json").read_text())[name]
            assert scores == pytest.approx(expected, abs=1e-6, nan_ok=True), name


def test_torchmetrics_own_against_one_line_formulas():
    """Half of the registry is torchmetrics: what it calls by these names is what the papers mean."""
    generator = torch.Generator().manual_seed(0)
    target, predicted = (
        torch.randint(0, 2, (200,), generator=generator),
        torch.randint(0, 2, (200,), generator=generator),
    )
    predicted[:120] = target[:120]
    tp, fp, fn, tn = ((predicted == p) & (target == t) for p, t in ((1, 1), (1, 0), (0, 1), (0, 0)))
    tp, fp, fn, tn = (float(x.sum()) for x in (tp, fp, fn, tn))
    binary = {"task": "binary"}
    assert load_metric("accuracy", **binary)(predicted, target).item() == pytest.approx((tp + tn) / 200)
    assert load_metric("f1", **binary)(predicted, target).item() == pytest.approx(2 * tp / (2 * tp + fp + fn))
    phi = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert load_metric("matthews", **binary)(predicted, target).item() == pytest.approx(phi, abs=1e-5)
    x = torch.randn(101, generator=generator)
    y = x + torch.randn(101, generator=generator)
    assert load_metric("pearson")(x, y).item() == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-5)
    ranks = np.argsort(np.argsort(np.stack([x, y])))
    assert load_metric("spearman")(x, y).item() == pytest.approx(np.corrcoef(ranks)[0, 1], abs=1e-4)
    assert load_metric("mse")(x, y).item() == pytest.approx(float(((x - y) ** 2).mean()), rel=1e-5)
    assert load_metric("mae")(x, y).item() == pytest.approx(float((x - y).abs().mean()), rel=1e-5)


def test_multiclass_accuracy_is_over_samples_only_if_asked():
    """A plain share of hits is average="micro"; "macro" is the mean over classes."""
    target, predicted = torch.tensor([0] * 8 + [1, 2]), torch.tensor([0] * 8 + [0, 0])
    options = {"task": "multiclass", "num_classes": 3}
    assert load_metric("accuracy", **options, average="micro")(predicted, target).item() == pytest.approx(0.8)
    assert load_metric("accuracy", **options, average="macro")(predicted, target).item() == pytest.approx(1 / 3)
    assert Counter(target.tolist())[0] == 8


def test_wrong_names_and_options():
    with pytest.raises(NameNotFound, match="nearest: exact_match"):
        load_metric("exact_mach")
    with pytest.raises(ConfigError, match="nearest: variant"):
        load_metric("vqa", varient="lmms")
    with pytest.raises(ConfigError, match="num_classes"):
        load_metric("accuracy", task="multiclass")
    with pytest.raises(ConfigError, match="no option 'tsk'.*nearest: task"):
        load_metric("accuracy", tsk="binary")
