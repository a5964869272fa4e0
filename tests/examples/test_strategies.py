"""The strategy files over a real config: one device and two processes are run, what needs a GPU is parsed and refused.

Answers are compared with those of a process that loads the adapter's folder.
"""

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml
from safetensors.torch import load_file

import mmpeft
from mmpeft.data import DigitsVQA

from .conftest import LLM, ROOT, loss, reloaded

QUESTIONS = 64
SIZES = (f"--data.init_args.train.init_args.size={QUESTIONS}", "--data.init_args.val.init_args.size=12")


def test_single(fit, small_llm, workplace):
    """`accelerator: auto` and bf16 autocast on whatever device there is."""
    options = [f"{LLM}={small_llm}", *SIZES, "--trainer.max_epochs=1"]
    run = fit("vqa_digits.yaml", "strategy_single.yaml", options=options)
    assert run.trainer.num_devices == 1 and run.trainer.precision == "bf16-mixed"
    assert run.trainer.global_step == -(-QUESTIONS // run.data.batch_size)
    samples = [run.data.datasets["val"][i] for i in range(6)]
    run.model.cpu()
    assert loss(run, samples, reloaded("runs/quickstart/adapter")) == loss(run, samples)


STRATEGIES = {"ddp": "quickstart", "fsdp2": "sharded"}  # file under examples/ -> folder of its adapter under runs/
EXAMPLES = ("--config", "examples/vqa_digits.yaml", "--config", "examples/strategy_{}.yaml")
PLAIN = ("--trainer.accelerator=cpu", "--trainer.enable_model_summary=false", "--trainer.enable_progress_bar=false")


def launch(name, folder, *options):
    """`mmpeft fit` as a program of two processes, which find each other as Lightning starts them; what it said."""
    (folder / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mmpeft", "fit", *(part.format(name) for part in EXAMPLES), *SIZES, *PLAIN]
    command += ["--trainer.devices=2", *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def launch_each(make_folder, options):
    """Every strategy at once, since a launch mostly imports, one process after the other: name -> (folder, what it said)."""
    folders = {name: make_folder(name) for name in STRATEGIES}
    with ThreadPoolExecutor() as pool:
        said = {name: pool.submit(launch, name, folder, *options(name)) for name, folder in folders.items()}
        return {name: (folder, said[name].result()) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def trained(small_llm, tmp_path_factory):
    """An epoch."""
    return launch_each(tmp_path_factory.mktemp, lambda name: (f"{LLM}={small_llm}", "--trainer.max_epochs=1"))


@pytest.fixture(scope="module")
def resumed(small_llm, trained, tmp_path_factory):
    """A second epoch in new processes and a new folder, from the checkpoint of the first."""

    def options(name):
        (checkpoint,) = (trained[name][0] / "runs/quickstart/logs/checkpoints").glob("*.ckpt")
        return f"{LLM}={small_llm}", "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}"

    return launch_each(tmp_path_factory.mktemp, options)


def adapter(launched, name):
    """Folder of the saved adapter, its step and its tensors."""
    folder = launched[name][0] / "runs" / STRATEGIES[name] / "adapter"
    return folder, mmpeft.read_metadata(folder)["step"], load_file(folder / "adapter.safetensors")


@pytest.mark.slow
def test_two_processes(trained):
    """DDP and FSDP2 on the CPU: the same training, to rounding, and a process of its own answers as the trainer did."""
    batch_size = yaml.safe_load((ROOT / "examples" / "vqa_digits.yaml").read_text())["data"]["init_args"]["batch_size"]
    weights = []
    for name in STRATEGIES:
        assert "MEMBER: 2/2" in trained[name][1]
        _, step, tensors = adapter(trained, name)
        assert step == -(-QUESTIONS // (2 * batch_size))  # a batch for each process and step
        weights.append(tensors)
    ddp, fsdp2 = weights
    assert ddp.keys() == fsdp2.keys()
    differing = torch.cat([((fsdp2[key] - value).abs() > 1e-5).flatten() for key, value in ddp.items()])
    assert float(differing.float().mean()) < 1e-2  # AdamW's first steps are signs: rounding may turn a few
    place = trained["ddp"][0] / "runs" / "quickstart"
    answers = json.loads((place / "answers.json").read_text())
    held_out = DigitsVQA("test", size=12)
    asked = [held_out[i]["messages"] for i in range(12)]
    model = reloaded(place / "adapter")
    assert model.generate(asked, max_new_tokens=4) == [row["answer"] for row in answers]


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_go_on_from_a_checkpoint(trained, resumed, name):
    """The adapter moves on from where it was."""
    _, steps, before = adapter(trained, name)
    (checkpoint,) = (trained[name][0] / "runs/quickstart/logs/checkpoints").glob(f"*step={steps}.ckpt")
    kept = torch.load(checkpoint, weights_only=False)
    assert kept["mmpeft"]["total_steps"] == steps and len(kept["state_dict"]) == len(before)
    _, steps_after, after = adapter(resumed, name)
    assert "Restored all states" in resumed[name][1] and steps_after == 2 * steps
    change = torch.cat([(after[key] - value).abs().flatten() for key, value in before.items()])
    assert 0 < float(change.max()) < 1e-2  # the schedule had ended; weights made anew would differ by far more


def parsed(*configs, options=()):
    """What `mmpeft fit --print_config` prints."""
    import contextlib
    import io

    from mmpeft.cli import run_lightning

    out = io.StringIO()
    paths = [part for name in configs for part in ("--config", f"examples/{name}")]
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        run_lightning(["fit", *paths, *options, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(out.getvalue())


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2", "deepspeed"])
@pytest.mark.parametrize("base", ["vqa_digits.yaml", "gpu_siglip_smollm2.yaml"])
def test_every_strategy_parses_over(workplace, base, name):
    config = parsed(base, f"strategy_{name}.yaml")
    overlay = yaml.safe_load((ROOT / "examples" / f"strategy_{name}.yaml").read_text())["trainer"]
    alone = yaml.safe_load((ROOT / "examples" / base).read_text())
    assert config["trainer"]["devices"] == overlay["devices"]
    strategy = overlay["strategy"]
    given = config["trainer"]["strategy"]
    assert given == strategy or (given["class_path"], given["init_args"] | strategy["init_args"]) == (
        strategy["class_path"],
        given["init_args"],
    )
    assert config["model"]["class_path"] == alone["model"]["class_path"]
    assert config["data"]["init_args"]["batch_size"] == alone["data"]["init_args"]["batch_size"]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed"])
def test_every_strategy_is_made_of_its_arguments(name):
    """DeepSpeed's package is installed where it is used; without it the strategy says so, and nothing starts."""
    given = yaml.safe_load((ROOT / "examples" / f"strategy_{name}.yaml").read_text())["trainer"]["strategy"]
    module, _, attribute = given["class_path"].rpartition(".")
    strategy = getattr(importlib.import_module(module), attribute)
    if name == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        with pytest.raises(Exception, match="install DeepSpeed|deepspeed"):
            strategy(**given["init_args"])
    else:
        assert isinstance(strategy(**given["init_args"]), strategy)
