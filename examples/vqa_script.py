"""What a YAML of `mmpeft fit` does, in Python: the quick start's model on one kind of question.

    python examples/vqa_script.py [steps]
"""

import sys

import lightning

import mmpeft
from mmpeft.connectors import PixelShuffleMLP
from mmpeft.data import DataModule, DigitsVQA
from mmpeft.multimodal import MultimodalLM
from mmpeft.tasks import GenerationTask

image = {"name": "package:efficientnet-lite0", "image_size": 64, "layer": 3, "resize": "squash"}
connector = PixelShuffleMLP(factor=4, input_norm=False, output_norm=True)
model = MultimodalLM("package:smollm2-135m-instruct", image=image, connector=connector, dtype="bfloat16", chat_template="chatml")
plan = {"connectors.image": "full", "llm.**.{q,v}_proj": mmpeft.LoRA(rank=16, alpha=32)}
task = GenerationTask(model, plan, lr=1e-3, max_new_tokens=4, feature_cache="runs/features", calibrate=True)
data = DataModule(DigitsVQA("train", ["which_digit"]), DigitsVQA("test", ["which_digit"], size=200), batch_size=16)
trainer = lightning.Trainer(max_steps=int(sys.argv[1]) if len(sys.argv) > 1 else 150, accelerator="cpu", logger=False)
trainer.fit(task, datamodule=data)
mmpeft.save(model, "runs/vqa_script/adapter")
photo = data.datasets["val"][0]["messages"][0]["content"][0]["image"]
print(model.chat([{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": "Which digit is this?"}]}]))
