"""A multimodal step is predicted too: ids, masks and positions are computed, everything else is pretended."""

import pytest
import torch

import mmpeft
from mmpeft.adapters.probe import tensors_in

from .kit import build_model

PLAN = {"connectors.**": "full", "llm.**.{q,v}_proj": mmpeft.LoRA(rank=3)}


def test_the_step_of_a_multimodal_model_costs_what_was_predicted(tokenizer):
    model = build_model("llama", tokenizer)
    (batch,) = model.example_inputs()
    seen = mmpeft.inspect(model, PLAN)
    assert seen.note == "predicted" and seen.rows[0].cost.saved_bytes > 0 and seen.rows[1].cost.forward_flops > 0
    mmpeft.attach(model, PLAN, check=False)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *tensors_in(batch)]}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.train()(batch)
    nbytes = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
    assert seen.cost.saved_bytes == pytest.approx(nbytes, rel=0.05)
