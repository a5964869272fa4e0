"""What a property in place of the weight could break, each with a non-zero adapter (each line of the design's list)."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from cases import (
    SITES,
    Attention,
    DirectRead,
    Experts,
    Host,
    Tied,
    assert_same_object,
    base_output,
    build,
    close,
    deltas,
    fill,
    snapshot,
)
from torch import nn

import mmpeft
from mmpeft.adapters import slot as slot_module
from mmpeft.errors import ConfigError, Unsupported

BY_NAME = {site.name: site for site in SITES}


def _llama(**kwargs):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, **kwargs
    )
    return transformers.LlamaForCausalLM(config).eval()


# --- bare: code that wants the stored base ----------------------------------------------------------------------------


def test_get_parameter_under_bare():
    model, x, base = build(BY_NAME["direct-read"], "lora")
    fill(model)
    with pytest.raises(AttributeError):  # W' is no parameter, and torch says so
        model.get_parameter("qkv.weight")
    with mmpeft.bare(model):
        assert model.get_parameter("qkv.weight") is model.qkv._parameters["weight"]
        assert torch.equal(model(x), base)
    assert not torch.equal(model(x), base)


def test_tying_under_bare():
    model = _llama(tie_word_embeddings=True)
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    mmpeft.attach(model, {"model.embed_tokens": mmpeft.LoRA(rank=2)})
    fill(model, "default")
    y = model(ids).logits
    with mmpeft.bare(model):
        model.tie_weights()
    assert model.lm_head._parameters["weight"] is model.model.embed_tokens._parameters["weight"]
    assert torch.equal(model(ids).logits, y)


def test_resizing_embeddings_under_bare():
    model = _llama(tie_word_embeddings=False)
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    mmpeft.attach(model, {"model.**.q_proj": mmpeft.LoRA(rank=2)})
    fill(model, "default")
    y = model(ids).logits
    with mmpeft.bare(model):
        model.resize_token_embeddings(24)
    assert close(model(ids).logits[..., :20], y)


def test_an_adapted_embedding_that_is_resized_is_named():
    model = _llama(tie_word_embeddings=False)
    mmpeft.attach(model, {"model.embed_tokens": mmpeft.LoRA(rank=2)})
    with mmpeft.bare(model):
        model.resize_token_embeddings(24)
    with pytest.raises(ConfigError, match=r"embed_tokens.weight has shape \(24, 16\).*resize the base first"):
        model(torch.tensor([[3, 1]]))


def test_in_place_initialisation_under_bare_and_not():
    model, x, _ = build(BY_NAME["direct-read"], "lora")
    fill(model)
    with torch.no_grad():
        y = model(x)
        nn.init.zeros_(model.qkv.weight)  # writes into what it reads: a copy that must not outlive the read
        assert torch.equal(model(x), y)
        with mmpeft.bare(model):
            nn.init.zeros_(model.qkv.weight)
        assert not model.qkv._parameters["weight"].any() and not torch.equal(model(x), y)


# --- reads of the weight ----------------------------------------------------------------------------------------------


def test_mha_forms_its_weight_once_a_forward_without_gradients(monkeypatch):
    model, x, _ = build(BY_NAME["mha"], "lora")
    fill(model)
    calls = []
    apply = slot_module.apply
    monkeypatch.setattr(slot_module, "apply", lambda w, d: calls.append(d) or apply(w, d))
    with torch.no_grad():
        y = model(x)
        assert len(calls) == 2  # q and v, once each, though MHA reads its weight several times
        assert torch.equal(model(x), y) and len(calls) == 2
        for delta in deltas(model):
            delta.A.mul_(2)
        assert not torch.equal(model(x), y) and len(calls) == 4
        mmpeft.use(model, None)
        model(x)
        assert len(calls) == 4


@pytest.mark.parametrize("name", ["mha", "mha-kdim", "lstm"])
def test_a_call_forms_its_weight_once_with_gradients_too(name, monkeypatch):
    """So a method that draws at random draws once a forward, though the owner reads its weight several times."""
    model, x, _ = build(BY_NAME[name], "lora")
    fill(model)
    calls = []
    apply = slot_module.apply
    monkeypatch.setattr(slot_module, "apply", lambda w, d: calls.append(d) or apply(w, d))
    for i in (1, 2):
        model(x).sum().backward()
        assert sorted(map(id, calls)) == sorted(list(map(id, deltas(model))) * i)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("plan", [{"**": mmpeft.LoRA(rank=2)}, {"**.out_proj": mmpeft.LoRA(rank=2)}], ids=["all", "out_proj"])
@pytest.mark.parametrize("cls", [nn.MultiheadAttention, nn.TransformerEncoderLayer])
def test_what_a_module_reads_below_itself_is_formed_once_a_forward(cls, plan, training, monkeypatch):
    """MultiheadAttention reads its out_proj's weight twice, an encoder layer all its weights once more; on two layers."""
    options = dict(dim_feedforward=12, dropout=0.0) if cls is nn.TransformerEncoderLayer else {}
    call = (lambda m, x: m(x)) if options else (lambda m, x: m(x, x, x)[0])

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(cls(8, 2, batch_first=True, **options) for _ in range(2))

        def forward(self, x):
            return call(self.layers[1], call(self.layers[0], x))

    model, x = Stack(), torch.randn(3, 5, 8)
    before = snapshot(model)
    mmpeft.attach(model, plan, "a", example=x)
    fill(model)
    calls = []
    apply = slot_module.apply
    monkeypatch.setattr(slot_module, "apply", lambda w, d: calls.append(d.site.name) or apply(w, d))
    model.train(training)
    for _ in range(2):
        calls.clear()
        model(x).sum().backward()  # and no graph is reused by the next forward
        assert sorted(calls) == sorted(set(calls))
        assert {c for c in calls if "out_proj" in c} == {d.site.name for d in deltas(model) if "out_proj" in d.site.name}
    with torch.no_grad():
        model(x)
        calls.clear()
        model(x)
    assert not calls
    mmpeft.detach(model)
    assert_same_object(before, snapshot(model))


def test_forward_keeps_its_signature():
    import inspect

    model = _llama()
    plain = [inspect.signature(m.forward) for m in model.modules()]
    mmpeft.attach(model, {"**": mmpeft.LoRA(rank=2), "**.*norm": mmpeft.LayerNormTuning()})
    assert [inspect.signature(m.forward) for n, m in model.named_modules() if "_adapters" not in n] == plain


def test_calls_by_keyword_are_factored_too():
    x = torch.randn(2, 3, 5)
    model = Host(nn.Linear(5, 7), 5)
    mmpeft.attach(model, {"site": mmpeft.LoRA(rank=2, dropout=0.5)}, example=x)
    fill(model, "default")
    model.eval()
    assert torch.equal(model.site(input=x), model.site(x))
    model.train()
    assert not torch.equal(model.site(input=x), model.site(input=x))


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_the_cache_follows_the_base_and_survives_inference_mode(mode):
    model, x, _ = build(BY_NAME["mha"], "lora")
    fill(model)
    context = torch.no_grad() if mode == "no_grad" else torch.inference_mode()
    with context:
        y = model(x)
    changed = {k: v * 2 for k, v in model.state_dict().items() if "_adapters" not in k}
    model.load_state_dict(changed)
    with torch.no_grad():
        assert not close(model(x), y, 1e-3)
    model(x).sum().backward()
    assert all(d.A.grad is not None for d in deltas(model))


def test_the_cache_is_dropped_where_data_is_changed_behind_autograds_back():
    model, x, _ = build(BY_NAME["mha"], "lora")
    fill(model)
    with torch.no_grad():
        y = model(x)
        for delta in deltas(model):
            delta.A.data.mul_(2)  # leaves no version behind
        model.eval()
        assert not torch.equal(model(x), y)


def test_the_cache_is_neither_copied_nor_pickled():
    import copy
    import pickle

    model, x, _ = build(BY_NAME["mha"], "lora")
    with torch.no_grad():
        model(x)
    assert model.site._adapters.cache
    assert not copy.deepcopy(model).site._adapters.cache
    assert not pickle.loads(pickle.dumps(model)).site._adapters.cache


def test_weight_norm_never_reuses_a_stale_weight():
    model, x, _ = build(BY_NAME["weight-norm-new"], "lora")
    fill(model)
    with torch.no_grad():
        for factor in (1.0, 2.0, 3.0):
            model.site.parametrizations.weight.original0.fill_(factor)
            y = model(x)
            w = torch.nn.utils.parametrize.cached  # no cache of torch's own either
            del w
            with torch.enable_grad():
                assert close(model(x), y)


def test_an_attribute_error_in_a_method_is_not_taken_for_the_base(monkeypatch):
    model, x, _ = build(BY_NAME["direct-read"], "lora")
    monkeypatch.setattr(mmpeft.LoRA, "factors", lambda self, W, p: p.no_such_tensor)
    with pytest.raises(RuntimeError, match="no_such_tensor"):
        model(x)


# --- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_materialised_sites_is_measured_once_an_attach(dtype, caplog):
    caplog.set_level(logging.WARNING, "mmpeft")
    model = nn.ModuleDict({"a": DirectRead(), "b": DirectRead()}).to(dtype)
    model.forward = lambda x: model.b(model.a(x))  # type: ignore[method-assign]
    mmpeft.attach(model, {"*.qkv": mmpeft.LoRA(rank=2)}, example=torch.randn(2, 3, 6, dtype=dtype))
    (record,) = caplog.records
    assert "2 sites" in record.message and "a.qkv.weight, b.qkv.weight" in record.message
    percent = [float(word) for word in record.message.split() if word.isdigit()]
    assert max(percent) > (50 if dtype == torch.bfloat16 else 10)  # of entries lost


def test_no_rounding_warning_where_the_site_is_called_or_the_base_is_fp32(caplog):
    caplog.set_level(logging.WARNING, "mmpeft")
    mmpeft.attach(DirectRead(), {"qkv": mmpeft.LoRA(rank=2)}, example=torch.randn(2, 3, 6))
    model = Host(nn.Linear(6, 5), 6).bfloat16()
    mmpeft.attach(model, {"site": mmpeft.LoRA(rank=2)}, example=torch.randn(2, 3, 6).bfloat16())
    assert not caplog.records


def test_bf16_factored_keeps_small_deltas_that_w_plus_delta_loses():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    base = base_output(model, x).float()
    mmpeft.attach(model, {"0": mmpeft.LoRA(rank=4)}, example=x)
    fill(model, "default", size=2e-3)
    (delta,) = deltas(model, "default")
    exact = x.float() @ (delta.B @ delta.A).T
    with torch.no_grad():
        called = model(x).float() - base
        read = F.linear(x, model[0].weight).float() - base
    assert (read - exact).norm() > 1.2 * (called - exact).norm()


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (Attention, "site[q,v]"),
        (lambda: Host(nn.Conv2d(4, 6, 3, groups=2)), "site"),
        (lambda: Host(nn.Embedding(11, 6)), "site"),
        (lambda: Host(Experts(False), 6), "site"),
        (lambda: Host(nn.ConvTranspose1d(4, 6, 3)), "site"),
    ],
)
@pytest.mark.parametrize("method", [mmpeft.LoRA, mmpeft.DoRA])
def test_dropout_is_refused_where_the_weight_is_formed(make, match, method):
    model = make()
    with pytest.raises(ConfigError, match="dropout.*site.*no activation can be dropped"):
        mmpeft.attach(model, {match: method(rank=1, dropout=0.1)}, check=False)
    assert type(model).__dict__.get("_mmpeft_spec") is None and not any(
        "_adapters" in n for n, _ in model.named_modules()
    )


def test_dropout_is_refused_for_dora_on_a_convolution_and_allowed_for_lora():
    x = torch.randn(2, 4, 7, 7)
    with pytest.raises(ConfigError, match="dropout of dora"):
        mmpeft.attach(Host(nn.Conv2d(4, 6, 3)), {"site": mmpeft.DoRA(rank=2, dropout=0.5)}, example=x)
    model = Host(nn.Conv2d(4, 6, 3))
    mmpeft.attach(model, {"site": mmpeft.LoRA(rank=2, dropout=0.5)}, example=x)
    fill(model, "default")
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_dropout_is_refused_where_liveness_finds_that_a_linear_is_only_read():
    model, x = DirectRead(), torch.randn(2, 3, 6)
    with pytest.raises(ConfigError, match=r"dropout at qkv.weight\[q\]: the model reads this weight without calling"):
        mmpeft.attach(model, {"qkv[q]": mmpeft.LoRA(rank=2, dropout=0.1)}, example=x)
    assert type(model) is DirectRead and all(p.requires_grad for p in model.parameters())
    mmpeft.attach(model, {"qkv[q]": mmpeft.LoRA(rank=2)}, example=x)


def test_dropout_is_refused_on_eva02():
    timm = pytest.importorskip("timm")
    model = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1)
    with pytest.raises(ConfigError, match="dropout at blocks.0.attn"):
        mmpeft.attach(model, {"blocks.*.attn.{q_proj,qkv}*": mmpeft.LoRA(rank=2, dropout=0.1)})


def test_a_composition_that_has_to_be_materialised_refuses_dropout_in_training():
    x = torch.randn(2, 3, 5)
    model = Host(nn.Linear(5, 7), 5)
    mmpeft.attach(model, {"site": mmpeft.LoRA(rank=2, dropout=0.5)}, name="a", example=x)
    mmpeft.attach(model, {"site": mmpeft.DoRA(rank=2)}, name="b", example=x)
    mmpeft.use(model, ["a", "b"])
    model.eval()
    model(x)
    model.train()
    with pytest.raises(Unsupported, match="dropout of lora cannot act"):
        model(x)


# --- the base ---------------------------------------------------------------------------------------------------------


def test_running_statistics_do_not_move():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    x = torch.randn(3, 3, 9, 7)
    base = base_output(model, x)
    mmpeft.attach(model, {"{0,3}": mmpeft.LoRA(rank=2)}, example=x)
    fill(model, "default")
    model.train()
    for _ in range(3):
        model(x + 3)
    with mmpeft.use(model, None):
        assert torch.equal(model(x), base)


def test_frozen_is_no_gradient_eval_mode_and_no_graph():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    seen = []
    model[2].register_forward_pre_hook(lambda m, args: seen.append(args[0].requires_grad))
    mmpeft.attach(model, {"4": "full"}, example=torch.randn(2, 4))
    seen.clear()
    y = model.train()(torch.randn(2, 4))
    assert seen == [False] and y.requires_grad
    assert [m.training for m in model] == [False, False, False, False, True]
    assert not any(p.requires_grad for n, p in model.named_parameters() if "_adapters" not in n)
    mmpeft.detach(model)
    assert all(m.training for m in model) and all(p.requires_grad for p in model.parameters())


def test_attach_leaves_random_state_buffers_and_gradients_alone():
    import random

    np = pytest.importorskip("numpy")

    def draw():
        return torch.rand(3).tolist(), random.random(), float(np.random.rand())

    drawn = []
    for attached in (False, True):
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        if attached:
            state = torch.get_rng_state()
            plan = {"0": mmpeft.IA3(), "1": "full"}
            mmpeft.attach(model, plan, example=torch.randn(3, 4, generator=torch.Generator()))
            assert torch.equal(torch.get_rng_state(), state)
            assert int(model[1].num_batches_tracked) == 0 and not model[1].running_mean.any()
            assert all(p.grad is None for p in model.parameters())
        drawn.append(draw())
    assert drawn[0] == drawn[1]


def test_containers_hide_the_slot():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    mmpeft.attach(model, {"0": mmpeft.LoRA(rank=2)}, example=x)
    assert len(model) == 3 and [type(m).__name__ for m in model] == ["Linear", "ReLU", "Linear"]
    assert isinstance(model[-1], nn.Linear) and len(model[:2]) == 2
    assert isinstance(model[0], nn.Linear) and type(model[0]).__name__ == "Linear"


def test_tied_head_and_embedding_see_one_delta():
    model = Tied().eval()
    ids = torch.randint(0, 11, (3, 4))
    mmpeft.attach(model, {"embed": mmpeft.LoRA(rank=2)}, example=ids)
    fill(model, "default")
    (delta,) = deltas(model, "default")
    w = model.embed._parameters["weight"] + (delta.B @ delta.A).T
    assert close(model(ids), torch.tanh(w[ids]) @ w.T)
