"""Labelled readers: folders and tables, classes in a fixed order, regression, and named faults."""

import shutil

import pytest

from mmpeft.data import DataModule, ImageFolder, Table, check
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound


@pytest.fixture
def folders(files):
    for name in ("cat/1.png", "cat/deep/2.png", "dog/1.png", ".hidden/1.png"):
        (files / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files / "a.png", files / "pets" / name)
    (files / "pets/dog/notes.txt").write_text("not an image")
    return files / "pets"


def test_image_folder(folders):
    data = ImageFolder(folders)
    assert data.classes == ["cat", "dog"] and data.targets == [0, 0, 1] and data.modality == "image"
    assert data[1] == {"id": "cat/deep/2.png", "input": str(folders / "cat/deep/2.png"), "label": 0}
    assert ImageFolder(folders, classes=["dog", "cat"]).targets == [0, 1, 1]
    with pytest.raises(NameNotFound, match="no folder 'cats'.*nearest: cat"):
        ImageFolder(folders, classes=["cats", "dog"])
    (folders / "bird").mkdir()
    with pytest.raises(ConfigError, match="bird has no images"):
        ImageFolder(folders)
    with pytest.raises(ConfigError, match="two or more"):
        ImageFolder(folders, classes=["cat"])


def test_text_table_with_pairs(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text('premise\thypothesis\tgold\n"It is, well, red"\tIt is\tyes\nB\tC\tno\n')
    data = Table(path, modality="text", input=["premise", "hypothesis"], target="gold", joiner=" [SEP] ")
    assert data.classes == ["no", "yes"] and data.targets == [1, 0]
    assert data[0]["input"] == "It is, well, red [SEP] It is" and data[0]["id"] == "pairs.tsv, row 0"
    assert not check(data).bad


def test_file_table_and_classes_of_another_split(files):
    (files / "train.csv").write_text("image,label\na.png,10\nb.jpg,9\n")
    (files / "test.csv").write_text("image,label\na.png,9\n")
    train = Table(files / "train.csv", modality="image")
    assert train.classes == ["9", "10"] and train.targets == [1, 0]  # numbers sort as numbers
    assert train[0]["input"] == str(files / "a.png")
    assert Table(files / "test.csv", modality="image", classes=train.classes).targets == [0]
    (files / "other.csv").write_text("image,label\na.png,9\nb.jpg,11\n")
    other = Table(files / "other.csv", modality="image")
    with pytest.raises(ConfigError, match=r"classes of 'val' are \['9', '11'\], those of 'train' \['9', '10'\]"):
        DataModule(train, other)
    DataModule(train, Table(files / "test.csv", modality="image", classes=train.classes))
    with pytest.raises(ConfigError, match="two or more"):
        Table(files / "test.csv", modality="image")  # alone, it would be a different problem
    with pytest.raises(NameNotFound, match="row 0: '10' is none"):
        Table(files / "train.csv", modality="image", classes=["9", "8"])


def test_regression_and_audio(files):
    (files / "t.csv").write_text("clip,mos\nhello.wav,3.5\nhello.wav,-1e-1\n")
    data = Table(files / "t.csv", modality="audio", input="clip", target="mos", regression=True)
    assert data.targets == [3.5, -0.1] and data.classes is None and data.num_outputs == 1
    assert data[0]["input"] == str(files / "hello.wav")
    with pytest.raises(ConfigError, match="no classes"):
        Table(files / "t.csv", modality="audio", input="clip", target="mos", regression=True, classes=["1"])
    for bad, words in (("high", "no number"), ("nan", "not finite"), ("", "no label")):
        (files / "b.csv").write_text(f"clip,mos\nhello.wav,1\nhello.wav,{bad}\n")
        with pytest.raises(FileFormatError, match=f"row 1.*{words}"):
            Table(files / "b.csv", modality="audio", input="clip", target="mos", regression=True)


def test_faults_are_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text,label\nfine,1\n,0\n")
    with pytest.raises(FileFormatError, match="row 1: column 'text' is empty"):
        Table(path, modality="text")
    with pytest.raises(NameNotFound, match="missing key 'labels'.*nearest: label"):
        Table(path, modality="text", target="labels")
    with pytest.raises(NameNotFound, match="nearest: text"):
        Table(path, modality="texts", input="text")
    with pytest.raises(ConfigError, match="several input columns"):
        Table(path, modality="image", input=["text", "label"])
    path.write_text("text,label\nonly one\n")
    with pytest.raises(FileFormatError, match="line 2: expected 2 columns"):
        Table(path, modality="text")
    path.write_text("text,label\n")
    with pytest.raises(FileFormatError, match="no rows"):
        Table(path, modality="text")
    with pytest.raises(FileFormatError, match="'.txt'.*csv"):
        (tmp_path / "t.txt").write_text("x")
        Table(tmp_path / "t.txt", modality="text")
    with pytest.raises(NameNotFound, match="nearest: t.csv"):
        Table(tmp_path / "tt.csv", modality="text")


def test_tables_in_json(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n')
    (tmp_path / "t.json").write_text('[{"text": "a", "label": 1}, {"text": "b", "label": 0}]')
    for name in ("t.jsonl", "t.json"):
        data = Table(tmp_path / name, modality="text")
        assert [s["input"] for s in data] == ["a", "b"] and data.targets == [1, 0] and data.classes == ["0", "1"]
