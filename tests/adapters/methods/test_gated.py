"""Gates: what each way of gating computes, that one all open is the method and one all shut the base, and UniPELT."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import yaml
from cases import close, deltas, fill, losses_on
from torch import nn

import mmpeft
from mmpeft.adapters.plan import Plan
from mmpeft.errors import ConfigError, Unsupported


class Attention(nn.Module):
    """Two heads of 4 through the fused attention of torch."""

    num_heads = 2

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(), nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


def net():
    torch.manual_seed(0)
    return Net().double().eval(), torch.randn(3, 5, 8).double()


def gate_of(d, h):
    """The mean over tokens of sigmoid(w . h + b), one token at a time."""
    tokens = [torch.sigmoid((d.gate_weight * h[:, t]).sum(-1) + d.gate_bias) for t in range(h.shape[1])]
    return (sum(tokens) / len(tokens)).view(-1, 1, 1)


CASES = {  # (where, method)
    "lora": ("attn.q", mmpeft.LoRA(rank=2, alpha=6)),
    "pissa": ("attn.q", mmpeft.LoRA(rank=2, init_from="pissa")),
    "delora": ("attn.q", mmpeft.DeLoRA(rank=2)),  # reads the weight
    "bottleneck": ("mlp", mmpeft.Bottleneck(size=3, activation="gelu", scale=0.7)),
    "adaptformer": ("mlp", mmpeft.AdaptFormer(size=3, scale=0.7)),
    "red": ("mlp", mmpeft.RED()),
    "lofit": ("mlp.2", mmpeft.LoFiT(num_heads=2)),
    "prefix": ("attn", mmpeft.Prefix(num_tokens=3)),
    "prefix-tuning": ("attn", mmpeft.PrefixTuning(num_tokens=3, hidden=6)),
}


def attached(name):
    match, method = CASES[name]
    model, x = net()
    base = model(x).detach()
    mmpeft.attach(model, {match: mmpeft.Gated(method)}, name="a", example=x)
    fill(model, size=0.5)
    (d,) = deltas(model)
    return model, x, base, d


def plain_of(name, model, x):
    """The same method with the same tensors and no gate."""
    match, method = CASES[name]
    other = copy.deepcopy(model)
    (gated,) = deltas(other)
    mmpeft.detach(other)
    mmpeft.attach(other, {match: method}, name="a", example=x)
    with torch.no_grad():
        for d in deltas(other):
            for n in d.saved:
                d._parameters[n].copy_(gated._parameters[n])
    return other


def test_a_gated_low_rank_update_is_its_formula():
    model, x, _, d = attached("lora")
    q = F.linear(x, model.attn.q.weight, model.attn.q.bias)
    expected = q + gate_of(d, x) * 3 * torch.einsum("or,ri,bti->bto", d.B, d.A, x)
    assert close(model.attn.q(x), expected, 1e-12)


def test_a_gated_bottleneck_reads_what_the_call_gives_and_a_parallel_one_what_it_reads():
    model, x, _, d = attached("bottleneck")
    y = model.mlp[2](F.gelu(model.mlp[0](x)))
    up = F.gelu(y @ d.down_weight.T + d.down_bias) @ d.up_weight.T + d.up_bias
    assert close(model.mlp(x), y + gate_of(d, y) * 0.7 * up, 1e-12)
    model, x, _, d = attached("adaptformer")
    up = (x @ d.down_weight.T + d.down_bias).relu() @ d.up_weight.T + d.up_bias
    assert close(model.mlp(x), y + gate_of(d, x) * 0.7 * up, 1e-12)


def test_a_gated_prefix_is_attention_to_scaled_keys_and_values():
    model, x, _, d = attached("prefix")
    g = gate_of(d, x)
    with mmpeft.use(model, None):
        q, k, v = (m(x) for m in (model.attn.q, model.attn.k, model.attn.v))
    keys, values = torch.cat([g * d.K, k], 1), torch.cat([g * d.V, v], 1)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        scores = (torch.einsum("btc,bsc->bts", q[..., h], keys[..., h]) / 2).softmax(-1)
        heads.append(scores @ values[..., h])
    assert close(model.attn(x), torch.cat(heads, -1), 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_an_open_gate_is_the_method_and_a_shut_one_the_base(name):
    model, x, base, d = attached(name)
    with torch.no_grad():
        assert not close(model(x), base, 1e-3)
        d.gate_weight.zero_()
        d.gate_bias.fill_(50.0)
        whole = model(x)
        assert close(whole, plain_of(name, model, x)(x), 1e-9)
        d.gate_bias.fill_(-50.0)
        shut = model(x)
        if "prefix" in name:  # a key of zeros still takes its share of the softmax
            assert not close(shut, whole, 1e-3)
        else:
            assert close(shut, base, 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gates_learn_differ_by_sample_and_travel(name, tmp_path):
    model, x, base, d = attached(name)
    y = model(x)
    grads = torch.autograd.grad((y * torch.randn_like(y)).sum(), [d._parameters[n] for n in d.trained])
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in grads)
    y = y.detach()
    with torch.no_grad():
        assert close(model(x[1:2]), y[1:2], 1e-12), "a sample's gate is its own"
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), y)
            (theirs,) = deltas(other)
            assert theirs.facts.get("owner") is (other.attn.q if d.facts.get("owner") is not None else None)
        mmpeft.save(model, tmp_path, name="a")
        fresh, _ = net()
        mmpeft.load(fresh, tmp_path, name="b", check=False)
        assert torch.equal(fresh(x), y)
        with mmpeft.use(model, rows=["a", None, "a"]):
            mixed = model(x)
        assert close(mixed[[0, 2]], y[[0, 2]], 1e-12) and close(mixed[1], base[1], 1e-12)
        with mmpeft.use(model, None):
            assert torch.equal(model(x), base)
        with pytest.raises(Unsupported):
            mmpeft.merge(model)
        mmpeft.detach(model)
        assert torch.equal(model(x), base)


def test_a_plan_of_gates_is_read_from_plain_data():
    plan = Plan.read({"attn.q": mmpeft.Gated(mmpeft.LoRA(rank=3, alpha=6)), "mlp": {"Gated": {"inner": "Bottleneck"}}})
    assert Plan.read(yaml.safe_load(yaml.safe_dump(plan.to_list()))) == plan
    assert plan.rules[1].methods == (mmpeft.Gated(mmpeft.Bottleneck()),)


@pytest.mark.parametrize("name", ["lora", "bottleneck", "adaptformer", "red"])
def test_one_graph_under_torch_compile(name):
    model, x, _, _ = attached(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert close(compiled(x), model(x), 1e-12)


def test_dropout_of_a_gated_lora_acts_in_training_only():
    model, x = net()
    mmpeft.attach(model, {"attn.q": mmpeft.Gated(mmpeft.LoRA(rank=2, dropout=0.5))}, name="a", example=x)
    fill(model)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not close(model(x), model(x), 1e-6)


@pytest.mark.parametrize(
    ("inner", "why"),
    [
        (mmpeft.VPT(), "inserts tokens"),
        (mmpeft.AdaLoRA(), "controller"),
        (mmpeft.BitFit(), "within a batch"),
        (mmpeft.AttnScale(), "scores"),
        (mmpeft.Gated(), "a gate already"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, mmpeft.Method) else None,
)
def test_what_cannot_be_gated_is_refused(inner, why):
    with pytest.raises(ConfigError, match=why):
        mmpeft.Gated(inner)


def test_wrong_places_are_refused():
    model, x = net()
    for match, method, error, why in (
        ("mlp", mmpeft.LoRA(), Unsupported, "Sequential"),
        ("attn.q", mmpeft.LoRA(rank=9), ConfigError, "1 to 8"),
        ("attn.q", mmpeft.IA3(), ConfigError, "scale B A"),
        ("attn.q", mmpeft.LoHa(rank=5), ConfigError, "scale B A"),
    ):
        with pytest.raises(error, match=why):
            mmpeft.attach(model, {match: mmpeft.Gated(method)}, example=x)
        assert not hasattr(model.attn.q, "_adapters")


def roberta():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.RobertaConfig(vocab_size=40, max_position_embeddings=20, **sizes)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return transformers.RobertaModel(config, add_pooling_layer=False).eval()


def test_unipelt_learns_a_planted_task_and_its_gates_move():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.text = roberta()

        def forward(self, ids):
            return self.text(ids).last_hidden_state

    model, ids = Tokens().eval(), torch.randint(3, 40, (6, 7))
    plan = {
        "**.attention.self.{query,value}": mmpeft.Gated(mmpeft.LoRA(rank=2)),
        "**.attention.self": mmpeft.Gated(mmpeft.PrefixTuning(num_tokens=2, hidden=4)),
        "**.layer.*.output": mmpeft.Gated(mmpeft.Bottleneck(reduction=4)),
    }
    mmpeft.attach(model, plan, name="a", example=ids)
    gates = [d._parameters[n] for d in deltas(model) for n in ("gate_weight", "gate_bias")]
    assert sum(p.numel() for p in gates) == 2 * 4 * (16 + 1)
    teacher = copy.deepcopy(model)
    fill(teacher, size=0.6)
    before = [p.detach().clone() for p in gates]
    with torch.no_grad():
        target = teacher(ids)
    losses = losses_on(model, ids, target, lr=0.02, steps=150)
    assert min(losses[-5:]) < 0.25 * losses[0]
    assert all(not torch.equal(p, b) for p, b in zip(gates, before, strict=True))
