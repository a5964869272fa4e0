"""Readers: each published format gives the samples it should, media stay files, and every fault is named."""

import json
import pickle

import pytest

from mmpeft.data import CocoCaptions, JsonLines, LLaVA, VQAv2, check
from mmpeft.data.samples import check_sample, length_hint, question_text
from mmpeft.errors import BadSample, ConfigError, FileFormatError, NameNotFound


def dump(path, content):
    path.write_text(json.dumps(content))
    return path


def dump_lines(path, records):
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n")
    return path


def parts(sample, turn=0):
    return sample["messages"][turn]["content"]


# ---- VQA v2 ---------------------------------------------------------------------------------------------------------


def vqa_pair(folder):
    questions = {
        "data_subtype": "val2014",
        "info": {},
        "questions": [
            {"question_id": 11, "image_id": 5, "question": "What is it?"},
            {"question_id": 12, "image_id": 42, "question": "Is it red?"},
        ],
    }
    annotations = {
        "annotations": [
            {
                "question_id": 12,
                "image_id": 42,
                "answer_type": "yes/no",
                "question_type": "is it",
                "multiple_choice_answer": "yes",
                "answers": [
                    {"answer": a, "answer_id": i, "answer_confidence": "yes"} for i, a in enumerate(["yes"] * 10)
                ],
            },
            {"question_id": 11, "answers": [{"answer": a} for a in ("dog", "cat", "cat")]},
        ]
    }
    return dump(folder / "q.json", questions), dump(folder / "a.json", annotations)


def test_vqa_v2(files):
    questions, annotations = vqa_pair(files)
    data = VQAv2(questions, annotations, images=files, prompt="{question}\nAnswer shortly.")
    assert len(data) == 2
    first, second = data
    for sample in data:
        check_sample(sample)
    assert parts(first)[0] == {"type": "image", "image": str(files / "COCO_val2014_000000000005.jpg")}
    assert question_text(first) == "What is it?\nAnswer shortly."
    assert (first["answers"], first["messages"][-1]["content"]) == (["dog", "cat", "cat"], "cat")
    assert (second["kind"], second["answers"], second["id"]) == ("yes/no", ["yes"] * 10, "vqa/12")
    test_split = VQAv2(questions, images=files, image_name="{image_id}.png")
    assert test_split[1]["answers"] == [] and test_split[1]["messages"][-1]["role"] == "user"
    assert parts(test_split[1])[0]["image"].endswith("42.png")


def test_vqa_v2_faults_are_named(files):
    questions, annotations = vqa_pair(files)
    other = dump(files / "other.json", {"annotations": [{"question_id": 99, "answers": [{"answer": "x"}]}]})
    with pytest.raises(FileFormatError, match="2 of the 2 questions.*question_id 11.*same split"):
        VQAv2(questions, other, images=files)
    swapped = json.loads(annotations.read_text())
    swapped["annotations"][0]["image_id"] = 7
    with pytest.raises(FileFormatError, match="question_id 12: image_id 42"):
        VQAv2(questions, dump(files / "swapped.json", swapped), images=files)
    with pytest.raises(NameNotFound, match="missing key 'questions'.*nearest: question"):
        VQAv2(dump(files / "x.json", {"question": []}), images=files)
    with pytest.raises(NameNotFound, match="no file.*nearest: q.json"):
        VQAv2(files / "qq.json", images=files)
    with pytest.raises(NameNotFound, match="no folder"):
        VQAv2(questions, images=files / "images")
    with pytest.raises(ConfigError, match="{question}"):
        VQAv2(questions, images=files, prompt="Answer.")
    with pytest.raises(ConfigError, match="does not fit image_id"):
        VQAv2(questions, images=files, image_name="{picture}.jpg")[0]
    (files / "cut.json").write_text('{"questions": [')
    with pytest.raises(FileFormatError, match="not JSON.*line 1"):
        VQAv2(files / "cut.json", images=files)


# ---- COCO -----------------------------------------------------------------------------------------------------------


def test_coco_captions(files):
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 13}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [
            {"image_id": 2, "id": 7, "caption": "A dog. "},
            {"image_id": 1, "id": 8, "caption": "noise"},
            {"image_id": 2, "id": 9, "caption": "one dog"},
        ],
    }
    path = dump(files / "captions.json", content)
    train, evaluation = CocoCaptions(path, images=files), CocoCaptions(path, images=files, per="image")
    assert [s["messages"][-1]["content"] for s in train] == ["noise", "A dog.", "one dog"]
    assert [s["answers"] for s in evaluation] == [["noise"], ["A dog.", "one dog"]]
    assert parts(evaluation[1])[0]["image"] == str(files / "b.jpg")
    assert len({s["id"] for s in train}) == 3 and not check(train).bad
    with pytest.raises(NameNotFound, match="caption, image"):
        CocoCaptions(path, images=files, per="captions")
    content["annotations"].append({"image_id": 3, "caption": "x"})
    with pytest.raises(FileFormatError, match="image_id 3 is not among"):
        CocoCaptions(dump(files / "c.json", content), images=files)
    with pytest.raises(NameNotFound, match="missing key 'caption'.*nearest: captions"):
        CocoCaptions(
            dump(files / "c.json", {**content, "annotations": [{"image_id": 1, "captions": ""}]}), images=files
        )
    with pytest.raises(FileFormatError, match="2 of 2 images have no caption"):
        CocoCaptions(dump(files / "c.json", {**content, "annotations": []}), images=files)


# ---- LLaVA ----------------------------------------------------------------------------------------------------------


def test_llava(files):
    records = [
        {
            "id": "x1",
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "Noise."},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "Yes."},
            ],
        },
        {
            "id": 2,
            "image": ["a.png", "b.jpg"],
            "conversations": [
                {"from": "human", "value": "Compare <image> with <image> please"},
                {"from": "gpt", "value": "Same."},
            ],
        },
        {"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    ]
    for path in (dump(files / "l.json", records), dump_lines(files / "l.jsonl", records)):
        data = LLaVA(path)
        one, two, plain = data
        assert [m["role"] for m in one["messages"]] == ["user", "assistant"] * 2
        assert parts(one) == [
            {"type": "image", "image": str(files / "a.png")},
            {"type": "text", "text": "What is it?"},
        ]
        assert one["answers"] == ["Yes."]
        assert [p.get("text", p.get("image")) for p in parts(two)] == [
            "Compare", str(files / "a.png"), "with", str(files / "b.jpg"), "please"]  # fmt: skip
        assert two["id"] == "2" and parts(plain) == [{"type": "text", "text": "Hi"}]
        assert not check(data).bad
        assert pickle.loads(pickle.dumps(data))[1] == two


def test_llava_faults_are_named(files):
    def one(**record):
        return LLaVA(dump(files / "l.json", [{"id": "s7", **record}]))[0]

    turns = [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "That."}]
    with pytest.raises(BadSample, match="'s7': 1 <image> markers for 2 image files"):
        one(image=["a.png", "b.jpg"], conversations=turns)
    with pytest.raises(BadSample, match="1 <image> markers for 0"):
        one(conversations=turns)
    with pytest.raises(BadSample, match="0 <image> markers for 1"):
        one(image="a.png", conversations=[{"from": "human", "value": "What?"}, turns[1]])
    with pytest.raises(BadSample, match="s7.*nearest: human"):
        one(conversations=[{"from": "humann", "value": "x"}])
    with pytest.raises(BadSample, match="marker in a turn of the assistant"):
        one(image="a.png", conversations=[turns[0], {"from": "gpt", "value": "<image>"}])
    with pytest.raises(NameNotFound, match="unknown key 'imagee'.*nearest: image"):
        one(imagee="a.png", conversations=turns)
    with pytest.raises(NameNotFound, match="missing key 'conversations'"):
        one(image="a.png")
    assert LLaVA(dump(files / "m.json", [{"model": "x", "image": "a.png", "conversations": turns}]), ignore=["model"])[
        0
    ]
    with pytest.raises(FileFormatError, match="non-empty list"):
        LLaVA(dump(files / "n.json", {"id": 1}))
    with pytest.raises(FileFormatError, match="line 2: not JSON"):
        (files / "b.jsonl").write_text('{"conversations": []}\n{"conv')
        LLaVA(files / "b.jsonl")


# ---- JSON lines -----------------------------------------------------------------------------------------------------


def test_json_lines(files):
    path = dump_lines(
        files / "own.jsonl",
        [
            {"image": "a.png", "question": "What is it?", "answer": "noise", "kind": "what"},
            {"images": ["a.png", "b.jpg"], "question": "Same?", "answers": ["no", "No."], "id": "p"},
            {"audio": "hello.wav", "question": "What is said?", "answer": "hello", "system": "Listen."},
            {
                "images": ["a.png"],
                "messages": [{"role": "user", "content": "See <image>."}, {"role": "assistant", "content": "Yes."}],
            },
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image", "image": "b.jpg"}, {"type": "text", "text": "And?"}],
                    },
                    {"role": "assistant", "content": "b"},
                ]
            },
            {"question": "Nothing to see?"},
        ],
    )
    data = JsonLines(path, prompt="Q: {question}")
    assert len(data) == 6
    assert (data[0]["id"], data[0]["kind"], data[0]["answers"]) == ("own.jsonl, line 1", "what", ["noise"])
    assert question_text(data[0]) == "Q: What is it?"
    assert (data[1]["id"], data[1]["messages"][-1]["content"], data[1]["answers"]) == ("p", "no", ["no", "No."])
    assert [p["type"] for p in parts(data[1])] == ["image", "image", "text"]
    assert data[2]["messages"][0] == {"role": "system", "content": "Listen."}
    assert parts(data[2], 1)[0] == {"type": "audio", "audio": str(files / "hello.wav")}
    assert [p.get("image", p.get("text")) for p in parts(data[3])] == ["See", str(files / "a.png"), "."]
    assert parts(data[4])[0]["image"] == str(files / "b.jpg") and data[4]["answers"] == ["b"]
    assert check(data).bad.keys() == {5}  # no answer: usable for predict, not for training
    assert [data.length_hint(i) for i in range(6)] == [length_hint(s) for s in data]
    assert data.length_hint(1) > data.length_hint(0) > 256
    assert [pickle.loads(pickle.dumps(data))[i] for i in range(6)] == list(data)


def test_json_lines_faults_are_named(files):
    def reading(*records):
        return JsonLines(dump_lines(files / "own.jsonl", records))

    good = {"image": "a.png", "question": "?", "answer": "x"}
    with pytest.raises(NameNotFound, match="line 2: unknown key 'anwser'.*nearest: answer"):
        reading(good, {"question": "?", "anwser": "x"})
    with pytest.raises(NameNotFound, match="line 1: missing key 'question'"):
        reading({"image": "a.png", "answer": "x"})
    with pytest.raises(FileFormatError, match="both 'image' and 'images'"):
        reading({**good, "images": []})
    with pytest.raises(BadSample, match="line 1.*nearest: user"):
        reading({"messages": [{"role": "usr", "content": "x"}]})[0]
    with pytest.raises(BadSample, match="unknown part type 'img'"):
        reading({"messages": [{"role": "user", "content": [{"type": "img"}]}]})[0]
    with pytest.raises(FileFormatError, match="expected a JSON object"):
        reading(good, [1])
    (files / "none.jsonl").write_text("\n\n")
    with pytest.raises(FileFormatError, match="no lines"):
        JsonLines(files / "none.jsonl")


# ---- bad media ------------------------------------------------------------------------------------------------------


def test_check_lists_bad_media_by_reason(files):
    names = ["a.png", "missing.png", "empty.png", "text.png", "b.jpg", "cut.png"]
    records = [{"image": name, "question": "?", "answer": "x"} for name in names]
    records += [
        {"audio": "hello.wav", "question": "?", "answer": "x"},
        {"audio": "no.wav", "question": "?", "answer": "x"},
    ]
    report = check(JsonLines(dump_lines(files / "own.jsonl", records)))
    assert sorted(report.bad) == [1, 2, 3, 5, 7] and report.good() == [0, 4, 6]
    assert report.reasons == {"missing file": 2, "unreadable file": 3}
    assert "line 2" in report.bad[1] and "missing.png" in report.bad[1] and "cut.png" in report.bad[5]
    assert "8 samples, 5 bad" in str(report) and "unreadable file" in str(report)
    with pytest.raises(BadSample, match="5 bad"):
        report.refuse()
    assert not check(JsonLines(files / "own.jsonl"), indices=[0, 4]).bad
