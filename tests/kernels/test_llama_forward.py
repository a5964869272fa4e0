"""The decoder's short forward without gradients equals the model's own with its adapters attached and unmerged."""

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.kernels import expand, llama_forward, tuning
from mmpeft.kernels.fuse import LowRank, from_model
from mmpeft.kernels.group import Group
from mmpeft.kernels.packed import PackedGroup
from mmpeft.kernels.product import Product

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
         "intermediate_size": 56, "vocab_size": 101}  # fmt: skip
PLANS = {
    "one rank": {"model.layers.*.{self_attn,mlp}.*_proj": mmpeft.LoRA(rank=3, alpha=6)},
    "wide": {"model.layers.*.{self_attn.{q,o}_proj,mlp.*_proj}": mmpeft.LoRA(rank=20)},
    "some": {
        "model.layers.*.self_attn.k_proj": mmpeft.LoRA(rank=1, alpha=4),
        "model.layers.*.self_attn.v_proj": mmpeft.LoRA(rank=16),
        "model.layers.*.mlp.up_proj": mmpeft.LoRA(rank=5),
    },
    "magnitudes": {
        "model.layers.*.self_attn.{q,v,o}_proj": mmpeft.DoRA(rank=3),
        "model.layers.*.mlp.*_proj": mmpeft.DoRA(rank=2),
    },
}


def model_of(plan, device, kind="Llama", names="a", **sizes):
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES | sizes)).to(device)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_()
    for name in names:
        mmpeft.attach(model, plan, name=name)
    for name, p in model.named_parameters():
        if "._adapters." in name:
            p.data += 0.2 * torch.randn_like(p)
    return model.eval()


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])  # without and with biases on q, k, v
@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_equals_the_attached_model(plan, kind, backend, device):
    model = model_of(PLANS[plan], device, kind, names="ab")
    mmpeft.use(model, "a")
    ids = torch.randint(0, 101, (2, 9), device=device)
    own = {}
    for name in "ab":
        mmpeft.use(model, name)
        own[name] = model.model(ids, use_cache=False).last_hidden_state
    assert (own["a"] - own["b"]).norm() > 1e-2 * own["a"].norm()
    mmpeft.use(model, "a")
    mmpeft.compile(model, graphs=False)
    for name in "aba":
        mmpeft.use(model, name)
        got = model.model(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(got, own[name], rtol=1e-4, atol=1e-4)


@pytest.fixture(params=[0, -1])
def shapes(request, monkeypatch):
    """The first and the last launch shape of every reader, which a GPU would choose from by time."""
    for name in ("NORM_SHAPES", "ROPE_SHAPES", "SWIGLU_SHAPES"):
        monkeypatch.setattr(expand, name, [getattr(expand, name)[request.param]])
    monkeypatch.setattr(tuning, "_shapes", {})


@torch.no_grad()
def test_sizes_that_fill_no_tile(backend, shapes, device):
    """Head dim 20, one token, odd widths."""
    odd = {"hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 37}
    model = model_of(PLANS["one rank"], device, **odd)
    fused = from_model(model, _factors(model), attached=True, check=False)
    for shape in ((1, 1), (3, 7)):
        ids = torch.randint(0, 101, shape, device=device)
        want = model.model(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(fused.last_states(fused.embedding[ids]), want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rank_term_is_added_before_the_factor_and_the_bias(backend, shapes, device):
    """y = factor (x W^T + s x A^T B^T) + bias, and each reader works on y."""
    torch.manual_seed(1)
    T, n, out = 5, 24, 40
    weights = [torch.randn(out, n, device=device)]
    A, B = torch.randn(3, n, device=device), torch.randn(out, 3, device=device)
    bias = torch.randn(out, device=device)
    packed = PackedGroup(weights, [bias], [3], [0.5])
    packed.refresh([A], [B])
    x, stream, norm = torch.randn(T, n, device=device), torch.randn(T, out, device=device), torch.rand(out, device=device)
    product = Product.of(x, Group(packed, [(A, B)]))
    y = x @ weights[0].mT + 0.5 * x @ A.mT @ B.mT + bias
    torch.testing.assert_close(product.finished(), y, rtol=1e-4, atol=1e-4)
    factor = torch.rand(out, device=device)
    for scaled, delta in ((product, y), (product._replace(factor=factor), (y - bias) * factor + bias)):
        total, normed = expand.add_rmsnorm(stream, scaled, norm, 1e-6)
        torch.testing.assert_close(total, stream + delta, rtol=1e-4, atol=1e-4)
        want = nn.functional.rms_norm(stream + delta, (out,), norm, 1e-6)
        torch.testing.assert_close(normed, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_launches_nothing_for_the_low_rank_terms(device):
    """One product a group: as many GEMMs as without adapters."""
    model = model_of(PLANS["one rank"], device)
    fused = from_model(model, _factors(model), attached=True, check=False)
    x = fused.embedding[torch.randint(0, 101, (1, 6), device=device)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        llama_forward.states(x.flatten(0, 1), fused.blocks, fused.final_norm, fused._layout((1, 6), None))
    products = sum(e.count for e in seen.key_averages() if e.key == "aten::mm")
    reference_terms = 0 if device == "cuda" else 4 * len(fused.blocks)  # plain torch multiplies S B^T apart
    assert products == 4 * len(fused.blocks) + reference_terms


def _factors(model):
    """The one adapter's masters by the path of their linear; alpha is twice the rank."""
    pairs = {}
    for name, p in model.named_parameters():
        path, inside, kind = name.partition("._adapters.")
        if inside:
            pairs.setdefault(path, {})[kind.rpartition(".")[2]] = p
    return {path: LowRank(ab["A"], ab["B"], 2.0) for path, ab in pairs.items()}
