"""What single methods promise beyond the common properties: shared tensors, orthogonality, trajectories, call
methods."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import close, deltas, fill, losses_on
from safetensors.torch import load_file
from torch import nn

import mmpeft
from mmpeft.adapters.methods.orthogonal import butterfly
from mmpeft.adapters.methods.subspace import hadamard
from mmpeft.errors import ConfigError


class Block(nn.Module):
    """Attention-like and feed-forward parts of width 8 with residuals."""

    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.q, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        x = x + self.out(torch.tanh(self.q(x)))
        return x + self.mlp(self.norm(x))


def stack(n=2):
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(n))).eval()


def trained(model, name="a"):
    found = {id(d._parameters[n]): d._parameters[n] for d in deltas(model, name) for n in d.trained}
    return list(found.values())


@pytest.mark.parametrize(
    ("method", "match", "count"),
    [
        # FacT: q, out are one 8 x 8 block each, the two feed-forward layers two each: 6 a layer, 12 in all.
        (mmpeft.FacTTT(rank=3), "*.{q,out,mlp.0,mlp.2}", 2 * 8 * 3 + 12 * 3**2),
        (mmpeft.FacTTK(rank=3), "*.{q,out,mlp.0,mlp.2}", 2 * 8 * 3 + 12 * 3 + 3**3),
        (mmpeft.KAdaptation(rank=1, t=4), "*.{q,out}", 4**3 + 4 * (8 + 8)),
        (mmpeft.DID(dimension=30), "*.{q,out,mlp.0,mlp.2}", 30),
        (mmpeft.SAID(dimension=30), "*.{q,out,mlp.0,mlp.2}", 30),
        (mmpeft.Compacter(reduction=2, n=2), "*.{out,mlp}", 2**3 + 4 * (2 * (4 + 8) + 4 + 8)),
        (mmpeft.ProPETL(reduction=2), "*.mlp", (1 + 2) * 2 * 8 * 4),
        (mmpeft.PHMAdapter(reduction=2, n=2), "*.mlp", 2 * (2 * (2**3 + 4 * 8 // 2) + 4 + 8)),
    ],
    ids=lambda v: v.name if isinstance(v, mmpeft.Method) else None,
)
def test_shared_tensors_are_one_object_counted_and_saved_once(method, match, count, tmp_path):
    model, x = stack(), torch.randn(3, 5, 8)
    assert mmpeft.inspect(model, {match: method}).trainable == count
    mmpeft.attach(model, {match: method}, name="a", example=x)
    assert sum(p.numel() for p in trained(model)) == count
    groups = mmpeft.parameter_groups(model, lr=1e-3)
    assert sum(p.numel() for g in groups for p in g["params"]) == count
    fill(model, "a")
    mmpeft.save(model, tmp_path, name="a")
    assert sum(t.numel() for t in load_file(tmp_path / "adapter.safetensors").values()) == count
    other = copy.deepcopy(model)
    mmpeft.detach(other)
    mmpeft.load(other, tmp_path, check=False)
    with torch.no_grad():
        y = model(x)
        assert close(other(x), y)
        twin = copy.deepcopy(model)
        for p in trained(twin):
            p.zero_()
        assert torch.equal(model(x), y) and not close(twin(x), y, 1e-3)


@pytest.mark.parametrize(
    "method",
    [
        mmpeft.OFT(block_size=4),
        mmpeft.OFT(block_size=4, side="out"),
        mmpeft.BOFT(block_size=2, m=4, scale=False),
        mmpeft.HRA(rank=6),
    ],
    ids=str,
)
def test_orthogonal_methods_keep_angles_and_norms(method):
    model = nn.Sequential(nn.Linear(16, 16)).double()
    mmpeft.attach(model, {"0": method}, name="a", example=torch.randn(2, 16).double())
    fill(model, "a", size=1.0)
    W, new = model[0]._parameters["weight"], model[0].weight
    assert not close(new, W, 0.1)
    side = method.side if isinstance(method, mmpeft.OFT) else "in"
    assert close(new @ new.T, W @ W.T, 1e-10) if side == "in" else close(new.T @ new, W.T @ W, 1e-10)


def test_the_butterfly_of_log_n_factors_mixes_every_input_with_every_other():
    n, b = 16, 2
    reach = torch.eye(n)
    for j in range(4):
        order = butterfly(n, b, j, torch.device("cpu"))
        P = torch.eye(n)[:, order]
        reach = reach @ (P @ torch.block_diag(*[torch.ones(b, b)] * (n // b)) @ P.T)
        assert int((reach[0] > 0).sum()) == 2 ** (j + 1)


def test_coft_stays_in_its_ball_and_oft_leaves_it():
    for eps, inside in ((0.1, True), (None, False)):
        model = nn.Sequential(nn.Linear(8, 8))
        mmpeft.attach(model, {"0": mmpeft.OFT(block_size=4, eps=eps)}, name="a", example=torch.randn(2, 8))
        fill(model, "a", size=2.0)
        change = torch.linalg.matrix_norm(
            model[0].weight @ torch.linalg.inv(model[0]._parameters["weight"]) - torch.eye(8)
        )
        assert (float(torch.linalg.svdvals(model[0]._parameters["weight"] - model[0].weight).max()) < 0.3) == inside, (
            change
        )


def test_delta_lora_follows_the_papers_trajectory():
    """The paper's loop, which really writes to the weight, and the telescoped form give the same model after every
    step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    mmpeft.attach(
        model,
        {"0": mmpeft.DeltaLoRA(rank=2, alpha=4, lam=0.7, wait=True)},
        name="a",
        example=torch.randn(2, 6).double(),
    )
    (d,) = deltas(model)
    W = model[0]._parameters["weight"].clone()
    A, B, bias = d.A.detach().clone().requires_grad_(), d.B.detach().clone().requires_grad_(), model[0].bias
    x, target = torch.randn(7, 6).double(), torch.randn(7, 5).double()
    ours = torch.optim.AdamW(mmpeft.parameter_groups(model, lr=0.05, weight_decay=0.1))
    theirs = torch.optim.AdamW([{"params": [A, B], "weight_decay": 0.1}], lr=0.05)
    for step in range(8):
        if step == 3:
            assert mmpeft.begin_delta_lora(model) == 1
        before = (B @ A).detach()
        for optimizer, y in ((ours, model(x)), (theirs, F.linear(x, W + 2 * B @ A, bias))):
            optimizer.zero_grad()
            (y - target).square().mean().backward()
            optimizer.step()
        if step >= 3:
            W += 0.7 * 2 * (B @ A - before).detach()
        assert close(model[0].weight, W + 2 * B @ A, 1e-9), step
    with pytest.raises(ConfigError, match="already"):
        mmpeft.begin_delta_lora(model)


@pytest.mark.parametrize(("method", "keeps"), [(mmpeft.LoRAFA(rank=2), False), (mmpeft.LoRA(rank=2), True)], ids=str)
def test_lora_fa_keeps_no_input_and_lora_does(method, keeps):
    model = nn.Sequential(nn.Linear(50, 40))
    mmpeft.attach(model, {"0": method}, example=torch.randn(2, 50))
    x, kept = torch.randn(9, 50), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model(x)
    assert (torch.Size([9, 50]) in kept) == keeps


def test_lora_xs_starts_from_the_top_singular_triplets_whatever_their_signs(monkeypatch):
    torch.manual_seed(0)
    W = torch.randn(9, 7)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    made = []
    for flip in (1, -1):
        model = nn.Sequential(nn.Linear(7, 9))
        model[0].weight.data = W
        monkeypatch.setattr(torch.linalg, "svd", lambda *_, flip=flip, **__: (U * flip, S, V * flip))
        method = mmpeft.LoRAXS(rank=3, save_projection=False)
        mmpeft.attach(model, {"0": method}, name="a", example=torch.randn(2, 7))
        (d,) = deltas(model)
        assert list(d.state_to_save()) == ["R"]
        assert close(d.B @ d.A, U[:, :3] * S[:3] @ V[:3])
        made.append((d.A, d.B))
    assert close(made[0][0], made[1][0]) and close(made[0][1], made[1][1])


def test_fastfood_keeps_norms_and_sites_differ():
    H = hadamard(torch.eye(8).flatten()[:8])
    assert torch.equal(H, torch.ones(8))
    model = stack()
    mmpeft.attach(model, {"*.{q,out}": mmpeft.DID(dimension=20)}, name="a", example=torch.randn(2, 5, 8))
    fill(model, "a", size=1.0)
    t = deltas(model)[0].t
    updates = [m.weight - m._parameters["weight"] for b in model for m in (b.q, b.out)]
    for u in updates:
        assert float(u.norm() / t.norm()) == pytest.approx(1, abs=0.35)
    assert not close(updates[0], updates[1], 0.1)


# --- gains and call methods
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Linear(6, 4), lambda: nn.Conv2d(6, 4, 3, padding=1), lambda: nn.LayerNorm(6)],
    ids=["linear", "conv", "norm"],
)
def test_ssf_and_red_edit_what_the_layer_gives(make):
    module = make()
    x = torch.randn(3, 6, 5, 7) if isinstance(module, nn.Conv2d) else torch.randn(3, 5, 6)
    width = 6 if isinstance(module, nn.LayerNorm) else 4
    gain, shift = torch.randn(width), torch.randn(width)
    for method, names in ((mmpeft.SSF(), ("gamma", "beta")), (mmpeft.RED(), ("l", "b"))):
        model = nn.Sequential(copy.deepcopy(module))
        expected = model(x).movedim(1 if isinstance(module, nn.Conv2d) else -1, -1) * gain + shift
        mmpeft.attach(model, {"0": method}, name="a", example=x)
        tensors = {n: d._parameters[n] for d in deltas(model) for n in d.trained}
        assert sum(t.numel() for t in tensors.values()) == 2 * width
        with torch.no_grad():
            tensors[names[0]].copy_(gain)
            tensors[names[1]].copy_(shift)
        assert close(model(x), expected.movedim(-1, 1) if isinstance(module, nn.Conv2d) else expected)


@pytest.mark.parametrize("bias", [True, False])
def test_propulsion_raises_outputs_bias_included(bias):
    model, x = nn.Sequential(nn.Linear(6, 4, bias=bias)), torch.randn(3, 5, 6)
    y = model(x)
    mmpeft.attach(model, {"0": mmpeft.Propulsion(degree=15, vectors=3)}, name="a", example=x)
    fill(model, "a", size=0.02)
    z = deltas(model)[0].z
    assert close(model(x), y * z[0] ** 15 * z[1] ** 15 * z[2] ** 15) and not close(model(x), y, 0.05)


def test_propulsion_on_multihead_attention_with_own_key_width_is_refused():
    model = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
    with pytest.raises(mmpeft.errors.Unsupported, match="share one bias"):
        mmpeft.attach(model, {".": mmpeft.Propulsion()})


def test_lofit_scales_then_offsets_the_chosen_heads():
    model, x = stack(), torch.randn(3, 5, 8)
    with torch.no_grad():
        base = model(x)
    mmpeft.attach(model, {"*.out": mmpeft.HeadScaling()}, name="scale", example=x)
    assert close(model(x), base, 5e-3)
    with torch.no_grad():
        deltas(model, "scale")[0].a[2] += 1.0
        deltas(model, "scale")[1].a[0] += 0.5
        deltas(model, "scale")[1].a[3] += 2.0
    z = torch.tanh(model[0].q(x))
    scaled = (
        x
        + model[0].out._parameters["weight"] @ z.new_zeros(8)
        + F.linear(z * (1 + deltas(model, "scale")[0].a.flatten()), model[0].out.weight, model[0].out.bias)
    )
    scaled = scaled + model[0].mlp(model[0].norm(scaled))
    assert close(model[0](x), scaled)
    plan = mmpeft.lofit_plan(model, 2)
    assert plan == {"1.out": mmpeft.LoFiT(heads=(3,)), "0.out": mmpeft.LoFiT(heads=(2,))}
    mmpeft.detach(model)
    mmpeft.attach(model, plan, name="lofit", example=x)
    assert sum(p.numel() for p in trained(model, "lofit")) == 2 * 2
    assert close(model(x), base)
    with torch.no_grad():
        deltas(model, "lofit")[0].v.fill_(0.7)
    z = torch.tanh(model[0].q(x)) + torch.tensor([0, 0, 0, 0, 0.7, 0.7, 0, 0])
    edited = x + F.linear(z, model[0].out.weight, model[0].out.bias)
    assert close(model[0](x), edited + model[0].mlp(model[0].norm(edited)))
    with pytest.raises(ConfigError, match="expected 1 to 0"):
        mmpeft.lofit_plan(model, 1)
    with pytest.raises(ConfigError, match="from 0 to 3"):
        mmpeft.attach(model, {"0.out": mmpeft.LoFiT(heads=(4,))}, name="x")


@pytest.mark.parametrize(
    "method",
    [mmpeft.Compacter(reduction=1, n=2, activation="relu"), mmpeft.PHMAdapter(reduction=2, n=4, scale=0.5)],
    ids=str,
)
def test_phm_bottlenecks_are_bottlenecks_with_kronecker_weights(method):
    model, x = stack(1), torch.randn(3, 5, 8)
    mmpeft.attach(model, {"0.mlp": method}, name="a", example=x)
    fill(model, "a", size=0.5)
    (d,) = deltas(model)
    p = d._parameters
    W = {}
    for part in ("down", "up"):
        B = p[f"{part}_s"] @ p[f"{part}_t"] if isinstance(method, mmpeft.Compacter) else p[f"{part}_B"]
        W[part] = sum(torch.kron(a, b) for a, b in zip(p[f"{part}_A"], B, strict=True))
    if isinstance(method, mmpeft.Compacter):
        assert p["down_A"] is p["up_A"]
    with mmpeft.use(model, None):
        y = model[0].mlp(x)
    act = F.relu if method.activation == "relu" else F.gelu
    expected = y + method.scale * F.linear(act(F.linear(y, W["down"], p["down_bias"])), W["up"], p["up_bias"])
    assert close(model[0].mlp(x), expected)


CALLS = {
    "compacter": ("*.mlp", mmpeft.Compacter(reduction=1, n=2)),
    "phm": ("*.mlp", mmpeft.PHMAdapter(reduction=2, n=2)),
    "red": ("*.mlp", mmpeft.RED()),
    "propetl": ("*.{mlp,out}", mmpeft.ProPETL(reduction=1, lr_ratio=1.0)),
    "gated-lora": ("*.{q,out}", mmpeft.Gated(mmpeft.LoRA(rank=2))),
    "gated-bottleneck": ("*.mlp", mmpeft.Gated(mmpeft.Bottleneck(size=4))),
    "gated-adaptformer": ("*.mlp", mmpeft.Gated(mmpeft.AdaptFormer(size=4, scale=1.0))),
    "gated-compacter": ("*.mlp", mmpeft.Gated(mmpeft.Compacter(reduction=1, n=2))),
    "gated-red": ("*.mlp", mmpeft.Gated(mmpeft.RED())),
    "gated-lofit": ("*.out", mmpeft.Gated(mmpeft.LoFiT())),
    "dra": ("*.{mlp,out}", mmpeft.DRA()),
    "krona-b": ("*.mlp", mmpeft.KronAB(scale=2.0)),
    "krona-res": ("*.mlp", mmpeft.KronARes(a1=2, a2=4)),
    "ada-deft": ("*.mlp", mmpeft.AdaDEFT()),
    "lofit": ("*.out", mmpeft.LoFiT()),
    "lofit-scaling": ("*.out", mmpeft.HeadScaling()),
}


@pytest.mark.parametrize("name", CALLS)
def test_call_methods_start_learn_mix_in_a_batch_and_refuse_to_merge(name, tmp_path):
    match, method = CALLS[name]
    model, x = stack(), torch.randn(6, 5, 8)
    with torch.no_grad():
        base = model(x)
    mmpeft.attach(model, {match: method}, name="a", example=x)
    assert close(model(x), base, 5e-3 if name == "lofit-scaling" else 1e-6)
    teacher = copy.deepcopy(model)
    fill(teacher, "a", size=0.6)
    with torch.no_grad():
        target = teacher(x)
    assert not close(target, base, 1e-2)
    losses = losses_on(model, x, target, lr=0.02, steps=120)
    first, last = losses[0], min(losses[-5:])
    assert last < 0.25 * first
    mmpeft.attach(model, {match: method}, name="b", example=x)
    fill(model, "b", 2)
    with torch.no_grad():
        singles = {None: base}
        for adapter in "ab":
            mmpeft.use(model, adapter)
            singles[adapter] = model(x)
        rows = ["a", None, "b", "b", "a", None]
        with mmpeft.use(model, rows=rows):
            y = model(x)
        for i, adapter in enumerate(rows):
            assert close(y[i], singles[adapter][i])
    with pytest.raises(mmpeft.errors.Unsupported):
        mmpeft.merge(model, "a")
    mmpeft.save(model, tmp_path, name="a")
    other = stack()
    mmpeft.load(other, tmp_path, check=False)
    with torch.no_grad():
        assert close(other(x), singles["a"])
