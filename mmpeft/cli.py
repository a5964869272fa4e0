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

from mmpeft.errors import ConfigError, MmpeftError, NameNotFound, nearest


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
    except MmpeftError as error:
        print(f"mmpeft: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def _show_log() -> None:
    """What mmpeft logs goes to stderr; Lightning and transformers show their own."""
    log = logging.getLogger("mmpeft")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
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


@command("show what a plan, or a saved adapter, trains: sites, parameters, bytes, FLOPs")
def inspect_(args: list[str]) -> int:
    if args and args[0].partition("=")[0] in ("--adapter", "-h", "--help"):
        parser = _parser("inspect", "A plan on its model (any option of `mmpeft fit`), or a saved adapter.")
        parser.add_argument("--config", help="YAML of `mmpeft fit`; its model is built, nothing is trained")
        parser.add_argument("--adapter", help="folder of a saved adapter; no model is built")
        _describe(parser.parse_args(args).adapter)
        return 0
    import mmpeft

    task = run_lightning(args, run=False).model
    print(mmpeft.inspect(task.model, task.plan))
    return 0


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
    from mmpeft.tasks.merged import write_merged

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
    target = model.get_submodule(given.module)
    mmpeft.export_peft(target, given.output)
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
