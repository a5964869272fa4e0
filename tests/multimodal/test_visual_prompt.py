"""A visual prompt inside a frozen vision tower learns through the loss of a frozen language model.

The frozen encoder is a small random ViT; a question's answer depends on the image only. With the connector and the LLM
frozen too, the prompts are all that can move: their gradient passes the LLM, the connector and every later block.
"""

import pytest
import torch

import mmpeft
from mmpeft.connectors import MLP
from mmpeft.encoders import load_encoder
from mmpeft.multimodal import MultimodalLM

from .kit import build_llm


@pytest.fixture(scope="module")
def parts(tokenizer):  # a connector large enough for the LLM to see
    torch.manual_seed(0)
    encoder = load_encoder("random:timm:vit_tiny_patch16_224", image_size=32)
    model = MultimodalLM(build_llm("llama", tokenizer), image=encoder, connector=MLP(depth=2, init_std=0.5))
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i, answer in enumerate(["yes", "no"] * 4):
        image = torch.randint(120, (32, 32, 3), generator=generator) + (130 if answer == "yes" else 0)
        content = [{"type": "image", "image": image.to(torch.uint8).numpy()}, {"type": "text", "text": "Is it larger?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        samples.append(model.encode({"id": str(i), "messages": messages}))
    return model, model.collate(samples)


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_prompts_alone_learn_the_answer(parts, deep):
    model, batch = parts
    base = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        before = model(batch)
    mmpeft.attach(model, {"encoders.image.backbone.blocks": mmpeft.VPT(num_tokens=4, deep=deep)}, "prompt")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 4 * 192 * (12 if deep else 1)
    optimizer = torch.optim.AdamW(mmpeft.parameter_groups(model, lr=0.1))
    losses = []
    for _ in range(25):
        out = model(batch)
        loss = out.loss_sum / out.num_supervised
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5  # nats; all a random LLM lets four image tokens say
    with torch.no_grad(), mmpeft.use(model, None):
        assert torch.equal(model(batch).loss_sum, before.loss_sum)
    mmpeft.detach(model)
    assert all(torch.equal(t, base[n]) for n, t in model.state_dict().items())
