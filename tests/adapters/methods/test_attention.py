"""What works inside an attention: AttnScale and its light form, prefixes, eTT and the domain residual adapter."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import close, deltas, fill, losses_on
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmpeft
from mmpeft.errors import ConfigError, DeadSite, Unsupported


class Attention(nn.Module):
    """Multi-head self-attention of width 8 with 4 heads, 2 of them for keys and values where `grouped`."""

    def __init__(self, grouped: bool = False, causal: bool = False, fused: bool = True):
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = 4, 2 if grouped else 4, 2
        self.causal, self.fused = causal, fused
        kv = self.num_key_value_heads * 2
        self.q, self.k, self.v, self.o = nn.Linear(8, 8), nn.Linear(8, kv), nn.Linear(8, kv), nn.Linear(8, 8)

    def heads(self, x):
        return [p(x).unflatten(-1, (-1, 2)).transpose(1, 2) for p in (self.q, self.k, self.v)]

    def forward(self, x, mask=None):
        q, k, v = self.heads(x)
        if self.fused:
            options = {"attn_mask": mask, "is_causal": self.causal, "enable_gqa": True}
            y = F.scaled_dot_product_attention(q, k, v, **options)
        else:
            y = (q @ k.mT / 2**0.5).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(8), Attention(**options), nn.Linear(8, 8)

    def forward(self, x, mask=None):
        x = x + self.attn(self.norm(x), mask)
        return x + self.mlp(x)


def net(**options):
    torch.manual_seed(0)
    return Net(**options).double().eval(), torch.randn(3, 5, 8).double()


def parts(model, x):
    """q, k, v of the attention with key heads repeated, and a function that finishes from its heads' output."""
    q, k, v = model.attn.heads(model.norm(x))
    k, v = (t.repeat_interleave(4 // t.shape[1], 1) for t in (k, v))

    def finish(y):
        h = x + model.attn.o(y.transpose(1, 2).flatten(2))
        return h + model.mlp(h)

    return q, k, v, finish


MASK = torch.ones(5, 5, dtype=torch.bool).tril(1)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("options", [{}, {"grouped": True}, {"causal": True}], ids=str)
def test_attn_scale_multiplies_the_scores(options, share):
    model, x = net(**options)
    base = model(x).detach()
    mmpeft.attach(model, {"attn": mmpeft.AttnScale(tokens=5, share=share)}, name="a", example=x)
    (d,) = deltas(model)
    assert d.A.numel() == (1 if share else 4) * 5 * 5
    assert close(model(x), base, 1e-12)
    fill(model)
    q, k, v, finish = parts(model, x)
    scores = d.A * (q @ k.mT / 2**0.5)
    if options.get("causal"):
        scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
    assert close(model(x), finish(scores.softmax(-1) @ v), 1e-12) and not close(model(x), base, 1e-3)
    if not options.get("causal"):
        masked = model(x, MASK)
        scores = (d.A * (q @ k.mT / 2**0.5)).masked_fill(~MASK, -torch.inf)
        assert close(masked, finish(scores.softmax(-1) @ v), 1e-12)
        bias = torch.zeros(5, 5).double().masked_fill(~MASK, -torch.inf)
        assert close(model(x, bias), masked, 1e-12)
    with pytest.raises(ConfigError, match="6 queries"):
        model(torch.randn(2, 6, 8).double())


def test_attn_scale_lite_is_one_number_a_head_on_the_scores_and_merges():
    model, x = net(grouped=True)
    base = model(x).detach()
    mmpeft.attach(model, {"attn.q": mmpeft.AttnScaleLite()}, name="a", example=x)
    assert mmpeft.inspect(model).trainable == 4 and close(model(x), base, 1e-12)
    fill(model)
    s = deltas(model)[0].s
    with mmpeft.use(model, None):
        q, k, v, finish = parts(model, x)
    expected = finish((s[:, None, None] * (q @ k.mT / 2**0.5)).softmax(-1) @ v)
    assert close(model(x), expected, 1e-12) and not close(model(x), base, 1e-4)
    assert mmpeft.merge(model, check=x) < 1e-12
    with pytest.raises(ConfigError, match="num_heads 3"):
        mmpeft.attach(net()[0], {"attn.q": mmpeft.AttnScaleLite(num_heads=3)})


@pytest.mark.parametrize("options", [{}, {"grouped": True}, {"causal": True}], ids=str)
def test_prefix_puts_keys_and_values_before_the_tokens_whatever_the_mask(options):
    model, x = net(**options)
    mmpeft.attach(model, {"attn": mmpeft.Prefix(num_tokens=3)}, name="a", example=x)
    (d,) = deltas(model)
    kv = 4 if options.get("grouped") else 8
    assert d.K.numel() + d.V.numel() == 2 * 3 * kv
    fill(model, size=1.0)
    q, k, v, finish = parts(model, x)
    K, V = (t.view(3, -1, 2).transpose(0, 1).repeat_interleave(8 // kv, 0).expand(3, 4, 3, 2) for t in (d.K, d.V))
    for mask in [None] if options.get("causal") else [None, MASK]:
        scores = q @ torch.cat([K, k], 2).mT / 2**0.5
        seen = torch.ones(5, 5, dtype=torch.bool).tril() if options.get("causal") else mask
        if seen is not None:
            scores = scores.masked_fill(~F.pad(seen, (3, 0), value=True), -torch.inf)
        assert close(model(x, mask), finish(scores.softmax(-1) @ torch.cat([V, v], 2)), 1e-12)


def test_prefix_tuning_makes_its_prefix_by_an_mlp_that_leaves_after_training(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(Net(), Net()).double().eval(), torch.randn(3, 5, 8).double()
    plan = {"*.attn": mmpeft.PrefixTuning(num_tokens=3, hidden=7)}
    mmpeft.attach(model, plan, name="a", example=x)
    assert mmpeft.inspect(model).trainable == 3 * 8 + 7 * (8 + 1) + 2 * 2 * 8 * (7 + 1)
    fill(model, size=1.0)
    first, second = deltas(model)
    assert first.E is second.E and first.M is not second.M
    h = torch.tanh(first.E @ first.W.T + first.w)
    expected = x
    for net_, d in zip(model, (first, second), strict=True):
        K, V = (
            (h @ M.T + m).view(3, 4, 2).transpose(0, 1).expand(3, 4, 3, 2) for M, m in zip(d.M, d.m, strict=True)
        )
        q, k, v = net_.attn.heads(net_.norm(expected))
        y = (q @ torch.cat([K, k], 2).mT / 2**0.5).softmax(-1) @ torch.cat([V, v], 2)
        expected = expected + net_.attn.o(y.transpose(1, 2).flatten(2))
        expected = expected + net_.mlp(expected)
    out = model(x)
    assert close(out, expected, 1e-12)
    grads = torch.autograd.grad(out.square().sum(), [first.E, first.W, first.w, second.M, second.m])
    assert all(g.abs().max() > 1e-6 for g in grads)
    assert mmpeft.plain_prefixes(model) == ["0.attn.call", "1.attn.call"]
    assert mmpeft.inspect(model).trainable == 2 * 2 * 3 * 8 and close(model(x), out, 1e-12)
    mmpeft.save(model, tmp_path)
    torch.manual_seed(0)
    other = nn.Sequential(Net(), Net()).double().eval()
    mmpeft.load(other, tmp_path, example=x)
    assert close(other(x), out, 1e-12) and {type(d.method) for d in deltas(other)} == {mmpeft.Prefix}
    with pytest.raises(ConfigError, match="no generated prefix"):
        mmpeft.plain_prefixes(model)
    with pytest.raises(ConfigError, match="hidden 0"):
        mmpeft.PrefixTuning(hidden=0)


def test_ett_generates_its_prefix_from_prototypes_of_the_support_set(tmp_path):
    model, x = net()
    plan = {"attn": [mmpeft.ETT(num_tokens=2, hidden=3), mmpeft.DRA()], "mlp": mmpeft.DRA()}
    assert mmpeft.inspect(model, plan).trainable == 8 * (2 + 3) + 2 * 8 * 3 + 2 * 8
    mmpeft.attach(model, plan, name="a", example=x)
    labels = torch.tensor([1, 0, 1])
    E = mmpeft.fit_ett(model, [x[:2], x[2:]], labels, name="a")
    with mmpeft.use(model, None):
        q, k, _, _ = parts(model, x)
        tokens = (q[:, :, :1] @ k.mT / 2**0.5).softmax(-1).mean(1) @ model.norm(x)  # what token 0 looks at
    assert close(E, torch.stack([tokens[1, 0], (tokens[0, 0] + tokens[2, 0]) / 2]), 1e-12)
    fill(model)
    d = next(d for d in deltas(model) if isinstance(d.method, mmpeft.ETT))
    after = {m.site.path: m.delta for m in deltas(model) if isinstance(m.method, mmpeft.DRA)}
    hidden = torch.tanh(d.E @ d.W.T)
    q, k, v, _ = parts(model, x)
    K, V = (t.view(2, 4, 2).transpose(0, 1).expand(3, 4, 2, 2) for t in (hidden @ d.M[0].T, hidden @ d.M[1].T))
    y = (q @ torch.cat([K, k], 2).mT / 2**0.5).softmax(-1) @ torch.cat([V, v], 2)
    h = x + F.linear(y.transpose(1, 2).flatten(2), model.attn.o.weight, model.attn.o.bias) + after["attn"]
    expected = h + F.linear(h, model.mlp.weight, model.mlp.bias) + after["mlp"]
    out = model(x)
    assert close(out, expected, 1e-12)
    mmpeft.save(model, tmp_path, name="a")
    other, _ = net()
    mmpeft.load(other, tmp_path, check=False)
    assert close(other(x), out, 1e-7)
    with pytest.raises(ConfigError, match=r"labels \[0\]"):
        mmpeft.fit_ett(model, [x], torch.zeros(3, dtype=torch.int64), name="a")
    with pytest.raises(ConfigError, match="4 labels for 3"):
        mmpeft.fit_ett(model, [x], torch.tensor([0, 1, 1, 0]), name="a")


METHODS = {
    "attn-scale": mmpeft.AttnScale(tokens=5),
    "prefix": mmpeft.Prefix(num_tokens=4),
    "prefix-tuning": mmpeft.PrefixTuning(num_tokens=3, hidden=4),
    "ett": mmpeft.ETT(num_tokens=3, hidden=4),
}


@pytest.mark.parametrize("name", METHODS)
def test_they_learn_a_planted_task_save_and_differ_by_row(name, tmp_path):
    model, _ = net()
    model = model.float()
    x = torch.randn(6, 5, 8)
    mmpeft.attach(model, {"attn": METHODS[name]}, name="a", example=x)
    teacher = copy.deepcopy(model)
    fill(teacher, size=1.0, seed=7)
    target = teacher(x).detach()
    losses = losses_on(model, x, target, lr=0.05, steps=150)
    assert losses[0] > 1e-4 and losses[-1] < 0.25 * losses[0], f"{losses[0]} -> {losses[-1]}"
    y = model(x).detach()
    mmpeft.save(model, tmp_path, name="a")
    other = net()[0].float()
    mmpeft.load(other, tmp_path, check=False)
    assert close(other(x), y, 1e-6)
    with torch.no_grad():
        with mmpeft.use(model, None):
            base = model(x)
        with mmpeft.use(model, rows=["a", None, "a", None, None, "a"]):
            mixed = model(x)
    for i, adapter in enumerate(("a", None, "a", None, None, "a")):
        assert close(mixed[i], y[i] if adapter else base[i], 1e-6)
    with pytest.raises(Unsupported):
        mmpeft.merge(model, "a")


def test_a_scale_and_a_prefix_in_one_attention_both_count():
    model, x = net()
    mmpeft.attach(model, {"attn": mmpeft.AttnScale(tokens=5)}, name="scale", example=x)
    mmpeft.attach(model, {"attn": mmpeft.Prefix(num_tokens=2)}, name="prefix", example=x)
    for name in ("scale", "prefix"):
        fill(model, name, size=1.0)
    (a,), (b,) = deltas(model, "scale"), deltas(model, "prefix")
    q, k, v, finish = parts(model, x)
    K, V = (t.view(2, 4, 2).transpose(0, 1).expand(3, 4, 2, 2) for t in (b.K, b.V))
    scores = torch.cat([q @ K.mT, a.A * (q @ k.mT)], -1) / 2**0.5
    for order in (["scale", "prefix"], ["prefix", "scale"]):
        mmpeft.use(model, order)
        if order[0] == "scale":
            assert close(model(x), finish(scores.softmax(-1) @ torch.cat([V, v], 2)), 1e-12)
        else:  # the scale then sees the prefix as keys too
            with pytest.raises(ConfigError, match="7 keys"):
                model(x)


@pytest.mark.parametrize("name", METHODS)
def test_they_hold_under_compilation_and_recomputation(name):
    model, x = net()
    mmpeft.attach(model, {"attn": METHODS[name]}, name="a", example=x)
    fill(model, size=1.0)
    params = [p for group in mmpeft.parameter_groups(model, lr=1.0) for p in group["params"]]
    y = model(x)
    expected = torch.autograd.grad(y.square().sum(), params)
    assert close(torch.compile(model, backend="eager")(x), y, 1e-12)
    again = checkpoint(model, x, use_reentrant=False)
    for g, e in zip(torch.autograd.grad(again.square().sum(), params), expected, strict=True):
        assert close(g, e, 1e-12)


def test_an_attention_that_cannot_be_entered_is_named():
    with pytest.raises(Unsupported, match="nn.MultiheadAttention"):
        mmpeft.attach(nn.MultiheadAttention(8, 2, batch_first=True), {".": mmpeft.Prefix()})
    model, x = net(fused=False)
    with pytest.raises(DeadSite, match="attn"):
        mmpeft.attach(model, {"attn": mmpeft.AttnScale(tokens=5)}, example=x)
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ConfigError, match="pass num_heads="):
        mmpeft.attach(model, {"0": mmpeft.Prefix()}, example=torch.randn(2, 3, 8))
    for method in (mmpeft.Prefix(num_heads=6), mmpeft.AttnScale(num_heads=6)):
        with pytest.raises(ConfigError, match="6 heads do not divide a width of 8"):
            mmpeft.attach(nn.Sequential(nn.Linear(8, 8)), {"0": method}, check=False)


def test_in_timm_and_transformers():
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0).eval()
    x = torch.randn(3, 3, 32, 32)
    base = vit(x).detach()
    mmpeft.attach(vit, {"blocks.*.attn": mmpeft.AttnScale(tokens=5)}, name="a", example=x)
    assert mmpeft.inspect(vit).trainable == 2 * 3 * 5 * 5 and close(vit(x), base, 1e-5)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    llm, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 40, (3, 7))
    mmpeft.attach(llm, {"model.layers.*.self_attn": mmpeft.Prefix(num_tokens=4)}, name="a", example={"input_ids": ids})
    fill(llm, size=1.0)
    with torch.no_grad():
        whole = llm(ids).logits
        first = llm(ids[:, :4], use_cache=True)
        rest = llm(ids[:, 4:], past_key_values=first.past_key_values)
    assert close(torch.cat([first.logits, rest.logits], 1), whole, 1e-5), "generation with a cache sees the prefix too"
