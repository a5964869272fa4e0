"""Quantised bases: published NF4 levels, sizes and errors; engine behaviour on packed weights; methods on the grid."""

from __future__ import annotations

import copy
import io
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from cases import close, deltas, fill
from quantise_kit import net
from torch import nn

import mmpeft
from mmpeft.adapters.fingerprint import fingerprint
from mmpeft.adapters.methods import quantised
from mmpeft.adapters.storage import nf4
from mmpeft.adapters.storage.integer import BF16, FP8, Int, pack, unpack
from mmpeft.adapters.storage.packed_weight import PackedWeight
from mmpeft.adapters.storage.quantise import linears
from mmpeft.errors import ConfigError, FileFormatError, MmpeftError, NameNotFound, Unsupported

ALL = [
    nf4.NF4(),
    nf4.NF4(double=False),
    Int(8),
    Int(4, 8),
    Int(4, 8, True),
    Int(2, 4),
    Int(8, affine=True),
    FP8(),
    BF16(),
]


def test_nf4_levels_are_the_papers_quantiles():
    """8 quantiles of N(0, 1) below 0 and 9 from 0 up, ends at (1 - 1/32 + 1 - 1/30) / 2, scaled to [-1, 1]."""
    end = (1 - 1 / 30 + 1 - 1 / 32) / 2
    up = torch.special.ndtri(torch.linspace(end, 0.5, 9, dtype=torch.float64))[:-1]
    down = -torch.special.ndtri(torch.linspace(end, 0.5, 8, dtype=torch.float64))[:-1]
    expected = torch.cat([up, torch.zeros(1), down]).sort().values
    assert close(torch.tensor(nf4.LEVELS, dtype=torch.float64), expected / expected.abs().max(), 2e-6)


def test_nf4_sizes_and_errors_are_the_published_ones():
    """4.127 bits with double quantisation (paper, section 3); mean |error| 0.0728 and relative 0.203 on N(0, 1) without
    it, which bitsandbytes' own tests hold."""
    torch.manual_seed(0)
    W = torch.randn(1024, 512)
    plain, double = PackedWeight.of(W, nf4.NF4(double=False)), PackedWeight.of(W, nf4.NF4())
    assert 8 * double.packed_bytes / W.numel() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert 8 * plain.packed_bytes / W.numel() == 4.5
    error = (plain.dense() - W).abs()
    assert float(error.mean()) == pytest.approx(0.0728, abs=3e-4)
    assert float((error / W.abs().clamp_min(1e-8)).mean()) == pytest.approx(0.2033, abs=2e-3)
    assert float((double.dense() - W).abs().mean()) < 1.01 * float(error.mean())


def test_nf4_is_the_nearest_level_of_its_block():
    torch.manual_seed(0)
    W = torch.randn(5, 37)  # 185 values: the last block is short, and the last byte half full
    found = PackedWeight.of(W, nf4.NF4(double=False)).dense().flatten()
    table = torch.tensor(nf4.LEVELS)
    for start in range(0, 185, 64):
        block = W.flatten()[start : start + 64]
        scale = block.abs().max()
        nearest = table[(block[:, None] / scale - table).abs().argmin(1)] * scale
        assert close(found[start : start + 64], nearest, 1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_by_their_formula(bits):
    torch.manual_seed(0)
    W, top = torch.randn(3, 12), 2 ** (bits - 1) - 1
    groups = W.view(3, 3, 4)
    s = groups.abs().amax(-1, keepdim=True) / top
    assert close(PackedWeight.of(W, Int(bits, 4)).dense(), ((groups / s).round() * s).view(3, 12), 1e-6)
    low, step = groups.amin(-1, keepdim=True), (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True))
    step = step / (2**bits - 1)
    expected = (((groups - low) / step).round() * step + low).view(3, 12)
    assert close(PackedWeight.of(W, Int(bits, 4, True)).dense(), expected, 1e-6)
    codes = torch.randint(0, 2**bits, (13,), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, 13), codes)
    assert pack(codes, bits).numel() == -(-13 * bits // 8)


def test_fp8_is_a_cast_with_a_row_scale():
    W = torch.randn(4, 9)
    s = W.abs().amax(1, keepdim=True) / 448
    assert close(PackedWeight.of(W, FP8()).dense(), (W / s).to(torch.float8_e4m3fn).float() * s, 1e-6)


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_a_packed_weight_is_a_parameter_like_any_other(scheme, tmp_path):
    model, x = net(), torch.randn(3, 5, 16)
    mmpeft.quantise(model, "{up,down}", scheme)
    dense = copy.deepcopy(model)
    assert mmpeft.dequantise(dense) == ["up", "down"] and type(dense.up.weight) is nn.Parameter
    y = model(x)
    assert isinstance(model.up.weight, nn.Parameter) and close(y, dense(x), 1e-6)
    assert fingerprint(model) == fingerprint(dense)
    twin = copy.deepcopy(model)
    assert isinstance(twin.up.weight, PackedWeight) and torch.equal(twin(x), y)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = net()
    mmpeft.quantise(other, "{up,down}", scheme)
    other.load_state_dict(torch.load(buffer, weights_only=False))
    assert torch.equal(other(x), y)
    moved = copy.deepcopy(model).bfloat16()
    assert moved.up.weight.dtype == torch.bfloat16 and moved(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(moved.up.weight.packed["codes"], model.up.weight.packed["codes"])
    mmpeft.save_packed(model, tmp_path / "base.safetensors")
    again = net()
    assert mmpeft.load_packed(again, tmp_path / "base.safetensors") == ["up", "down"] and torch.equal(again(x), y)
    assert again.up.weight.scheme == scheme and mmpeft.inspect(again, {"up": mmpeft.LoRA(rank=1)}).base_bytes < 2400
    fresh = torch.randn(24, 16)
    with torch.no_grad():
        model.up.weight.copy_(fresh)
    assert torch.equal(model.up.weight.dense(), PackedWeight.of(fresh, scheme).dense())


def test_gradients_pass_and_no_dense_weight_is_saved():
    model, x = net(), torch.randn(3, 5, 16, requires_grad=True)
    mmpeft.quantise(model, "{up,down}", "nf4")
    dense = copy.deepcopy(model)
    mmpeft.dequantise(dense)
    for p in [*model.parameters(), *dense.parameters()]:
        p.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        y = model(x)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert not {(24, 16), (16, 24), (8, 24), (24, 8)} & set(saved) and (3, 5, 24) in saved
    (e,) = torch.autograd.grad(dense(x).sum(), x)
    assert close(g, e, 1e-6)
    model.up.bias.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    model(x).sum().backward()
    assert model.up.bias.grad.shape == (24,)


def test_qlora_trains_on_a_packed_base_without_forming_the_weight(tmp_path, monkeypatch):
    model, x = net(), torch.randn(32, 16)
    mmpeft.quantise(model, "{up,down}", "nf4")
    with torch.no_grad():
        base = model(x)
    mmpeft.attach(model, {"{up,down}": mmpeft.LoRA(rank=2)}, name="a", example=x)
    assert torch.equal(model(x), base) or close(model(x), base, 1e-6)
    before = model.up.weight  # the property: W' = W
    assert type(before) is torch.Tensor
    stored = {n: p.packed["codes"].clone() for n, p in model.named_parameters() if isinstance(p, PackedWeight)}
    from mmpeft.adapters import slot as slot_module

    monkeypatch.setattr(slot_module, "apply", lambda w, d: pytest.fail("W' was formed"))
    torch.manual_seed(1)
    target = base + torch.tanh(x @ torch.randn(16, 3))
    optimizer = torch.optim.Adam(mmpeft.parameter_groups(model, lr=0.03))
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    monkeypatch.undo()
    with mmpeft.use(model, None):
        assert close(model(x), base, 1e-6)
    assert all(torch.equal(p.packed["codes"], stored[n]) for n, p in model.named_parameters() if n in stored)
    y = model(x).detach()
    assert mmpeft.merge(model, check=x) < 1e-5
    mmpeft.unmerge(model)
    mmpeft.save(model, tmp_path)
    other = net()
    mmpeft.quantise(other, "{up,down}", "nf4")
    mmpeft.load(other, tmp_path)
    assert close(other(x), y, 1e-6)
    with pytest.raises(MmpeftError, match="another base|same tensor names"):
        mmpeft.load(net(), tmp_path)
    mmpeft.detach(model)
    assert isinstance(model.up.weight, PackedWeight)


@pytest.mark.parametrize(
    "method",
    [
        mmpeft.DoRA(rank=2),
        mmpeft.LoHa(rank=2),
        mmpeft.IA3(),
        mmpeft.RoCoFT(rank=2),
        mmpeft.Full(),
        mmpeft.LoRAXS(rank=2),
        mmpeft.LoRA(rank=2, init_from="pissa"),
        mmpeft.AdaLoRA(rank=2, std=0.3),
        mmpeft.LoRAPrune(rank=2),
    ],
    ids=lambda m: m.name,
)
def test_other_methods_work_on_packed_bases(method):
    model, x = net(), torch.randn(4, 16)
    mmpeft.quantise(model, "{up,down}", Int(8))
    with torch.no_grad():
        base = model(x)
    mmpeft.attach(model, {"up": method}, name="a", example=x)
    assert close(model(x), base, 1e-3)
    assert not any(isinstance(p, PackedWeight) for d in deltas(model) for p in d.parameters())
    fill(model)
    dense = method.weight(model.up._parameters["weight"].dense(), deltas(model)[0])
    assert close(model.up.weight, dense, 1e-6) and not close(model(x), base, 1e-3)


def test_roles_of_a_packed_fused_weight_and_weights_that_are_only_read():
    from cases import DirectRead

    torch.manual_seed(0)
    model, x = DirectRead().eval(), torch.randn(3, 5, 6)
    mmpeft.quantise(model, "qkv", Int(8))
    W = model.qkv.weight.dense()
    mmpeft.attach(model, {"qkv[q,v]": mmpeft.LoRA(rank=2)}, name="a", example=x)
    fill(model)
    q, v = (d.B @ d.A for d in deltas(model))
    assert close(model.qkv.weight, W + torch.cat([q, torch.zeros(6, 6), v]), 1e-6)
    assert close(model.qkv(x), F.linear(x, model.qkv.weight, model.qkv.bias), 1e-6)


def test_it_compiles_in_one_graph():
    model, x = net(), torch.randn(4, 16)
    mmpeft.quantise(model, "{up,down}", "nf4")
    mmpeft.attach(model, {"{up,down}": mmpeft.LoRA(rank=2)}, name="a", example=x)
    fill(model)
    params = [p for d in deltas(model) for p in (d.A, d.B)]
    expected = torch.autograd.grad(model(x).square().sum(), params)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert close(y, model(x), 1e-6)
    for g, e in zip(torch.autograd.grad(y.square().sum(), params), expected, strict=True):
        assert close(g, e, 1e-5)


def test_bit_allocation_is_the_best_there_is():
    """Against all 4^3 choices."""
    model = net()
    W = {p: m.weight.detach() for p, m in linears(model, "{up,down,head}").items()}
    schemes = {"int2": Int(2, 8), "int4": Int(4, 8), "int8": Int(8)}
    importance = {p: torch.rand_like(w) for p, w in W.items()}

    def cost(path, label):
        if label == "16":
            return 2 * W[path].numel(), float(
                ((W[path] - W[path].bfloat16().float()).square() * importance[path]).sum()
            )
        Q = PackedWeight.of(W[path], schemes[label])
        return Q.packed_bytes, float(((W[path] - Q.dense()).square() * importance[path]).sum())

    options = list(itertools.product(["int2", "int4", "int8", "16"], repeat=3))
    for budget in (250, 400, 700, 1000, 1700):
        fits = []
        for labels in options:
            costs = [cost(p, n) for p, n in zip(W, labels, strict=True)]
            if sum(c[0] for c in costs) <= budget:
                fits.append(sum(c[1] for c in costs))
        if not fits:
            with pytest.raises(ConfigError, match="too small"):
                mmpeft.plan_bits(model, "{up,down,head}", budget, schemes=schemes, importance=importance)
            continue
        found = mmpeft.plan_bits(model, "{up,down,head}", budget, schemes=schemes, importance=importance)
        names = {v: k for k, v in schemes.items()} | {"16": "16"}
        assert sum(cost(p, names[s])[1] for p, s in found.items()) == pytest.approx(min(fits), rel=1e-6, abs=1e-9)
    twin = net()
    mmpeft.quantise(twin, found)
    assert mmpeft.packed_bytes(twin) <= budget + sum(
        p.nbytes for n, p in twin.named_parameters() if not n.endswith(("up.weight", "down.weight", "head.weight"))
    )


def test_sixteen_bits_are_two_bytes_a_number_on_any_base(tmp_path):
    """fp32 layers, two of 64 x 64: 16,384 bytes hold them in bf16, which a budget of 20,000 takes over int8."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(3, 64)
    W = [layer.weight.detach().clone() for layer in model]
    assert mmpeft.plan_bits(model, "*", 20_000) == {"0": "16", "1": "16"} == mmpeft.plan_bits(model, "*", 16_384)
    assert sorted(mmpeft.plan_bits(model, "*", 16_383).values()) == ["16", "int8"]
    half = copy.deepcopy(model).half()
    assert mmpeft.plan_bits(half, "*", 16_384) == {"0": "16", "1": "16"}
    assert mmpeft.quantise(half, {"*": "16"}) == {} and half[0].weight.dtype == torch.float16  # nothing to do

    assert mmpeft.quantise(model, {"*": "16"}) == {"0": BF16(), "1": BF16()}
    stored = model[0].weight
    assert isinstance(stored, PackedWeight) and stored.packed_bytes == stored.nbytes == 8_192
    assert mmpeft.packed_bytes(model) == 16_384 + 2 * 64 * 4
    assert stored.dtype == torch.float32 and stored.packed["codes"].dtype == torch.bfloat16
    assert torch.equal(model[1].weight.dense(), W[1].bfloat16().float())
    expected = x
    for w, layer in zip(W, model, strict=True):
        expected = F.linear(expected, w.bfloat16().float(), layer.bias)
    assert torch.equal(model(x), expected)
    mmpeft.save_packed(model, tmp_path / "base.safetensors")
    again = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    assert mmpeft.load_packed(again, tmp_path / "base.safetensors") == ["0", "1"]
    assert again[0].weight.scheme == BF16() and torch.equal(again[0].weight.dense(), W[0].bfloat16().float())
    kept = net()
    assert list(mmpeft.quantise(kept, {"{up,down}": "int8", "down": "keep"})) == ["up"]
    assert list(mmpeft.quantise(net(), {"{up,down}": "bf16"})) == ["up", "down"]
    with pytest.raises(ConfigError, match="packed already"):
        mmpeft.plan_bits(model, "*", 20_000)
    with pytest.raises(ConfigError, match="called '16'"):
        mmpeft.plan_bits(net(), "up", 20_000, schemes={"16": "int8"})


def bitsandbytes_state(W, double, block=64, nested=256):
    """A checkpoint's entries, by the formula of its format and with a scale table unlike ours."""
    blocks = F.pad(W.flatten(), (0, -W.numel() % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    table = torch.tensor(nf4.LEVELS)
    codes = (blocks / absmax[:, None]).flatten()[: W.numel()]
    codes = (codes[:, None] - table).abs().argmin(1).to(torch.uint8)
    about = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(W.shape)}
    state = {"up.weight": (codes[0::2] << 4 | codes[1::2]).unsqueeze(1), "up.weight.absmax": absmax}
    if double:
        levels, offset = torch.linspace(-1, 1, 256), absmax.mean()
        parts = F.pad(absmax - offset, (0, -len(absmax) % nested)).view(-1, nested)
        top = parts.abs().amax(1)
        eight = ((parts / top[:, None]).flatten()[: len(absmax), None] - levels).abs().argmin(1)
        absmax = levels[eight] * top.repeat_interleave(nested)[: len(absmax)] + offset
        about |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": float(offset)}
        state |= {"up.weight.absmax": eight.to(torch.uint8), "up.weight.nested_absmax": top}
        state["up.weight.nested_quant_map"] = levels
    text = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    state["up.weight.quant_state.bitsandbytes__nf4"] = text
    values = table[codes.int()] * absmax.repeat_interleave(block)[: W.numel()]
    return state, values.view(W.shape)


@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_checkpoints_are_read(double):
    model = net()
    state, values = bitsandbytes_state(torch.randn(24, 16), double)
    assert mmpeft.load_bitsandbytes(model, state) == ["up"]
    assert model.up.weight.dtype == torch.bfloat16 and torch.equal(model.up.weight.dense(), values.bfloat16())
    del state["up.weight.absmax"]
    with pytest.raises(FileFormatError, match="lacks up.weight.absmax"):
        mmpeft.load_bitsandbytes(net(), state)


def _tied():
    model = net()
    model.head = nn.Linear(24, 8, bias=False)
    model.head.weight = model.down.weight
    return model


def _adapted():
    model = net()
    mmpeft.attach(model, {"up": mmpeft.LoRA(rank=2)}, example=torch.randn(2, 16))
    return model


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mmpeft.quantise(net(), "up", "nf8"), NameNotFound, "nearest: nf4"),
        (lambda: mmpeft.quantise(net(), "norm"), NameNotFound, "no nn.Linear"),
        (lambda: mmpeft.quantise(net(), "upp"), NameNotFound, "nearest: up"),
        (lambda: mmpeft.quantise(net(), "up", Int(4, 5)), ConfigError, "does not divide the 16"),
        (lambda: mmpeft.quantise(_tied(), "down"), Unsupported, "tied"),
        (lambda: mmpeft.quantise(_adapted(), "down"), ConfigError, "before attaching"),
        (lambda: Int(3), ConfigError, "2, 4 or 8"),
        (lambda: mmpeft.load_packed(net(), "nowhere.safetensors"), FileFormatError, "no file"),
        (lambda: mmpeft.save_packed(net(), "x.safetensors"), ConfigError, "no packed weight"),
        (lambda: nf4.NF4(block=0), ConfigError, "block 0"),
        (lambda: mmpeft.loftq(net(), {"norm": mmpeft.LayerNormTuning()}), ConfigError, "no LoRA"),
        (lambda: mmpeft.loftq(net(), {"up": mmpeft.LoRA(rank=2)}, steps=0), ConfigError, "at least 1"),
        (lambda: quantised.merge_qalora(_adapted(), "default"), Unsupported, "does not merge"),
        (lambda: quantised.LRQAT(bits=5), ConfigError, "2, 4 or 8"),
        (lambda: quantised.LRQAT(dropout=0.1), ConfigError, "dropout"),
        (lambda: mmpeft.attach(net(), {"up": quantised.QALoRA(group=5)}), ConfigError, "columns of 16"),
    ],
)  # fmt: skip
def test_bad_use_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
