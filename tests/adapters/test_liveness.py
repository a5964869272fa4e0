"""The proof of liveness: dead sites are errors with names, unreached ones are told apart, nothing is left behind."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same_object, deltas, fill, snapshot
from torch import nn

import mmpeft
from mmpeft.connectors import CFormer, QFormer
from mmpeft.errors import ConfigError, DeadSite

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class Cached(nn.Module):
    """Uses a copy of its weight that it made at construction."""

    def __init__(self):
        super().__init__()
        self.live = nn.Linear(4, 4)
        self.dead = nn.Linear(4, 4)
        self.copied = self.dead.weight.detach().clone()

    def forward(self, x):
        return F.linear(self.live(x), self.copied, self.dead.bias)


class CachedInEval(nn.Module):
    """Reads its weight everywhere, but without gradients multiplies by a copy (a fused inference path)."""

    def __init__(self):
        super().__init__()
        self.live = nn.Linear(4, 4)
        self.fused = nn.Linear(4, 4)
        self.copied = self.fused.weight.detach().clone()

    def forward(self, x):
        w = self.fused.weight
        return F.linear(self.live(x), w if torch.is_grad_enabled() else self.copied.to(w.dtype), self.fused.bias)


class NoGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.live = nn.Linear(4, 4)
        self.cut = nn.Linear(4, 4)

    def forward(self, x):
        return self.live(self.cut(x).detach())


class Experts(nn.Module):
    """Routes every token to expert 0; has a tower that only `audio=` reaches."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(3))
        self.audio = nn.Sequential(nn.Linear(4, 4), nn.GELU())

    def forward(self, x, audio=None):
        x = self.experts[0](x)
        return x if audio is None else x + self.audio(audio)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.gate = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return x + self.gate * self.inner(x)


@pytest.mark.parametrize(
    ("model", "dead", "modes"),
    [
        (Cached, "dead.weight", ["in train:", "in eval:", "in eval without gradients:"]),
        (CachedInEval, "fused.weight", ["in eval without gradients:"]),
        (NoGradient, "cut.weight", ["in train:", "in eval:"]),
    ],
)
def test_a_dead_site_is_an_error_that_names_it(model, dead, modes):
    model = model()
    before = snapshot(model)
    with pytest.raises(DeadSite) as error:
        mmpeft.attach(model, {"**": mmpeft.LoRA(rank=2)}, example=X)
    assert dead in str(error.value) and "live.weight" not in str(error.value)
    assert [m for m in ("in train:", "in eval:", "in eval without gradients:") if m in str(error.value)] == modes
    assert_same_object(before, snapshot(model))  # what failed leaves no trace
    mmpeft.attach(model, {f"** !{dead.split('.')[0]}": mmpeft.LoRA(rank=2)}, example=X)


def test_a_call_method_that_a_fast_path_skips_is_dead():
    model = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    with pytest.raises(DeadSite, match="linear1"):
        mmpeft.attach(model, {"linear1": mmpeft.Bottleneck(size=4)}, example=torch.randn(2, 3, 8))


def test_unreached_sites_are_told_apart(caplog):
    caplog.set_level(logging.WARNING, "mmpeft")
    model = Experts()
    mmpeft.attach(model, {"**": mmpeft.LoRA(rank=2)}, example=X)
    (record,) = caplog.records
    assert "3 sites" in record.message and "not reached" in record.message
    assert all(name in record.message for name in ("experts.1.0", "experts.2.0", "audio.0"))
    assert "experts.0.0" not in record.message


def test_a_closed_gate_is_a_warning(caplog):
    caplog.set_level(logging.WARNING, "mmpeft")
    mmpeft.attach(Gated(), {"inner": mmpeft.LoRA(rank=2)}, example=X)
    assert "gradient of exactly zero" in caplog.text and "inner.weight" in caplog.text


def test_a_key_bias_is_listed_as_invariant(caplog):
    caplog.set_level(logging.INFO, "mmpeft")
    transformers = pytest.importorskip("transformers")
    size = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**size))
    mmpeft.attach(model, {"**.{q,k,v}_proj": mmpeft.BitFit()})
    assert "does not depend on 1 sites" in caplog.text and "k_proj.bias" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_key_biases_and_nothing_else_are_invariant_in_any_precision(dtype, caplog):
    """`full` on a whole C-Former and Q-Former: half precision leaves a key bias a gradient like a query's own."""
    caplog.set_level(logging.INFO, "mmpeft")
    sizes = dict(in_dim=20, out_dim=24, width=48, depth=2, heads=4, hidden_dim=64)
    for cls, options in ((CFormer, {"frames_per_token": 3}), (QFormer, {"num_queries": 5})):
        torch.manual_seed(0)
        connector = cls(**sizes, **options).to(dtype)
        caplog.clear()
        mmpeft.attach(connector, {".": "full"}, example=torch.randn(3, 24, 20).to(dtype))
        (record,) = [r for r in caplog.records if "does not depend" in r.message]
        biases = [n for n, _ in connector.named_parameters() if n.endswith("key.bias")]
        assert set(record.args[2].split(", ")) == set(biases) and record.args[0] == len(biases) > 1


class OwnPathWithoutGradients(nn.Module):
    """Attention that is a fifth larger without gradients, so that the two modes of eval never agree."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        y = nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return y if torch.is_grad_enabled() else 1.2 * y


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_has_no_effect_in_any_mode_is_not_dead_in_one(tokens, dtype):
    """One token attends to itself whatever q and k say; a key bias never matters."""
    x = torch.randn(3, tokens, 4).to(dtype)
    mmpeft.attach(OwnPathWithoutGradients().to(dtype), {"{q,k,v}": "full"}, example=x)


def test_the_first_real_batch_is_the_example_where_none_is_known():
    class Unknown(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *xs, scale=1.0):
            return self.inner(xs[0]) * scale

    model = Unknown(nn.Linear(4, 4))
    before = snapshot(model)
    mmpeft.attach(model, {"inner": mmpeft.LoRA(rank=2)})
    with torch.inference_mode():
        model(X)  # cannot carry a gradient: the proof waits on
    assert len(model._forward_pre_hooks) == 1
    with torch.no_grad():
        y = model(X, scale=2.0)
    assert len(model._forward_pre_hooks) == 0 and y.shape == X.shape
    mmpeft.detach(model)
    assert_same_object(before, snapshot(model))

    dead = Unknown(Cached())
    mmpeft.attach(dead, {"inner.dead": mmpeft.LoRA(rank=2)})
    with pytest.raises(DeadSite, match="inner.dead.weight"):
        dead(X)


def test_detaching_before_the_first_batch_leaves_no_hook():
    model = Cached()
    before = snapshot(model)
    mmpeft.attach(model, {"live": mmpeft.LoRA(rank=2)})
    mmpeft.detach(model)
    assert_same_object(before, snapshot(model))
    model(X)


def test_on_meta_the_proof_waits_for_the_real_model():
    with torch.device("meta"):
        model = Cached()
    mmpeft.attach(model, {"dead": mmpeft.LoRA(rank=2)}, example=X)
    model(torch.empty(2, 3, 4, device="meta"))
    model.to_empty(device="cpu")
    model.copied = torch.zeros(4, 4)
    for p in model.parameters():
        nn.init.normal_(p)
    with pytest.raises(DeadSite, match="dead.weight"):
        model(X)


def test_a_second_adapter_is_proved_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    mmpeft.attach(model, {"0": mmpeft.LoRA(rank=2)}, name="a", example=X)
    fill(model, "a")
    y = model(X)
    values = [p.clone() for d in deltas(model, "a") for p in d.parameters()]
    mmpeft.attach(model, {"2": mmpeft.LoRA(rank=2)}, name="b", example=X)
    assert all(
        torch.equal(a, b) for a, b in zip(values, (p for d in deltas(model, "a") for p in d.parameters()), strict=True)
    )
    mmpeft.use(model, "a")
    assert torch.equal(model(X), y)


def test_a_failed_second_attach_keeps_the_first():
    model = Cached()
    mmpeft.attach(model, {"live": mmpeft.LoRA(rank=2)}, name="a", example=X)
    fill(model, "a")
    y = model(X)
    with pytest.raises(DeadSite):
        mmpeft.attach(model, {"dead": mmpeft.LoRA(rank=2)}, name="b", example=X)
    assert mmpeft.active(model) == ("a",) and torch.equal(model(X), y)
    with pytest.raises(ConfigError, match="a part of this"):
        mmpeft.attach(nn.Sequential(model), {"0.live": mmpeft.LoRA(rank=2)}, name="c", example=X)
