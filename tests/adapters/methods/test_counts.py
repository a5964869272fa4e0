"""Published parameter counts on RoBERTa-base and -large, built on the meta device: what HF PEFT or AdapterHub count for
the same configuration, and the papers' formulas. (The survey's tables: test_survey_tables.py.)"""

from __future__ import annotations

import pytest
import torch

import mmpeft
from mmpeft.adapters.inspect import tensors_of
from mmpeft.adapters.plan import Plan, resolve

transformers = pytest.importorskip("transformers")

QV = "encoder.layer.*.attention.self.{query,value}"
LINEAR = "encoder.layer.*.attention.self.{query,key,value} encoder.layer.*.{attention.output,intermediate,output}.dense"
BOTH = "encoder.layer.*.{attention.output.dense,output.dense}"


COUNTS = [  # (what, size, pattern, method, count)
    ("PEFT LoHa", "base", QV, mmpeft.LoHa(rank=8), 589_824),
    ("PEFT LoKr", "base", QV, mmpeft.LoKr(rank=8), 26_112),
    ("AdapterHub Compacter", "base", BOTH, mmpeft.Compacter(), 57_088),
    ("AdapterHub Compacter++", "base", "encoder.layer.*.output.dense", mmpeft.Compacter(), 28_576),
    ("AdapterHub Compacter", "large", BOTH, mmpeft.Compacter(), 152_128),
    ("AdapterHub Compacter++", "large", "encoder.layer.*.output.dense", mmpeft.Compacter(), 76_096),
    ("FacT-TT, 2 d r + 12 L r^2", "base", LINEAR, mmpeft.FacTTT(rank=16), 2 * 768 * 16 + 12 * 12 * 16**2),
    ("FacT-TK, 2 d r + 12 L r + r^3", "base", LINEAR, mmpeft.FacTTK(rank=32), 2 * 768 * 32 + 12 * 12 * 32 + 32**3),
    ("C3A, d^2 / b", "base", QV, mmpeft.C3A(block_size=768), 24 * 768),
    ("BOFT(2, 8)", "base", QV, mmpeft.BOFT(block_size=8, m=2, scale=False), 24 * 2 * 768 // 8 * 28),
    ("FourierFT n = 1000", "base", QV, mmpeft.FourierFT(n=1000), 24_000),
    ("SAID", "base", LINEAR, mmpeft.SAID(dimension=1000), 1000),
]


@pytest.fixture(scope="module")
def roberta():
    sizes = {
        "base": {},
        "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    }
    with torch.device("meta"):
        made = {}
        for size, fields in sizes.items():
            config = transformers.RobertaConfig(
                vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **fields
            )
            made[size] = transformers.RobertaModel(config)
    return made


@pytest.mark.parametrize(
    ("size", "pattern", "method", "count"), [c[1:] for c in COUNTS], ids=[f"{c[0]} {c[1]}" for c in COUNTS]
)
def test_counts(roberta, size, pattern, method, count):
    # What `inspect` counts, without its FLOPs of the whole model.
    targets, shared = resolve(roberta[size], Plan.read({pattern: method})), {}
    made = [tensors_of(roberta[size], t, targets, shared) for t in targets]
    assert sum(t.numel() for tensors in made for t in tensors.trained.values()) == count
