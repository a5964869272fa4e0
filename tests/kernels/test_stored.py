"""Bases kept in few bits inside the fused blocks: the same as their dense values, never dense as a whole."""

import io

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.adapters.storage.on_kernels import kernel_form
from mmpeft.adapters.storage.packed_weight import PackedWeight
from mmpeft.adapters.storage.quantise import dequantise
from mmpeft.errors import ConfigError
from mmpeft.kernels import dispatch, quantised
from mmpeft.kernels.packed import PackedGroup
from mmpeft.kernels.stored import Ring, Stored, StoredGroup

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
         "intermediate_size": 56, "vocab_size": 101}  # fmt: skip
IDS = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(5))


def adapted(what, device, dense=False, method=mmpeft.LoRA, kind="Qwen2", **sizes):
    """The quantised model, or its dequantised values kept dense, with the same adapter."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES | sizes))
    mmpeft.quantise(model.to(device), what)
    if dense:
        dequantise(model)
    mmpeft.attach(model, {"model.layers.*.{self_attn,mlp}.*_proj": method(rank=3, alpha=6)}, name="a")
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.15 * torch.randn(p.shape, generator=generator).to(p)
    return model


def run(model):
    model.zero_grad()
    ids = IDS.to(model.device)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(one, other):
    assert len(one) == len(other) > 1
    for a, b in zip(one, other, strict=True):
        assert (a - b).norm() <= 5e-4 * b.norm() + 1e-7


CASES = [
    ({"model.layers": "nf4"}, "nf4 weights", mmpeft.LoRA, "reference", {}),
    ({"model.layers": "int8"}, "int weights", mmpeft.DoRA, "reference", {}),
    ({"model.layers": "fp8"}, "fp8 weights", mmpeft.LoRA, "triton", {"num_hidden_layers": 1}),
    ({"model.layers": "nf4", "model.layers.*.self_attn.q_proj": "16", "model.layers.0.mlp": "16"}, "nf4 weights",
     mmpeft.DoRA, "triton", {"num_hidden_layers": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("what", "says", "method", "backend", "sizes"), CASES, ids=["nf4", "int8+dora", "fp8", "mixed"])
def test_loss_and_gradients_of_the_dense_values(what, says, method, backend, sizes, device):
    want = run(adapted(what, device, dense=True, method=method, **sizes))
    model, out = adapted(what, device, method=method, **sizes), io.StringIO()
    before = {n: p for n, p in model.named_parameters() if isinstance(p, PackedWeight)}
    with dispatch.backend(backend), mmpeft.compile(model, out=out) as compiled:
        assert f"{says} made dense a group at a time" in out.getvalue()
        same(run(model), want)
        assert compiled.decoders[0].calls["own"] == 0
        areas = {g.packed.ring.area.data_ptr() for b in compiled.decoders[0].fused.blocks for g in b.groups()
                 if isinstance(g.packed, StoredGroup)}  # fmt: skip
        assert len(areas) == 1  # one dense area for all groups
        if backend == "reference":
            step = compiled.train_step(batch=2, length=9, lr=1e-2)
            torch.testing.assert_close(step(IDS, IDS), want[0], rtol=1e-5, atol=0)
            assert step(IDS, IDS) < want[0]
    after = dict(model.named_parameters())
    assert before and all(after[n] is p for n, p in before.items())


def test_a_checkpoint_loaded_into_packed_weights_is_seen(device):
    model = adapted({"model.layers": "fp8"}, device)
    with mmpeft.compile(model, out=io.StringIO()) as compiled:
        first = run(model)
        model.load_state_dict({k: v * 1.5 if "gate_proj.weight" in k else v for k, v in model.state_dict().items()})
        ours = run(model)
        assert compiled.decoders[0].calls["own"] == 0 and abs(ours[0] - first[0]) > 1e-4
    same(ours, run(model))


def test_a_packed_head_is_refused_with_its_reason():
    model = adapted({"model.layers": "nf4", "lm_head": "int8"}, "cpu", tie_word_embeddings=False)
    out = io.StringIO()
    with mmpeft.compile(model, out=out):
        assert "embedding or head is kept in few bits" in out.getvalue()


def test_a_group_is_that_of_its_dense_weights(device):
    torch.manual_seed(3)

    def make(*shape):
        return torch.randn(*shape).to(device)

    Ws, biases = [make(n, 24) for n in (37, 5)], [None, make(5)]
    dense, ring = PackedGroup(Ws, biases, [3, 0], [0.7, 1.0]), Ring()
    other = StoredGroup([Stored.of(make(90, 30))], None, [16], [1.0], ring=ring)
    group = StoredGroup([Stored.of(w) for w in Ws], biases, [3, 0], [0.7, 1.0], ring=ring)
    A, B = make(3, 24), make(37, 3)
    for g in (dense, group):
        g.refresh([A, None], [B, None])
    for _ in range(2):
        other.load()
        group.load()
        for name in ("forward_weight", "backward_weight", "W", "A", "B", "bias"):
            assert torch.equal(getattr(group, name), getattr(dense, name)), name
    with pytest.raises(ConfigError, match="ring that is in use"):
        StoredGroup([Stored.of(make(900, 30))], None, [16], [1.0], ring=ring)
    with pytest.raises(ConfigError, match="shares its input"):
        StoredGroup([Stored.of(make(4, n)) for n in (3, 4)], None, [1, 1], [1.0, 1.0], ring=Ring())


@pytest.mark.parametrize("scheme", ["nf4", "int4", "int8", "fp8"])
def test_dequantised_into_rows_that_lie_apart(device, scheme):
    if not dispatch.triton_installed():
        pytest.skip("no Triton on this platform")
    layer = nn.Sequential(nn.Linear(32, 21)).to(device)
    mmpeft.quantise(layer, "0", scheme)
    w = layer[0]._parameters["weight"]
    area = torch.full((23, 50), 7.0, device=device)
    quantised.dequantise_into(kernel_form(w.scheme, w.packed, w.shape), area[1:22, :32])
    torch.testing.assert_close(area[1:22, :32], w.scheme.dequantise(w.packed, w.shape), rtol=1e-6, atol=1e-7)
    assert (area[:, 32:] == 7).all() and (area[0] == 7).all() and (area[22] == 7).all()
