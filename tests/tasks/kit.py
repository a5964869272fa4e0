"""A tiny question-answering problem: which of three colours is the picture? One of `tests.multimodal`'s random models."""

import torch

import mmpeft
from mmpeft.connectors import MLP
from mmpeft.data import DataModule
from mmpeft.tasks import GenerationTask
from tests.multimodal.kit import StubImage, build_model

COLOURS = ("7", "12", "yes")
PLAN = {"connectors.image": "full", "llm.**.{q,v}_proj": mmpeft.LoRA(rank=4, alpha=8)}
STRONG = {"connectors.image": "full", "llm.**.{q,k,v,o,gate,up,down}_proj": mmpeft.LoRA(rank=8, alpha=16)}
DROPOUT = {"connectors.image": "full", "llm.**.{q,v}_proj": mmpeft.LoRA(rank=4, alpha=8, dropout=0.2)}


class Colours(torch.utils.data.Dataset):
    """`size` pictures [3, 16, 16] of one channel each, with noise; questions of two lengths."""

    def __init__(self, size: int = 12, seed: int = 0) -> None:
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        channel = index % 3
        generator = torch.Generator().manual_seed(100 * self.seed + index)
        picture = 0.3 * torch.rand(3, 16, 16, generator=generator)
        picture[channel] += 0.7
        question = "Which digit is this?" if index % 2 else "Is the first image larger than the second one?"
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        answer = COLOURS[channel]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        kind = "long" if index % 2 == 0 else "short"
        return {"id": f"colour/{index}", "messages": messages, "kind": kind, "answers": [answer]}


def tiny(tokenizer):
    """The same weights every time."""
    torch.manual_seed(5)  # of the stub encoder, which is made before build_model seeds
    model = build_model("llama", tokenizer, image=StubImage(), audio=None, state=None, connector=MLP(depth=2, init_std=0.5))
    with torch.no_grad():  # a random model's padding row is zero, and its end of turn, the same token, could never be said
        model.llm.get_input_embeddings().weight[2].normal_(std=0.2)
    return model


def task_of(tokenizer, plan=PLAN, **options) -> GenerationTask:
    return GenerationTask(tiny(tokenizer), plan, **{"max_new_tokens": 3} | options)


def data_of(**options) -> DataModule:
    return DataModule(Colours(), Colours(6, seed=1), **{"batch_size": 4} | options)
