"""gpu_siglip_smollm2.yaml here: no GPU and no hub, so its architectures with random weights, on VQA v2's own file form."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

import mmpeft

from .conftest import LLM, ROOT, loss

EXAMPLE = ROOT / "examples" / "gpu_siglip_smollm2.yaml"
IMAGE = "--model.init_args.model.init_args.image"


@pytest.fixture
def vqa_v2(workplace):
    """Four questions over two pictures a split, where the example looks for the data set."""
    given = yaml.safe_load(EXAMPLE.read_text())["data"]["init_args"]
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        names = given[split]["init_args"]
        folder = workplace / names["images"]
        folder.mkdir(parents=True)
        questions, annotations = [], []
        for number in range(4):
            image_id = number // 2 + 1
            path = folder / names["image_name"].format(image_id=image_id)
            Image.fromarray(rng.integers(0, 255, (60 + number, 81, 3), dtype=np.uint8)).save(path)
            text = ("Is it day?", "How many are there?")[number % 2]
            questions.append({"question_id": number, "image_id": image_id, "question": text})
            answer = ("yes", "2")[number % 2]
            annotations.append({
                "question_id": number, "image_id": image_id, "answer_type": ("yes/no", "number")[number % 2],
                "multiple_choice_answer": answer, "answers": [{"answer": answer, "answer_id": n} for n in range(1, 11)],
            })  # fmt: skip
        subtype = f"{split}2014"
        content = {"data_subtype": subtype, "questions": questions}
        (workplace / names["questions"]).write_text(json.dumps(content))
        (workplace / names["annotations"]).write_text(json.dumps({"annotations": annotations}))


def test_hub_names_are_kept(workplace):
    """The names are the libraries' own, so that they load where the hub is in reach."""
    import timm

    given = yaml.safe_load(EXAMPLE.read_text())["model"]["init_args"]["model"]["init_args"]
    source, _, name = given["image"]["name"].partition(":")
    assert source == "timm" and name in timm.list_models(pretrained=False)
    assert given["llm"] == "hf:HuggingFaceTB/SmolLM2-135M-Instruct"


def test_runs_with_random_weights(fit, small_llm, vqa_v2):
    names = [f"{IMAGE}.name=random:timm:vit_base_patch16_siglip_224", f"{LLM}=random:hf:{small_llm}"]
    sizes = ["--data.init_args.batch_size=2", "--data.init_args.eval_batch_size=2", "--data.init_args.workers=0"]
    options = [
        *names,
        *sizes,
        "--data.init_args.pin_memory=false",
        "--trainer.accelerator=cpu",
        "--trainer.limit_val_batches=1",
    ]
    run = fit("gpu_siglip_smollm2.yaml", options=options)
    assert run.trainer.global_step == 2 and run.trainer.precision == "bf16-mixed"
    assert {"val_loss", "val_vqa_official"} <= set(run.trainer.callback_metrics)
    encoder, connector = run.model.encoders["image"], run.model.connectors["image"]
    assert connector.num_tokens(encoder.num_tokens((3, 224, 224))) == 49
    samples = [run.data.datasets["train"][i] for i in range(3)]
    before = loss(run, samples)
    mmpeft.detach(run.model)
    mmpeft.load(run.model, "runs/siglip_smollm2/adapter")
    assert loss(run, samples) == before
