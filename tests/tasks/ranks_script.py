"""Run by test_loss.py: one optimizer step on one rank with six samples, and on two ranks with three each."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lightning
import torch

from mmpeft.adapters.store import adapter_tensors
from tests.multimodal.kit import build_tokenizer
from tests.tasks.kit import Colours, DataModule, task_of


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    for ranks in (2, 1):
        sgd = lambda groups: torch.optim.SGD(groups, lr=0.1)  # noqa: E731
        task = task_of(tokenizer, lr=0.1, schedule="constant", warmup=0, optimizer=sgd)
        data = DataModule(Colours(6), batch_size=6 // ranks, shuffle=False, bucket=False)
        trainer = lightning.Trainer(
            accelerator="cpu", devices=ranks, strategy="ddp_fork" if ranks > 1 else "auto", max_steps=1, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            callbacks=[Keep(folder / f"{ranks}.pt")],
        )  # fmt: skip
        torch.manual_seed(3)
        trainer.fit(task, datamodule=data)


class Keep(lightning.Callback):
    """Rank 0 writes the adapter: a forked process's weights do not come back."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer, pl_module) -> None:
        if trainer.is_global_zero:
            torch.save({k: v.clone() for k, v in adapter_tensors(pl_module.model, "default").items()}, self.path)


if __name__ == "__main__":
    main()
