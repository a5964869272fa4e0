"""Run by test_step_control_ranks.py: controllers on two ranks that see different data; each rank writes its adapter."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lightning
import torch

import mmpeft
from tests.tasks.test_step_control import ROWS, loader, row, task, tensors

NAMES = ("APTController", "SpIELMoves", "LayerSampler", "WorstSamples")


class Keep(lightning.Callback):
    """Each rank writes its adapter: a forked process's weights do not come back."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer, pl_module) -> None:
        controller = trainer.callbacks[0].controller
        learned = controller.importance if isinstance(controller, mmpeft.LayerSampler) else torch.zeros(())
        torch.save(tensors(pl_module.model) | {"learned": learned}, self.path.with_suffix(f".{trainer.global_rank}.pt"))


def main() -> None:
    torch.set_num_threads(1)
    for name in NAMES:
        trainer = lightning.Trainer(
            accelerator="cpu", devices=2, strategy="ddp_fork_find_unused_parameters_true", max_epochs=4, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            callbacks=[row(name)[1], Keep(Path(sys.argv[1]) / name)],
        )  # fmt: skip
        trainer.fit(task(ROWS[name][0]), loader(4))


if __name__ == "__main__":
    main()
