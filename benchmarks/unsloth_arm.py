"""Unsloth's arm of `benchmarks.llm`, in a process of its own: importing it patches transformers, peft and trl for good.

    python -m benchmarks.unsloth_arm --shape 1.5b        # prints one JSON object on its last line

Its loader wants a folder with a tokenizer, so the random model is written to a temporary one first, by another process
(`--write`), because unsloth has to be imported before transformers. No gradient checkpointing (its fastest setting that fits), its own fused loss, SDPA or what it finds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")


def write_model(folder: Path, shape: Any) -> None:
    """The row's model and a tokenizer of its size, as transformers saves them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from benchmarks.models import llama

    model = llama(shape)
    model.save_pretrained(folder)
    del model
    words = {f"w{i}": i for i in range(shape.vocab - 3)} | {
        w: shape.vocab - 3 + i for i, w in enumerate(("<s>", "</s>", "<pad>"))
    }
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds, losses and memory of the arm."""
    from benchmarks.harness import DEVICE, Skipped, free, need, peak, timed, versions
    from benchmarks.models import ALPHA, RANK, SHAPES, TARGETS, TINY, adamw, set_peft, token_batches

    try:
        need("unsloth", gpu=True)
    except Skipped as why:
        return {"skipped": str(why)}
    shape = TINY if args.tiny else SHAPES[args.shape]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.unsloth_arm", "--write", folder, "--shape", args.shape]
        subprocess.run([*command, *["--tiny"] * args.tiny], check=True, stdout=subprocess.DEVNULL)
        import torch
        import unsloth  # noqa: F401  first, so that its patches are in place
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            model_name=folder, max_seq_length=shape.length, dtype=torch.bfloat16, load_in_4bit=False
        )
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, target_modules=list(TARGETS), lora_alpha=ALPHA, lora_dropout=args.dropout, bias="none",
        use_gradient_checkpointing=False, random_state=0,
    )  # fmt: skip
    set_peft(model)
    model.train()
    optimizer, data = adamw(model), token_batches(shape)

    def step(i: int) -> Any:
        ids = data[i % len(data)]
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    free()
    milliseconds, losses = timed(step, warmup=args.warmup, steps=args.steps)
    return {"milliseconds": milliseconds, "losses": losses, "gib": peak(), "versions": versions()}


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--shape", default="1.5b")
    made.add_argument("--dropout", type=float, default=0.0)
    made.add_argument("--warmup", type=int, default=5)
    made.add_argument("--steps", type=int, default=12)
    made.add_argument("--tiny", action="store_true")
    made.add_argument("--write", type=Path, help="only write the model into this folder")
    args = made.parse_args()
    if args.write is not None:
        from benchmarks.models import SHAPES, TINY

        write_model(args.write, TINY if args.tiny else SHAPES[args.shape])
        return
    print(json.dumps(run(args)))


if __name__ == "__main__":
    main()
