"""The command line: `mmpeft fit | validate | test | predict` run Lightning, the other commands work on saved adapters.

    mmpeft fit --config examples/vqa_digits.yaml --trainer.max_epochs 2
    mmpeft inspect --config examples/vqa_digits.yaml
    mmpeft generate --adapter runs/quickstart/adapter --image seven.png "Which digit is this?"

A command is one function of its arguments, registered by `@command`; `mmpeft --help` prints the table without importing
anything heavy. The Lightning commands are a `LightningCLI`, so every argument of trainer, task and data is a YAML key.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpeft.errors import ConfigError, NameNotFound, nearest, refusal_in


@dataclass(frozen=True)
class Command:
    """A subcommand: `run` takes the arguments after its name and gives an exit code."""

    name: str
    summary: str
    run: Callable[[list[str]], int]


COMMANDS: dict[str, Command] = {}
LIGHTNING = {
    "fit": "train what the plan says, and save the adapter",
    "validate": "score the validation split",
    "test": "score the test split",
    "predict": "answer the predict split",
}


def command(summary: str) -> Callable[[Callable[[list[str]], int]], Callable[[list[str]], int]]:
    """Register a function as the subcommand of its name (an underscore at the end is dropped).

    Raises:
        ConfigError: the name is taken.
    """

    def register(function: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
        name = function.__name__.rstrip("_")
        if name in COMMANDS or name in LIGHTNING:
            raise ConfigError(f"there is already a command {name!r}")
        COMMANDS[name] = Command(name, summary, function)
        return function

    return register


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, or 2 with a message on stderr where the input was wrong."""
    given = list(sys.argv[1:] if argv is None else argv)
    _show_log()
    summaries = LIGHTNING | {c.name: c.summary for c in COMMANDS.values()}
    if not given or given[0] in ("-h", "--help"):
        print("usage: mmpeft COMMAND [arguments]; mmpeft COMMAND --help says which\n")
        print("\n".join(f"  {name:<10}{summary}" for name, summary in summaries.items()))
        return 0
    try:
        name = given[0]
        if name == "--version":
            from mmpeft import __version__

            print(__version__)
        elif name in LIGHTNING:
            run_lightning(given if argv is not None else None)
        elif name in COMMANDS:
            return COMMANDS[name].run(given[1:])
        else:
            raise NameNotFound(f"no command {name!r}{nearest(name, summaries)}; commands: {', '.join(summaries)}")
    except Exception as error:
        refused = refusal_in(error)
        if refused is None and not isinstance(error, OSError) and type(error).__name__ != "MisconfigurationException":
            raise  # a defect: its traceback is what tells
        shown = refused or error
        print(f"mmpeft: {type(shown).__name__}: {shown}", file=sys.stderr)
        return 2
    return 0


class _ToStderr(logging.Handler):
    """Writes to what sys.stderr is at the moment, which may change between two commands of one process."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


_HANDLER = _ToStderr()


def _show_log() -> None:
    """What mmpeft logs goes to stderr; Lightning and transformers show their own."""
    log = logging.getLogger("mmpeft")
    if _HANDLER not in log.handlers:
        log.addHandler(_HANDLER)
        log.propagate = False
    log.setLevel(logging.INFO)


def run_lightning(args: list[str] | None, *, run: bool = True) -> Any:
    """The `LightningCLI` of mmpeft, run on `args` (None: the process's own); gives it back with trainer, model, datamodule.

    Args:
        run: False parses arguments without a subcommand and builds everything, but trains nothing.
    """
    import warnings

    from mmpeft.tasks.lightning_cli import MmpeftCLI

    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    return MmpeftCLI(args=args, run=run)


@command("show what a plan, or a saved adapter, trains and costs: sites, parameters, bytes, FLOPs")
def inspect_(args: list[str]) -> int:
    import json

    import mmpeft

    if {arg.partition("=")[0] for arg in args} & {"--adapter", "--meta", "-h", "--help"}:
        given = _inspect_parser().parse_args(args)
        if given.adapter is not None:
            _describe(given.adapter)
            return 0
        seen = _inspect_meta(given)
    else:
        task = run_lightning([arg for arg in args if arg != "--json"], run=False).model
        seen = mmpeft.inspect(task.model, task.plan)
    print(json.dumps(seen.to_dict(), indent=2) if "--json" in args else seen)
    return 0


def _inspect_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "inspect", "A plan on its model (any option of `mmpeft fit`), on a bare architecture, or a saved adapter."
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", help="YAML of `mmpeft fit`; its model is built, nothing is trained")
    which.add_argument("--adapter", help="folder of a saved adapter; no model is built")
    which.add_argument(
        "--meta",
        metavar="NAME",
        help="architecture without weights, offline: hf:FacebookAI/roberta-large and other presets, a folder with "
        "config.json, timm:NAME, open_clip:NAME",
    )
    parser.add_argument("--plan", metavar="FILE", help="YAML of the plan; with --meta")
    parser.add_argument("--labels", type=int, help="give the architecture a classification head")
    parser.add_argument("--dtype", default="float32", help="of the weights (default: float32)")
    parser.add_argument("--batch", type=int, help="samples of the step that is costed (default: 2)")
    parser.add_argument("--length", type=int, help="tokens, or samples of sound, of each (default: a few)")
    parser.add_argument("--optimizer", default="adamw", help="whose state is counted (default: adamw)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _inspect_meta(given: argparse.Namespace) -> Any:
    """The plan on an architecture without weights."""
    import torch

    import mmpeft
    from mmpeft.adapters.example import example_of, resized
    from mmpeft.encoders.options import as_dtype
    from mmpeft.encoders.presets import longest, meta_model

    if given.plan is None:
        raise ConfigError("inspect --meta needs --plan FILE")
    for name in ("labels", "batch", "length"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise ConfigError(f"--{name} {getattr(given, name)}; expected at least 1")
    plan = mmpeft.Plan.read(given.plan)
    dtype = as_dtype(given.dtype)
    assert dtype is not None
    model = meta_model(given.meta, labels=given.labels, dtype=dtype)
    most = longest(model)
    if given.length is not None and most is not None and given.length > most:
        raise ConfigError(f"--length {given.length}; {given.meta} has learned positions for at most {most} tokens")
    example = None
    if given.batch is not None or given.length is not None:
        example = example_of(model, device=torch.device("cpu"))
        example = resized(example, batch=given.batch, length=given.length)
    return mmpeft.inspect(model, plan, example=example, optimizer=given.optimizer)


@command("answer a question about images or sounds with a saved adapter")
def generate(args: list[str]) -> int:
    parser = _parser("generate", "Ask a trained model a question.")
    _adapter_arguments(parser)
    parser.add_argument("--image", action="append", default=[], help="a picture; may be given several times")
    parser.add_argument("--audio", action="append", default=[], help="a sound; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("question")
    given = parser.parse_args(args)
    for path in given.image + given.audio:
        if not Path(path).is_file():
            raise NameNotFound(f"no file {path!r}")
    if given.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {given.max_new_tokens}; expected at least 1")
    if given.image:
        from mmpeft.encoders.image_preprocess import load_image

        for path in given.image:
            load_image(path)
    model = _restored(given)
    if not hasattr(model, "chat"):
        raise ConfigError(f"the adapter is of a {type(model).__name__}, which answers no questions")
    media = [("image", p) for p in given.image] + [("audio", p) for p in given.audio]
    content = [{"type": kind, kind: path} for kind, path in media] + [{"type": "text", "text": given.question}]
    print(model.chat([{"role": "user", "content": content}], max_new_tokens=given.max_new_tokens))
    return 0


@command("write the model with its adapter merged into the weights")
def merge(args: list[str]) -> int:
    parser = _parser("merge", "Bake a saved adapter into a plain model: model.safetensors, and llm/ for transformers.")
    _adapter_arguments(parser)
    parser.add_argument("--output", required=True, help="folder to write; must not hold a model yet")
    given = parser.parse_args(args)
    from mmpeft.tasks.merged import check_output, write_merged

    check_output(given.output)
    for path in write_merged(_restored(given), given.output):
        print(path)
    return 0


@command("write a saved adapter in HF PEFT's format")
def export(args: list[str]) -> int:
    parser = _parser("export", "Write the adapter as a HF PEFT folder; only methods that PEFT has.")
    _adapter_arguments(parser)
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--module", default="", help="path of the sub-module whose sites are exported, such as llm")
    given = parser.parse_args(args)
    import mmpeft

    model = _restored(given)
    modules = dict(model.named_modules())
    if given.module not in modules:
        raise NameNotFound(f"the model has no module {given.module!r}{nearest(given.module, modules)}")
    mmpeft.export_peft(modules[given.module], given.output)
    print(given.output)
    return 0


@command("record a scripted expert's demonstrations")
def collect(args: list[str]) -> int:
    from mmpeft.policies import commands

    return commands.collect(args)


@command("evaluate a policy in simulation: success with its interval, videos")
def rollout(args: list[str]) -> int:
    from mmpeft.policies import commands

    return commands.rollout(args)


@command("write one self-contained HTML page of a run's folder")
def report(args: list[str]) -> int:
    parser = _parser("report", "Results, curves, plan, videos and commands of a run in one HTML file.")
    parser.add_argument("folder", help="of the run: what `mmpeft fit`, `mmpeft rollout` or an example left there")
    parser.add_argument("--out", help="file to write; default report.html in the folder")
    parser.add_argument("--title", help="heading; default the run's task, or the folder's name")
    parser.add_argument("--budget-mb", type=float, default=24, help="size of the page; videos beyond it are only named")
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    given = parser.parse_args(args)
    from mmpeft.report import write

    page = write(given.folder, title=given.title, out=given.out, budget_mb=given.budget_mb)
    print(page)
    if given.open:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
    return 0


@command("let a policy practise: PPO on an adapter of a saved clone")
def ppo(args: list[str]) -> int:
    from mmpeft.policies import ppo_command

    return ppo_command.ppo(args)


def _parser(name: str, text: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"mmpeft {name}", description=text)


def _adapter_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, help="folder of a saved adapter")
    parser.add_argument(
        "--config", help="YAML of `mmpeft fit` that says how the model is built, if the folder does not"
    )


def _restored(given: argparse.Namespace) -> Any:
    """The model with its adapter, as `--adapter` and `--config` say."""
    import yaml

    from mmpeft.tasks.restore import restore

    recipe = None
    if given.config is not None:
        try:
            recipe = yaml.safe_load(Path(given.config).read_text(encoding="utf-8"))["model"]["init_args"]["model"]
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{given.config!r} has no model.init_args.model ({type(error).__name__}: {error})"
            ) from error
    return restore(given.adapter, recipe)


def _describe(folder: str) -> None:
    """Print what a saved adapter says of itself."""
    import json

    from mmpeft.adapters.store import read_description, read_tensors

    description = read_description(folder)
    tensors = read_tensors(Path(folder), description)
    count = sum(t.numel() for t in tensors.values())
    print(f"adapter {description['name']!r}: {len(tensors)} tensors, {count:,} parameters")
    print(f"base {description['base']['name']} ({description['base']['fingerprint'][:12]})")
    for rule in description["plan"]:
        print(f"  {json.dumps(rule)}")
    metadata = {k: v for k, v in description.get("metadata", {}).items() if k != "model"}
    print(json.dumps(metadata, indent=2) if metadata else "no metadata")


if __name__ == "__main__":
    sys.exit(main())
