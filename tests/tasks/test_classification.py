"""Classification and regression through an encoder: pooling, scores, adapters beside linear probing, wrong labels."""

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.data import DataModule
from mmpeft.encoders import Encoder
from mmpeft.errors import BadSample, ConfigError, NameNotFound
from mmpeft.tasks import ClassificationTask, Docstrings, EncoderClassifier
from mmpeft.tasks.classification import POOLS


class Words(Encoder):
    """Texts as numbers: one id a character, an embedding each, one mixing layer."""

    modality = "text"

    def __init__(self) -> None:
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 16), nn.Tanh())
        super().__init__(backbone, name="stub:text", dim=16, preprocess=lambda s: torch.tensor([ord(c) % 64 for c in s]))

    def num_tokens(self, shape) -> int:
        return shape if isinstance(shape, int) else shape[-1]

    def forward(self, x, mask=None):
        return self.backbone(x), mask

    def config(self):
        return {}


class Letters(torch.utils.data.Dataset):
    """Words of 2 to 5 letters; which of three letters do they consist of? As a number: its place."""

    def __init__(self, size=30, label=lambda c: c):
        self.rows = [("abc"[i % 3] * (2 + i % 4), label(i % 3)) for i in range(size)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        text, label = self.rows[index]
        return {"id": f"word/{index}", "input": text, "label": label}


def fit(make_trainer, model, data, plan, *, steps=40, **options):
    task = ClassificationTask(model, plan, lr=5e-2, **options)
    torch.manual_seed(0)
    trainer = make_trainer(max_steps=steps, limit_val_batches=0)
    trainer.fit(task, datamodule=data)
    trainer = make_trainer()
    return task, trainer.validate(task, datamodule=data, verbose=False)[0]


@pytest.mark.parametrize("labels", ["numbers", "names"])
def test_classes_are_learned_and_scored(make_trainer, labels):
    names = ["ant", "bee", "cat"]
    data = Letters(label=names.__getitem__ if labels == "names" else int)
    model = EncoderClassifier(Words(), classes=names if labels == "names" else 3)
    options = {"metrics": ["accuracy", "f1", "matthews"]}
    task, scores = fit(make_trainer, model, DataModule(data, data, data, batch_size=7), {"head": "full"}, **options)
    assert {k: scores[f"val_{k}"] for k in ("accuracy", "f1", "matthews")} == {"accuracy": 1.0, "f1": 1.0, "matthews": 1.0}
    rows = [r for b in make_trainer().predict(task, datamodule=DataModule(predict=data, batch_size=7)) for r in b]
    assert [r["label"] for r in rows[:3]] == (names if labels == "names" else ["0", "1", "2"]) and len(rows) == 30
    assert all(0.5 < r["probability"] <= 1 for r in rows)


def test_a_number_is_regressed(make_trainer):
    data = Letters(label=lambda c: 2.0 * c - 1.0)
    model = EncoderClassifier(Words(), classes=1)
    plan = {"head": "full", "encoder.backbone.1": mmpeft.LoRA(rank=4)}
    options = {"metrics": ["pearson", "spearman", "mse"]}
    task, scores = fit(make_trainer, model, DataModule(data, data, data, batch_size=10), plan, steps=120, **options)
    assert scores["val_pearson"] > 0.99 and scores["val_spearman"] > 0.8 and scores["val_mse"] < 0.05
    assert scores["val_loss"] == pytest.approx(scores["val_mse"], rel=1e-3)
    values = [r["value"] for b in make_trainer().predict(task, datamodule=DataModule(predict=data)) for r in b]
    assert values[:3] == pytest.approx([-1.0, 1.0, 3.0], abs=0.4)


def test_scores_are_those_of_the_whole_split_not_means_of_batches(make_trainer):
    """Batches of unequal size and class balance: macro F1 of all, as scikit-learn computes it."""
    from sklearn.metrics import f1_score, matthews_corrcoef

    data = Letters(11, label=lambda c: c)
    model = EncoderClassifier(Words(), classes=3)
    _, scores = fit(make_trainer, model, DataModule(data, data, batch_size=4), {"head": "full"}, steps=2, metrics=["f1", "matthews"])
    with torch.no_grad():
        predicted = [int(model(model.encoder.preprocess(t)[None]).argmax()) for t, _ in data.rows]
    truth = [label for _, label in data.rows]
    assert scores["val_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"), abs=1e-6)
    assert scores["val_matthews"] == pytest.approx(matthews_corrcoef(truth, predicted), abs=1e-6)


@pytest.mark.parametrize("pool", POOLS)
def test_padding_does_not_change_a_sample(pool):
    torch.manual_seed(0)
    model = EncoderClassifier(Words(), classes=4, pool=pool).eval()
    short, long = torch.tensor([3, 9]), torch.tensor([3, 9, 40, 41, 42])
    x = torch.stack([torch.cat([short, torch.zeros(3, dtype=torch.long)]), long])
    mask = torch.tensor([[True, True, False, False, False], [True] * 5])
    torch.testing.assert_close(model(x, mask)[0], model(short[None])[0])
    torch.testing.assert_close(model(x, mask)[1], model(long[None])[0])


def test_wrong_settings_and_labels_are_refused(make_trainer):
    with pytest.raises(NameNotFound, match="nearest: mean"):
        EncoderClassifier(Words(), classes=3, pool="meen")
    for classes in (0, ["a"], ["a", "a"]):
        with pytest.raises(ConfigError, match="classes is"):
            EncoderClassifier(Words(), classes=classes)
    model = EncoderClassifier(Words(), classes=["ant", "bee", "cat"])
    with pytest.raises(NameNotFound, match="'f11' does not fit.*nearest: f1"):
        ClassificationTask(model, {"head": "full"}, metrics=["f11"])
    with pytest.raises(NameNotFound, match="'pearson' does not fit"):
        ClassificationTask(model, {"head": "full"}, metrics=["pearson"])
    with pytest.raises(ConfigError, match="label_smoothing"):
        ClassificationTask(EncoderClassifier(Words(), classes=1), {"head": "full"}, label_smoothing=0.1)
    with pytest.raises(BadSample, match="word/.*'bea'.*nearest: bee"):
        data = Letters(label=["ant", "bea", "cat"].__getitem__)
        fit(make_trainer, model, DataModule(data, batch_size=3, shuffle=False), {"head": "full"}, steps=1)
    with pytest.raises(BadSample, match="class 5 is not among 0 .. 1"):
        data = Letters(label=lambda c: 5)
        fit(make_trainer, EncoderClassifier(Words(), classes=2), DataModule(data, batch_size=3), {"head": "full"}, steps=1)


def test_docstrings_are_split_by_name_and_hide_the_library():
    train, test = Docstrings("train", per_library=20), Docstrings("test", per_library=20)
    assert len(train) == 80 and len(test) == 20 and not {r[0] for r in train.rows} & {r[0] for r in test.rows}
    assert train.class_counts() == {name: 16 for name in train.classes}
    assert not any(word in text.lower().split() for _, text, _ in train.rows for word in ("numpy", "scipy", "torch"))
    assert train.rows == Docstrings("train", per_library=20).rows
    with pytest.raises(NameNotFound, match="nearest: skimage"):
        Docstrings(libraries=["skimag", "torch"])
    with pytest.raises(ConfigError, match="two libraries"):
        Docstrings(libraries=["torch"])
