"""Every row of a batch under its own adapter, on the fused decoder: each equals that adapter alone, base rows the base."""

import io

import pytest
import torch

import mmpeft
from mmpeft.errors import ConfigError
from mmpeft.kernels import expand, tuning
from mmpeft.kernels.group import Group
from mmpeft.kernels.grouped import Stack
from mmpeft.kernels.packed import PackedGroup
from mmpeft.kernels.product import Product

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
         "intermediate_size": 37, "vocab_size": 101}  # fmt: skip
LAYERS = "model.layers.*"
PLANS = {  # unequal ranks, scales and sites
    "a": {f"{LAYERS}.{{self_attn,mlp}}.*_proj": mmpeft.LoRA(rank=3, alpha=6)},
    "b": {f"{LAYERS}.self_attn.{{q,o}}_proj": mmpeft.LoRA(rank=20), f"{LAYERS}.mlp.down_proj": mmpeft.LoRA(rank=1, alpha=3)},
    "c": {f"{LAYERS}.self_attn.v_proj": mmpeft.LoRA(rank=1, alpha=4), "model.layers.1.mlp.up_proj": mmpeft.LoRA(rank=5)},
}
MIXED = ["b", None, "a", "c", "a"]


def model_of(device, kind="Llama", plans=PLANS):
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES)).to(device).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_()
    for name, plan in plans.items():
        mmpeft.attach(model, plan, name=name, check=False)
    for name, p in model.named_parameters():
        if "._adapters." in name:
            p.data += 0.2 * torch.randn_like(p)
    mmpeft.use(model, "a")
    return model


def compiled_of(model):
    compiled = mmpeft.compile(model, graphs=False, loss=False, out=io.StringIO())
    return compiled, compiled.decoders[0]


def states(model, ids):
    return model.model(ids, use_cache=False).last_hidden_state


def alone(model, ids, names):
    """Each row by a call of its own, on the model's own modules."""
    own = []
    for row, name in zip(ids, names, strict=True):
        with mmpeft.use(model, name):
            own.append(states(model, row[None]))
    return torch.cat(own)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "order"), [("Llama", "compile first"), ("Qwen2", "rows first")])  # with biases on q, k, v
@torch.no_grad()
def test_every_row_equals_its_adapter_alone(kind, order, backend, device):
    model = model_of(device, kind)
    long, short = (torch.randint(0, 101, (5, n), device=device) for n in (3, 1))
    calls = [(long, MIXED), (long, ["c", "c", None, "b", "a"]), (short, MIXED), (long[:2], [None] * 2), (long, ["c"] * 5)]
    wanted = [alone(model, ids, names) for ids, names in calls]
    alone_a = alone(model, long[:1], "a")
    assert (wanted[0] - wanted[1]).flatten(1).norm(dim=1)[:4].min() > 0.1  # the last row has the same adapter
    if order == "rows first":
        mmpeft.stack(model)
        mmpeft.use(model, rows=MIXED)
    compiled, decoder = compiled_of(model)
    if order == "compile first":
        mmpeft.stack(model)
    assert mmpeft.active(model) == (("b", "a", "c") if order == "rows first" else ("a",))
    for (ids, names), want in zip(calls, wanted, strict=True):
        mmpeft.use(model, names[0]) if len({*names}) == 1 and names[0] else mmpeft.use(model, rows=names)
        close(states(model, ids), want)
    assert decoder.calls == {"fused": len(calls), "own": 0}
    mmpeft.unstack(model)
    mmpeft.use(model, decoder.bound)  # the blocks' own adapter
    close(states(model, long[:1]), wanted[0][:1] if decoder.bound == "b" else alone_a)
    assert decoder.calls == {"fused": len(calls) + 1, "own": 0}
    compiled.undo()


@torch.no_grad()
def test_what_was_trained_since_is_copied_by_use(device):
    """In the same memory, as a CUDA graph needs; another stack of adapters is another program."""
    from mmpeft.adapters.compiled.model import _key

    model = model_of(device)
    ids = torch.randint(0, 101, (2, 4), device=device)
    compiled, decoder = compiled_of(model)
    mmpeft.stack(model)
    mmpeft.use(model, rows=["c", "b"])
    before = states(model, ids)
    place, key = decoder.rows.stacks.blocks[0][0].A.data_ptr(), _key(decoder.state)
    index = decoder.rows.pick.rows.data_ptr()
    for name, p in model.named_parameters():
        if "._adapters.b." in name:
            p.add_(0.3)
    mmpeft.use(model, rows=["a", "b", "c"])
    states(model, torch.randint(0, 101, (3, 4), device=device))
    mmpeft.use(model, rows=["c", "b"])
    after = states(model, ids)
    assert decoder.calls == {"fused": 3, "own": 0}
    close(after[0], before[0])
    assert (after[1] - before[1]).norm() > 0.1
    assert decoder.rows.stacks.blocks[0][0].A.data_ptr() == place and _key(decoder.state) == key
    assert decoder.rows.pick.rows.data_ptr() == index
    step = compiled.graph(lambda x: states(model, x))
    close(step(ids), after)
    mmpeft.use(model, rows=["b", "c"])
    close(step(ids.flip(0)), after.flip(0))
    mmpeft.stack(model, ["b", "c"])
    mmpeft.use(model, rows=["c", "b"])
    assert _key(decoder.state) != key
    close(step(ids), after)
    assert decoder.rows.stacks.blocks[0][0].A.shape[0] == 2
    compiled.undo()
    close(states(model, ids), after)


def test_what_is_left_to_the_models_own_forward(device):
    plans = PLANS | {"d": {f"{LAYERS}.self_attn.q_proj": mmpeft.DoRA(rank=2)}}
    model = model_of(device, plans=plans)
    ids = torch.randint(0, 101, (2, 4), device=device)
    compiled, decoder = compiled_of(model)
    mmpeft.stack(model, ["a", "b"])
    mmpeft.use(model, rows=["a", "b"])
    with pytest.raises(ConfigError, match="for inference"):
        states(model, ids)
    with torch.no_grad():
        want = states(model, ids)
        assert decoder.calls == {"fused": 1, "own": 1}
        with pytest.raises(ConfigError, match="2 rows were given"):
            states(model, ids[:1])
        assert model.model(ids, use_cache=True).past_key_values is not None
        mmpeft.stack(model)
        mmpeft.use(model, rows=["a", "b"])
        for _ in range(2):
            close(states(model, ids), want)
        assert decoder.calls == {"fused": 1, "own": 5}
        close(compiled.graph(lambda x: states(model, x))(ids), want)
    reasons = {"stacked adapters with gradients", "2 rows were given for a batch of 1", "a key/value cache is asked for"}
    assert reasons < decoder.reasons and any("'d'" in reason for reason in decoder.reasons - reasons)
    compiled.undo()


@torch.no_grad()
def test_weights_kept_in_few_bits_and_packed_documents(device):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"num_attention_heads": 2, "hidden_size": 64})).to(device).eval()
    mmpeft.quantise(model, {"model.layers": "nf4"})
    for name, plan in PLANS.items():
        mmpeft.attach(model, plan, name=name, check=False)
    for name, p in model.named_parameters():
        if "._adapters." in name:
            p.add_(0.2 * torch.randn_like(p))
    ids = torch.randint(0, 101, (3, 7), device=device)
    rows, places = ["c", "a", None], torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=device).expand(3, 7)
    want = alone(model, ids[:, 3:], rows)  # the second document of each row
    mmpeft.use(model, "a")
    compiled, decoder = compiled_of(model)
    mmpeft.stack(model)
    mmpeft.use(model, rows=rows)
    close(model.model(ids, position_ids=places, use_cache=False).last_hidden_state[:, 3:], want)
    assert decoder.calls == {"fused": 1, "own": 0} and decoder.packed == 1
    compiled.undo()


def product_of(outs, ranks, tokens, device):
    """A group's product by sample, and y [T, out] by a loop. Of three adapters one is not used and one twice, one sample is
    the base; sizes fill no tile."""
    torch.manual_seed(1)
    index = torch.tensor([2, 3, 0, 2], device=device)
    x = torch.randn(len(index) * tokens, 30, device=device)
    biases = [torch.randn(out, device=device) for out in outs]
    packed = PackedGroup([torch.randn(out, 30, device=device) / 6 for out in outs], biases, [0] * len(outs), [1.0] * len(outs))
    A = torch.randn(3, max(1, sum(ranks)), 30, device=device) / 6
    stack = Stack(A, torch.randn(3, sum(outs), max(1, *ranks, 0), device=device), ranks)
    y = (x @ packed.W.mT + packed.bias).unflatten(0, (4, tokens))
    for sample, i in enumerate(index.tolist()):
        row = first = 0
        for out, r in zip(outs, ranks, strict=True):
            if i < 3:
                S = x.unflatten(0, (4, tokens))[sample] @ A[i, first : first + r].mT
                y[sample, :, row : row + out] += S @ stack.B[i, row : row + out, :r].mT
            row, first = row + out, first + r
    return Product.by_sample(x, Group(packed, [None] * len(outs)), stack, index), y.flatten(0, 1)


TOKENS = pytest.mark.parametrize("tokens", [1, 5, 35])


@TOKENS
@pytest.mark.parametrize("ranks", [[1, 3, 20], [0, 17, 0], [70, 0, 2], [0, 0, 0]])
@torch.no_grad()
def test_rope_adds_the_samples_own_rank_term(tokens, ranks, backend, device):
    half = 10
    product, y = product_of([4 * half, 2 * half, 2 * half], ranks, tokens, device)
    close(product.finished(), y)
    angles = torch.rand(tokens, half, device=device) * 6
    cos, sin = (t.repeat(4, 1)[:, None] for t in (angles.cos(), angles.sin()))
    q, k = y[:, : 6 * half].unflatten(1, (3, 2, half)).unbind(2)
    turned = torch.stack([q * cos - k * sin, k * cos + q * sin], 2).flatten(1)
    got = expand.rope(product, 2, 1, angles.cos(), angles.sin())
    close(got, torch.cat([turned, y[:, 6 * half :]], 1))


@TOKENS
@pytest.mark.parametrize("ranks", [[1, 3], [0, 17], [70, 0]])
@torch.no_grad()
def test_swiglu_adds_the_samples_own_rank_term(tokens, ranks, backend, device):
    product, y = product_of([37, 37], ranks, tokens, device)
    gate, up = y.chunk(2, 1)
    close(expand.swiglu(product), torch.nn.functional.silu(gate) * up)


@TOKENS
@pytest.mark.parametrize("shape", [(1, 8), (16, 8)])
@pytest.mark.parametrize("rank", [0, 3, 20])
@torch.no_grad()
def test_add_and_norm_add_the_samples_own_rank_term(tokens, rank, shape, backend, device, monkeypatch):
    monkeypatch.setattr(expand, "NORM_SHAPES", [shape])
    monkeypatch.setattr(tuning, "_shapes", {})
    product, y = product_of([37], [rank], tokens, device)
    stream, norm = torch.randn_like(y), torch.rand(37, device=device)
    total, normed = expand.add_rmsnorm(stream, product, norm, 1e-6)
    close(total, stream + y)
    close(normed, torch.nn.functional.rms_norm(stream + y, (37,), norm, 1e-6))
