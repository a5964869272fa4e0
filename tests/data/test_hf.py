"""Hugging Face data sets: columns map by name, nothing is decoded early, faults are named."""

import io

import numpy as np
import pytest
from PIL import Image

from mmpeft.data import HuggingFace, HuggingFaceLabels, check
from mmpeft.data.samples import media_parts, open_image, question_text
from mmpeft.errors import BadSample, ConfigError, NameNotFound

datasets = pytest.importorskip("datasets")


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (9, 11, 3), dtype=np.uint8))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def vqa():
    return datasets.Dataset.from_dict(
        {
            "image": [{"bytes": png(picture(i)), "path": None} for i in range(4)] + [{"bytes": b"junk", "path": None}],
            "query": ["what?", "a much longer question?", "who?", "where?", "why?"],
            "answers": [[{"answer": a, "answer_id": i} for i, a in enumerate(("cat", "dog", "dog"))]] * 5,
            "answer_type": ["other"] * 5,
            "noise": [0] * 5,
        },
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "query": datasets.Value("string"),
                "answers": datasets.List({"answer": datasets.Value("string"), "answer_id": datasets.Value("int32")}),
                "answer_type": datasets.Value("string"),
                "noise": datasets.Value("int32"),
            }
        ),
    )  # fmt: skip


def test_questions_by_column_mapping(vqa):
    data = HuggingFace(vqa, columns={"question": "query", "kind": "answer_type"})
    sample = data[1]
    assert question_text(sample) == "a much longer question?" and sample["kind"] == "other"
    assert sample["answers"] == ["cat", "dog", "dog"] and sample["messages"][-1]["content"] == "dog"
    (part,) = media_parts(sample)
    assert np.array_equal(np.asarray(open_image(part["image"])), np.asarray(picture(1)))
    assert data.length_hint(1) > data.length_hint(0)  # reads no image: the last row's is broken
    assert isinstance(data.length_hint(4), int)
    report = check(data)
    assert list(report.bad) == [4] and report.reasons == {"unreadable file": 1}


def test_folder_on_disk_and_splits(vqa, tmp_path):
    vqa.save_to_disk(str(tmp_path / "one"))
    assert len(HuggingFace(str(tmp_path / "one"), columns={"question": "query"})) == 5
    datasets.DatasetDict({"train": vqa, "validation": vqa.select([0, 1])}).save_to_disk(str(tmp_path / "many"))
    data = HuggingFace(str(tmp_path / "many"), split="validation", columns={"question": "query"})
    assert len(data) == 2 and data[1]["id"] == "row 1"
    with pytest.raises(NameNotFound, match="split 'valid'.*nearest: validation"):
        HuggingFace(str(tmp_path / "many"), split="valid", columns={"question": "query"})
    with pytest.raises(NameNotFound, match="train, validation"):
        HuggingFace(str(tmp_path / "many"), columns={"question": "query"})


def test_several_images_with_texts_as_in_the_cauldron():
    data = HuggingFace(
        datasets.Dataset.from_dict(
            {
                "images": [[{"bytes": png(picture(0)), "path": None}, {"bytes": png(picture(1)), "path": None}]],
                "texts": [
                    [{"user": "Same?", "assistant": "No.", "source": "x"}, {"user": "Sure?", "assistant": "Yes."}]
                ],
            },
            features=datasets.Features(
                {
                    "images": datasets.List(datasets.Image()),
                    "texts": datasets.List({k: datasets.Value("string") for k in ("user", "assistant", "source")}),
                }
            ),
        )
    )
    sample = data[0]
    assert [p["type"] for p in sample["messages"][0]["content"]] == ["image", "image", "text"]
    assert [m["role"] for m in sample["messages"]] == ["user", "assistant"] * 2 and sample["answers"] == ["Yes."]


def test_messages_with_parts_as_in_trl(files):
    part = {"type": "image", "text": None}
    rows = {
        "images": [[str(files / "a.png")], [str(files / "a.png")]],
        "messages": [
            [
                {"role": "user", "content": [part, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Noise."}]},
            ],
            [{"role": "user", "content": [{"type": "text", "text": "No place"}]}],
        ],
    }
    data = HuggingFace(datasets.Dataset.from_dict(rows))
    assert data[0]["messages"] == [
        {
            "role": "user",
            "content": [{"type": "image", "image": str(files / "a.png")}, {"type": "text", "text": "What?"}],
        },
        {"role": "assistant", "content": "Noise."},
    ]
    with pytest.raises(BadSample, match="row 1.*1 media of the row are in no message"):
        data[1]


def test_sounds(files):
    stored = [{"bytes": (files / "hello.wav").read_bytes(), "path": None}]
    struct = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"audio": struct, "answer": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"audio": stored, "answer": ["hello"]}, features=features)
    rows = rows.cast_column("audio", datasets.Audio())  # would need torchcodec, were it asked to decode
    data = HuggingFace(rows, prompt="Write down what is said.")
    (part,) = media_parts(data[0])
    assert part["audio"]["sampling_rate"] == 8000 and part["audio"]["array"].shape == (1, 800)
    assert not check(data).bad


def test_faults_are_named(vqa):
    with pytest.raises(NameNotFound, match="unknown key 'questions'.*nearest: question"):
        HuggingFace(vqa, columns={"questions": "query"})
    with pytest.raises(NameNotFound, match="no column 'querry'.*nearest: query"):
        HuggingFace(vqa, columns={"question": "querry"})
    with pytest.raises(ConfigError, match="no question, messages or texts"):
        HuggingFace(vqa)
    with pytest.raises(ConfigError, match="map-style"):
        HuggingFace(vqa.to_iterable_dataset(), columns={"question": "query"})


def test_labels(files):
    rows = datasets.Dataset.from_dict(
        {
            "img": [str(files / "a.png"), str(files / "b.jpg"), str(files / "a.png")],
            "y": [1, 0, 1],
            "score": [0.5, 1.5, 2],
        },
        features=datasets.Features(
            {
                "img": datasets.Image(),
                "y": datasets.ClassLabel(names=["noise", "photo"]),
                "score": datasets.Value("float32"),
            }
        ),
    )
    data = HuggingFaceLabels(rows, input="img", target="y")
    assert data.classes == ["noise", "photo"] and data.targets == [1, 0, 1] and data.num_outputs == 2
    assert data[0] == {"id": "row 0", "input": str(files / "a.png"), "label": 1}
    assert data.class_counts() == {"noise": 1, "photo": 2}
    regression = HuggingFaceLabels(rows, input="img", target="score", regression=True)
    assert regression.classes is None and regression.targets == [0.5, 1.5, 2.0] and regression.num_outputs == 1
    texts = datasets.Dataset.from_dict({"text": ["good", "bad film"], "label": ["pos", "neg"]})
    data = HuggingFaceLabels(texts, modality="text")
    assert data.classes == ["neg", "pos"] and data[1] == {"id": "row 1", "input": "bad film", "label": 0}
    assert data.length_hint(1) == 8
    with pytest.raises(NameNotFound, match="nearest: label"):
        HuggingFaceLabels(texts, modality="text", target="labels")
