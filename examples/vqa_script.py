"""What vqa_digits.yaml does, in ten lines of Python: two frozen pretrained models, a trained connector, LoRA in the LLM.

    python examples/vqa_script.py

Any Lightning Trainer will do (strategy, precision, logger, callbacks), and so will a plain loop: after
`mmpeft.attach(model, plan)`, `torch.optim.AdamW(mmpeft.parameter_groups(model, lr=1e-3))` has what is trained.
"""

from lightning.pytorch import Trainer, seed_everything

import mmpeft
from mmpeft.connectors import PixelShuffleMLP
from mmpeft.data import DataModule, DigitsVQA
from mmpeft.multimodal import MultimodalLM
from mmpeft.tasks import AdapterCheckpoint, GenerationTask

LLM = "package:smollm2-135m-instruct"
IMAGE = {"name": "package:efficientnet-lite0", "image_size": 64, "layer": 3, "resize": "squash"}
SETTINGS = {"dtype": "bfloat16", "attn_implementation": "eager", "chat_template": "chatml"}
PLAN = [
    {"match": "connectors.image", "train": "full", "lr": 2e-3},
    {"match": "llm.**.{q,v}_proj", "method": mmpeft.LoRA(rank=16, alpha=32), "lr": 1e-3},
]


def build(llm: str = LLM) -> MultimodalLM:
    connector = PixelShuffleMLP(factor=4, output_norm=True)
    return MultimodalLM(llm, image=IMAGE, connector=connector, **SETTINGS)


def main(steps: int = 300, questions: int = 500, folder: str = "runs/script", llm: str = LLM) -> MultimodalLM:
    """Train for `steps`, answer `questions` held-out questions, save the adapter under `folder`."""
    seed_everything(1)
    model = build(llm)
    print(mmpeft.inspect(model, PLAN))
    task = GenerationTask(model, PLAN, max_new_tokens=4, feature_cache="runs/features", calibrate=True)
    held_out = DigitsVQA("test", size=questions)
    data = DataModule(DigitsVQA("train", size=16 * steps), held_out, batch_size=16, bucket=False, eval_batch_size=100)
    saving = AdapterCheckpoint(f"{folder}/adapter")
    trainer = Trainer(accelerator="cpu", max_epochs=1, gradient_clip_val=1.0, num_sanity_val_steps=0,
                      enable_checkpointing=False, default_root_dir=folder, callbacks=[saving])  # fmt: skip
    trainer.fit(task, data)
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
    question = held_out[0]["messages"]
    print(question[0]["content"][-1]["text"], "->", model.eval().chat(question, max_new_tokens=8))
    return model


if __name__ == "__main__":
    main()
