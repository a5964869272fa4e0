"""The examples are run as a user runs them, shortened: a few steps, and the first three layers of the pretrained LLM."""

import dataclasses
import gc
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 3
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
LLM = "--model.init_args.model.init_args.llm"


@pytest.fixture(scope="session")
def small_llm(tmp_path_factory):
    """SmolLM2's own tokenizer, embeddings and first layers, as a folder: a tenth of the time of the whole model."""
    from mmpeft.encoders import load_llm
    from mmpeft.errors import MissingExtra

    try:
        llm = load_llm("package:smollm2-135m-instruct")
    except MissingExtra as error:
        pytest.skip(str(error))
    llm.model.model.layers = llm.model.model.layers[:LAYERS]
    llm.model.config.num_hidden_layers = LAYERS
    if getattr(llm.model.config, "layer_types", None):
        llm.model.config.layer_types = llm.model.config.layer_types[:LAYERS]
    folder = tmp_path_factory.mktemp("llm")
    llm.model.save_pretrained(folder)
    llm.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def features(tmp_path_factory):
    """One feature cache for all: the encoder sees each digit once a session."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def workplace(tmp_path, monkeypatch, features):
    """A working folder with the examples where the commands in their comments look for them."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "features").symlink_to(features)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    gc.collect()


@dataclasses.dataclass
class Run:
    """What `mmpeft fit` left in this process."""

    trainer: object
    task: object
    data: object

    @property
    def model(self):
        return self.task.model.eval()


@pytest.fixture
def fit(workplace):
    """Run `mmpeft fit` with configs (names under examples/, or paths) and options, in this process."""
    from mmpeft.cli import run_lightning

    def run(*configs, options=()):
        paths = [str(c) if Path(c).is_file() else f"examples/{c}" for c in configs]
        cli = run_lightning(["fit", *(part for path in paths for part in ("--config", path)), *QUIET, *options])
        return Run(cli.trainer, cli.model, cli.datamodule)

    return run


@torch.no_grad()
def loss(run, dataset, model=None):
    """The summed loss of a `GenerationTask` on a whole data set."""
    model = model or run.model
    samples = [model.encode({"id": s["id"], "messages": s["messages"]}) for s in dataset]
    return float(model(model.collate(samples)).loss_sum)


def reloaded(folder):
    """The model of an adapter's folder, built by what the folder says, beside nothing else."""
    from mmpeft.tasks.restore import restore

    return restore(folder)


@pytest.fixture
def run_example():
    """A script under examples/ as a module."""
    import importlib.util

    def load(name):
        spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "examples" / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
