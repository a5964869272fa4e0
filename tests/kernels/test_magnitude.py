"""DoRA inside the fused blocks equals mmpeft's own DoRA: loss, every gradient, the norms, and a few steps of training."""

import io

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.kernels import dispatch, fuse, magnitude, reference, sweep_plan
from mmpeft.kernels.magnitude import Magnitude
from mmpeft.kernels.packed import PackedGroup

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
         "intermediate_size": 56, "vocab_size": 101}  # fmt: skip
EVERYWHERE = {"model.layers.*.{self_attn,mlp}.*_proj": mmpeft.DoRA(rank=3, alpha=6)}
MIXED = {  # DoRA beside LoRA and beside nothing, within q|k|v and within gate|up
    "model.layers.*.self_attn.{q,v}_proj": mmpeft.DoRA(rank=3),
    "model.layers.*.mlp.gate_proj": mmpeft.DoRA(rank=2),
    "model.layers.*.{self_attn.k_proj,mlp.up_proj,mlp.down_proj}": mmpeft.LoRA(rank=2),
}
IDS = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(5))


def adapted(device, plan=EVERYWHERE, kind="Llama", names="a", **sizes):
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES | sizes))
    model = model.to(device)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.copy_(torch.randn(p.shape))
    for name in names:
        mmpeft.attach(model, plan, name=name)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.15 * torch.randn(p.shape, generator=generator).to(p)
    return model.train()


def run(model, **more):
    model.zero_grad()
    ids = IDS.to(model.device)
    loss = model(input_ids=ids, labels=ids, use_cache=False, **more).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(one, other, tolerance=5e-4):
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=0)
    assert one[1].keys() == other[1].keys() and one[1]
    for name, g in one[1].items():
        assert (g - other[1][name]).norm() <= tolerance * other[1][name].norm() + 1e-7, name


@pytest.mark.parametrize(
    ("plan", "kind", "sizes", "backend"),
    [
        (EVERYWHERE, "Llama", {}, "reference"),
        (EVERYWHERE, "Llama", {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1}, "triton"),
        (EVERYWHERE, "Llama", {"attention_bias": True, "mlp_bias": True}, "reference"),
        (MIXED, "Qwen2", {"num_hidden_layers": 1}, "triton"),
        (MIXED, "Qwen2", {}, "reference"),
    ],
)
def test_loss_and_gradients_of_the_engines_dora(plan, kind, sizes, backend, device):
    model = adapted(device, plan, kind, **sizes)
    want, out = run(model), io.StringIO()
    with dispatch.backend(backend), mmpeft.compile(model, out=out) as compiled:
        assert "fused blocks with DoRA's factors in them" in out.getvalue()
        same(run(model), want)
        assert compiled.decoders[0].calls["own"] == 0
        documents = torch.arange(9, device=device).expand(2, 9) % 5
        packed = run(model, position_ids=documents)
    same(packed, run(model, position_ids=documents))


def test_without_the_sweep(device, monkeypatch):
    """Where no tile of the MLP's sweep fits (wide ranks), SwiGLU's gradient and m's are passes of their own."""
    model = adapted(device, num_hidden_layers=1)
    want = run(model)
    with dispatch.backend("triton"), mmpeft.compile(model, out=io.StringIO()):
        monkeypatch.setattr(sweep_plan, "plan", lambda *_: None)
        same(run(model), want)


def test_training_follows_the_engine_and_norms_are_formed_once_a_step(device, monkeypatch):
    model, formed = adapted(device), []
    form = Magnitude.form
    monkeypatch.setattr(Magnitude, "form", lambda self, *a, **k: (formed.append(self), form(self, *a, **k))[1])
    other = adapted(device)
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    theirs = []
    for _ in range(4):
        theirs.append(run(other)[0])
        optimizer.step()
    compiled = mmpeft.compile(model, out=io.StringIO())
    step = compiled.train_step(batch=2, length=9, lr=1e-2)
    ours = []
    for _ in range(4):
        formed.clear()
        ours.append(step(IDS, IDS).clone())
        if device == "cpu":  # on a GPU the step is captured once, then replayed
            assert len(formed) == 8  # four groups of two blocks
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=2e-4, atol=0)
    assert ours[-1] < ours[0] - 0.1
    shapes = [p.shape for p in model.parameters()]
    assert shapes == [p.shape for p in other.parameters()]  # m is still [out]
    compiled.undo()
    torch.testing.assert_close(run(model)[0], run(other)[0], rtol=2e-4, atol=0)


def test_switching_adapters_new_base_weights_and_a_change_of_m(device):
    model = adapted(device, names="ab")
    mmpeft.use(model, "b")
    want = run(model)
    mmpeft.use(model, "a")
    with mmpeft.compile(model, out=io.StringIO()) as compiled:
        first = run(model)
        mmpeft.use(model, "b")
        same(run(model), want)
        mmpeft.use(model, "a")
        same(run(model), first)
        model.load_state_dict({k: v * 1.7 if "o_proj.weight" in k else v for k, v in model.state_dict().items()})
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(".m") and "down_proj" in name:
                    p.mul_(0.5)
        ours = run(model)
        assert compiled.decoders[0].calls["own"] == 0
    same(ours, run(model))


def test_dropout_changes_the_low_rank_input_alone(device):
    model = adapted(device, {k: mmpeft.DoRA(rank=3, alpha=6, dropout=0.3) for k in EVERYWHERE})
    with mmpeft.compile(model, out=io.StringIO()):
        first, again = run(model)[0], run(model)[0]
        assert first != again
        model.eval()
        ours = run(model)
    same(ours, run(model))


@pytest.mark.parametrize("swept", [True, False])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_gradients_with_dropout(backend, swept, device, monkeypatch):
    """y = g (x W^T + s drop(x) A^T B^T) + b with g = m / ||W + s B A|| detached, one mask a group: autograd's gradients."""
    if not swept:
        monkeypatch.setattr(sweep_plan, "plan", lambda *_: None)
    model = adapted(device, names="", num_hidden_layers=1, attention_bias=True).requires_grad_(False)

    def make(*shape):
        return nn.Parameter(0.3 * torch.randn(*shape, device=device))

    place = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
    linears = {n: m for n, m in model.named_modules() if n.split(".")[-1] in place}
    pairs = {
        n: fuse.LowRank(make(3, m.in_features), make(m.out_features, 3), 0.7, nn.Parameter(0.5 + torch.rand(m.out_features).to(device)))
        for n, m in linears.items()
    }  # fmt: skip
    masters = [t for a in pairs.values() for t in (a.A, a.B, a.m)]
    ids = IDS.to(device)
    with dispatch.backend(backend):
        fused = fuse.from_model(model, pairs, dropout=0.3)
        seed = fused.seed.clone()
        loss = fused.loss(ids, ids)
        ours = torch.autograd.grad(loss, masters)
    for name, m in linears.items():
        a = pairs[name]
        at, factor = seed + place[name.split(".")[-1]], a.m / (m.weight + a.scale * a.B @ a.A).norm(dim=1).detach()

        def forward(x, m=m, a=a, g=factor, at=at):
            z = reference.lowrank_linear(x, m.weight, None, a.A, a.B, a.scale, dropout_p=0.3, seed=at)
            return g * z if m.bias is None else g * z + m.bias

        m.forward = forward
    want = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    for a, b in zip(ours, torch.autograd.grad(want, masters), strict=True):
        assert (a - b).norm() <= 5e-4 * b.norm() + 1e-7


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_the_matrix_that_is_multiplied(backend, dtype, device):
    torch.manual_seed(2)

    def make(*shape):
        return torch.randn(*shape).to(device)

    Ws = [make(n, 24).to(dtype) for n in (37, 5, 40)]
    group = PackedGroup(Ws, None, [3, 0, 20], [0.7, 1.0, 2.0])
    As, Bs = [make(3, 24), None, make(20, 24)], [make(37, 3), None, make(40, 20)]
    group.refresh(As, Bs)
    ms = [torch.rand(n).to(device) + 0.5 for n in (37, 40)]
    made = Magnitude(group, [True, False, True])
    with dispatch.backend(backend):
        made.form(group, ms)
    merged = group.W.double() + group.B.double() @ group.A.double()
    norm = merged.norm(dim=1)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(made.scaling.factor[:37].double(), ms[0] / norm[:37], rtol=tolerance, atol=0)
    torch.testing.assert_close(made.scaling.factor[42:].double(), ms[1] / norm[42:], rtol=tolerance, atol=0)
    assert (made.scaling.factor[37:42] == 1).all()
    flat = torch.full((90,), 3.0, device=device)
    made.start = 5
    made.store(torch.ones(82, device=device), flat, accumulate=True)
    torch.testing.assert_close(flat[5:82].double() - 3, 1 / torch.cat([norm[:37], norm[42:]]), rtol=tolerance, atol=1e-5)
    assert (flat[:5] == 3).all() and (flat[82:] == 3).all()
    assert magnitude._joined([(0, 2), (2, 5), (6, 7)]) == [(0, 5), (6, 7)]


def test_a_model_whose_adapters_are_not_attached_is_proved_by_its_base(device):
    model = adapted(device, names="")
    pairs = {
        n: fuse.LowRank(*(nn.Parameter(torch.randn(s, device=device)) for s in ((3, m.in_features), (m.out_features, 3))), 1.0,
                        nn.Parameter(torch.rand(m.out_features, device=device)))
        for n, m in model.requires_grad_(False).named_modules() if n.endswith("v_proj")
    }  # fmt: skip
    fused = fuse.from_model(model, pairs)
    assert fused.numel == sum(t.numel() for a in pairs.values() for t in (a.A, a.B, a.m))
    assert not (fused.scaled[0][0].magnitude.scaling.factor == 1).all()
