"""The loss is the mean over all supervised tokens of an optimizer step, however they are spread over micro-batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmpeft.adapters.store import adapter_tensors
from mmpeft.tasks.base import _Window

from .kit import data_of, task_of

ROOT = Path(__file__).resolve().parents[2]


def trained(tokenizer, make_trainer, **options):
    """The adapter after one epoch of plain gradient descent, samples in order, and the gradient norms of each step."""
    batch_size = options.pop("batch_size")
    task = task_of(tokenizer, lr=0.1, schedule="constant", warmup=0, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    torch.manual_seed(3)  # the adapter's own start
    make_trainer(max_epochs=1, limit_val_batches=0, **options).fit(
        task, datamodule=data_of(batch_size=batch_size, shuffle=False, bucket=False)
    )
    return adapter_tensors(task.model, "default")


@pytest.mark.parametrize("clip", [None, 0.05])
def test_accumulated_micro_batches_equal_one_large_batch(tokenizer, make_trainer, clip):
    # answers of one and two tokens, so that a mean of means differs
    whole = trained(tokenizer, make_trainer, batch_size=6, gradient_clip_val=clip)
    parts = trained(tokenizer, make_trainer, batch_size=2, accumulate_grad_batches=3, gradient_clip_val=clip)
    assert max(float(t.abs().max()) for k, t in whole.items() if k.endswith(".B")) > 1e-4  # B starts at zero
    assert max(float((whole[k] - parts[k]).abs().max()) for k in whole) < 1e-5


def test_a_last_step_of_fewer_micro_batches_is_divided_by_its_own_count(tokenizer, make_trainer):
    # 12 samples in batches of 4, two at a time: the second step has one micro-batch
    whole = trained(tokenizer, make_trainer, batch_size=4, accumulate_grad_batches=2)
    fine = trained(tokenizer, make_trainer, batch_size=1, accumulate_grad_batches=8)
    assert max(float((whole[k] - fine[k]).abs().max()) for k in whole) < 1e-5


def test_the_window_corrects_once_and_exactly():
    window = _Window()
    assert window.add(10, 1) == 10 and window.close() == 1.0
    assert window.add(4, 3) == 12 and window.add(1, 3) == 12 and window.add(7, 3) == 12
    assert window.close() == 1.0  # 12 tokens were guessed and came
    assert window.add(4, 2) == 8 and window.add(20, 2) == 8
    assert window.close() == pytest.approx(8 / 24) and window.close() == 1.0
    assert window.add(0, 2) == 2 and window.close() == 2.0  # nothing supervised is no division by zero


def test_two_ranks_with_unequal_token_counts_equal_one(tmp_path):
    """Two gloo ranks through Lightning's own DDP give the losses' gradients, hence the weights, of one process."""
    script = Path(__file__).with_name("ranks_script.py")
    command = [sys.executable, str(script), str(tmp_path)]
    # Runs in this process have left Lightning's seed, port and rank in the environment, which a child would obey.
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "MASTER_", "LOCAL_", "NODE_", "WORLD_"))}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=clean)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    one, two = torch.load(tmp_path / "1.pt"), torch.load(tmp_path / "2.pt")
    assert one.keys() == two.keys() and len(one) > 4
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-5
