"""The written-out Llama step equals autograd through the transformers model with the same adapters."""

import pytest
import torch
from torch import nn

from mmpeft.errors import ConfigError, NameNotFound, Unsupported
from mmpeft.kernels import fuse, fused_ops, reference, sweep_plan
from mmpeft.kernels.step import TrainStep

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 56,
    "vocab_size": 101,
}
RANKS = {"q_proj": 3, "k_proj": 2, "v_proj": 1, "o_proj": 16, "gate_proj": 3, "up_proj": 5, "down_proj": 2}
SKIPPED = "model.layers.1.self_attn.k_proj"  # a linear without an adapter


def llama(device, kind="Llama", **extra):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **extra})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(device).requires_grad_(False)
    for name, p in model.named_parameters():
        if "bias" in name:
            p.data.normal_()
        if "norm" in name:
            p.data.uniform_(0.5, 1.5)
    found = {}
    for name, m in model.named_modules():
        r = RANKS.get(name.split(".")[-1])
        if r and name != SKIPPED:
            A, B = (torch.randn(*s, device=device) * 0.2 for s in ((r, m.in_features), (m.out_features, r)))
            found[name] = fuse.LowRank(nn.Parameter(A), nn.Parameter(B), 0.7)
    return model, found


def adapted(model, found):
    """The same adapters through the modules' own forward: the oracle."""
    for name, a in found.items():
        m = model.get_submodule(name)
        m.forward = lambda x, m=m, a=a: reference.lowrank_linear(x, m.weight, m.bias, a.A, a.B, a.scale)
    return model


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])  # without and with biases on q, k, v
def test_loss_and_every_gradient(backend, device, kind):
    model, found = llama(device, kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fused = fuse.from_model(model, found, tolerance=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    ids = torch.randint(0, 101, (2, 9), device=device)
    labels = ids.clone()
    labels[0, :4] = -100
    inputs = fused.embedding[ids].clone().requires_grad_()
    masters = [t for a in found.values() for t in (a.A, a.B)]
    loss = fused.loss(None, labels, inputs=inputs)
    ours = torch.autograd.grad(3 * loss, [inputs, *masters])
    want = adapted(model, found)(inputs_embeds=inputs, labels=labels).loss
    theirs = torch.autograd.grad(3 * want, [inputs, *masters])
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 5e-4 * b.norm() + 1e-7
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.9999


def test_a_model_with_mmpeft_adapters_attached(device):
    """The engine's own LoRA: its masters are the fused step's, in place, so the attached model follows the training."""
    import mmpeft

    model, _ = llama(device)
    mmpeft.attach(model, {"model.layers.*.{self_attn,mlp}.*_proj": mmpeft.LoRA(rank=4, alpha=8)}, name="task")
    pairs = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.2)
            path, _, kind = name.rpartition(".")
            pairs.setdefault(
                next(
                    n for n, m in model.named_modules() if n and path.startswith(f"{n}.") and isinstance(m, nn.Linear)
                ),
                {},
            )[kind] = p
    assert len(pairs) == 14
    found = {path: fuse.LowRank(ab["A"], ab["B"], 2.0) for path, ab in pairs.items()}
    fused = fuse.from_model(model, found, attached=True, tolerance=1e-5)
    ids = torch.randint(0, 101, (2, 9), device=device)
    masters = [t for a in found.values() for t in (a.A, a.B)]
    own = model(input_ids=ids, labels=ids).loss
    for a, b in zip(torch.autograd.grad(fused.loss(ids, ids), masters), torch.autograd.grad(own, masters), strict=True):
        assert (a - b).norm() <= 5e-4 * b.norm() + 1e-7
    step = TrainStep(fused, fused.optimizer(lr=1e-2), batch=2, length=9)
    for _ in range(3):
        step(ids, ids)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, step(ids, ids), rtol=1e-5, atol=0)


def test_head_on_supervised_rows_only(backend, device):
    model, found = llama(device)
    fused = fuse.from_model(model, found)
    ids = torch.randint(0, 101, (2, 9), device=device)
    labels = torch.where(torch.arange(9, device=device) >= 6, ids, -100)
    rows = nn.functional.pad(labels[:, 1:] != -100, (0, 1)).flatten().nonzero()[:, 0]
    masters = [t for a in found.values() for t in (a.A, a.B)]
    everywhere = fused.loss(ids, labels)
    there = fused.loss(ids, labels, rows=rows)
    torch.testing.assert_close(there, everywhere)
    for a, b in zip(torch.autograd.grad(there, masters), torch.autograd.grad(everywhere, masters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def masked(model, found, p, seed):
    """The same adapters and masks through the modules' own forward: one mask for the linears of a group."""
    place = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
    for name, a in found.items():
        m, group = model.get_submodule(name), place[name.split(".")[-1]]
        at = seed + 4 * int(name.split(".")[2]) + group
        m.forward = lambda x, m=m, a=a, at=at: reference.lowrank_linear(
            x, m.weight, m.bias, a.A, a.B, a.scale, dropout_p=p, seed=at
        )
    return model


@pytest.mark.parametrize(
    "backend,swept",  # the MLP's backward in one sweep, or kernel by kernel
    [("triton", True), ("triton", False), ("reference", False)],
    indirect=["backend"],
)
def test_dropout_masks_agree_between_forward_and_backward(backend, device, swept, monkeypatch):
    """Loss and every gradient, the inputs' too, equal autograd's with the masks of seed + 4 block + group; added twice, twice."""
    if not swept:
        monkeypatch.setattr(sweep_plan, "plan", lambda *_: None)
    model, found = llama(device)
    fused = fuse.from_model(model, found, dropout=0.3)
    ids = torch.randint(0, 101, (2, 9), device=device)
    inputs = fused.embedding[ids].clone().requires_grad_()
    masters = [t for a in found.values() for t in (a.A, a.B)]
    seed = fused.seed.clone()
    loss, tape = fused.forward(inputs.detach(), ids)
    assert fused.seed != seed
    flat, twice = torch.empty(fused.numel, device=device), torch.empty(fused.numel, device=device)
    dx = fused.backward(tape, flat, need_dx=True)
    for accumulate in (False, True):  # a re-entered forward draws the same masks; without dx, block 0 rebuilds its norm
        fused.seed.copy_(seed)
        fused.backward(fused.forward(inputs.detach(), ids)[1], twice, accumulate=accumulate)
    torch.testing.assert_close(twice, 2 * flat, rtol=1e-4, atol=1e-6)
    want = masked(model, found, 0.3, seed)(inputs_embeds=inputs, labels=ids).loss
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    *grads, dinputs = torch.autograd.grad(want, [*masters, inputs])
    theirs = dict(zip(map(id, masters), grads, strict=True))
    assert (dx - dinputs).norm() <= 5e-4 * dinputs.norm()
    at = 0
    for master in fused.masters:
        got, exact = flat[at : at + master.numel()].view_as(master), theirs[id(master)]
        assert (got - exact).norm() <= 5e-4 * exact.norm() + 1e-7
        at += master.numel()


def test_another_mask_in_the_backward_is_seen(device):
    """The comparison above can fail: a backward with the mask of another site is far outside its tolerance."""
    model, found = llama(device)
    fused = fuse.from_model(model, found, dropout=0.3)
    x = fused.embedding[torch.randint(0, 101, (2, 9), device=device)]
    ids = torch.randint(0, 101, (2, 9), device=device)
    right, wrong = torch.empty(fused.numel, device=device), torch.empty(fused.numel, device=device)
    seed = fused.seed.clone()
    loss, tape = fused.forward(x, ids)
    fused.backward(tape, right, need_dx=True)
    assert not torch.equal(fused.forward(x, ids)[0], loss)  # the next forward draws other masks
    fused.seed.copy_(seed)
    same, tape = fused.forward(x, ids)
    tape.dropped = tape.dropped.at(1)
    fused.backward(tape, wrong, need_dx=True)
    assert torch.equal(same, loss) and (wrong - right).norm() > 0.05 * right.norm()


def test_gradients_accumulate_and_the_tape_is_used_once(device):
    model, found = llama(device)
    fused = fuse.from_model(model, found)
    ids = torch.randint(0, 101, (2, 9), device=device)
    x = fused.embedding[ids]
    once, twice = torch.empty(fused.numel, device=device), torch.empty(fused.numel, device=device)
    _, tape = fused.forward(x, ids)
    fused.backward(tape, once)
    with pytest.raises(ConfigError, match="freed on the way"):
        fused.backward(tape, once)
    for accumulate in (False, True):
        _, tape = fused.forward(x, ids)
        fused.backward(tape, twice, accumulate=accumulate)
    torch.testing.assert_close(twice, 2 * once, rtol=1e-4, atol=1e-6)


def test_train_step_follows_torch_adamw(backend, device):
    model, found = llama(device)
    fused = fuse.from_model(model, found)
    ids = torch.randint(0, 101, (2, 9), device=device)
    start = {name: (a.A.detach().clone(), a.B.detach().clone()) for name, a in found.items()}
    step = TrainStep(fused, fused.optimizer(lr=1e-2), batch=2, length=9)
    ours = [step(ids, ids).item() for _ in range(4)]
    again = {n: fuse.LowRank(*(nn.Parameter(t) for t in start[n]), found[n].scale) for n in found}
    optimizer = torch.optim.AdamW([t for a in again.values() for t in (a.A, a.B)], lr=1e-2, weight_decay=0.0)
    theirs = []
    for _ in range(4):
        loss = adapted(model, again)(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2e-4, atol=0)
    assert ours[-1] < ours[0] - 0.1
    with pytest.raises(ConfigError, match=r"this step was made for \(2, 9\)"):
        step(ids[:1], ids[:1])


def learnable(device, steps, batch=4, length=16):
    """A chain over 20 of 101 tokens, x -> 3 x + 1 mod 20 with one jump in eight: bigrams a small adapter can learn."""
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = [torch.randint(0, 20, (batch,), generator=g)]
        for _ in range(length - 1):
            jump = torch.rand(batch, generator=g) < 1 / 8
            rows.append(torch.where(jump, torch.randint(0, 20, (batch,), generator=g), (3 * rows[-1] + 1) % 20))
        yield torch.stack(rows, 1).to(device)


def readable(device):
    """A model whose random embedding and head are large enough for the adapters to steer."""
    model, found = llama(device, tie_word_embeddings=False)
    model.lm_head.weight.data.mul_(10)
    model.model.embed_tokens.weight.data.mul_(10)
    return model, found


def curve_of_ours(device, steps):
    model, found = readable(device)
    fused = fuse.from_model(model, found)
    step = TrainStep(fused, fused.optimizer(lr=1e-2), batch=4, length=16)
    return torch.stack([step(ids, ids).clone() for ids in learnable(device, steps)]).cpu()


def test_200_steps_on_learnable_data_and_a_broken_backward(device, monkeypatch):
    """The loss curve stays on that of autograd through the model; with a dropped residual gradient it does not."""
    steps = 200
    model, found = readable(device)
    optimizer = torch.optim.AdamW([t for a in found.values() for t in (a.A, a.B)], lr=1e-2, weight_decay=0.0)
    theirs = []
    for ids in learnable(device, steps):
        optimizer.zero_grad()
        loss = adapted(model, found)(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        theirs.append(loss.detach())
    theirs = torch.stack(theirs).cpu()
    assert theirs[-20:].mean() < 0.6 * theirs[:5].mean()  # it learns, so a wrong gradient shows

    def apart(ours):
        return float(((ours - theirs).abs() / theirs).mean())

    whole = apart(curve_of_ours(device, steps))
    monkeypatch.setattr(fused_ops, "rmsnorm_backward", without_residual(fused_ops.rmsnorm_backward))
    broken = apart(curve_of_ours(device, steps))
    assert whole <= 1e-3 and broken > 10 * whole and broken > 1e-2, (whole, broken)


def without_residual(whole):
    return lambda dn, x, rstd, w, g, out, n, *more: whole(dn, x, rstd, w, None, out, n, *more)


def test_a_broken_backward_is_seen(device, monkeypatch):
    """The comparison above can fail: a gradient that drops the residual path is far outside its tolerance."""
    monkeypatch.setattr(fused_ops, "rmsnorm_backward", without_residual(fused_ops.rmsnorm_backward))
    model, found = llama(device)
    fused = fuse.from_model(model, found)
    ids = torch.randint(0, 101, (2, 9), device=device)
    first = next(iter(found.values()))
    (ours,) = torch.autograd.grad(fused.loss(ids, ids), [first.A])
    (want,) = torch.autograd.grad(adapted(model, found)(input_ids=ids, labels=ids).loss, [first.A])
    assert (ours - want).norm() > 0.1 * want.norm()


def test_what_does_not_fit_is_refused_with_its_reason(device):
    model, found = llama(device)
    wrong = dict(found)
    wrong["model.layers.0.self_attn.q_prj"] = wrong.pop("model.layers.0.self_attn.q_proj")
    with pytest.raises(NameNotFound, match="nearest: model.layers.0.self_attn.q_proj"):
        fuse.from_model(model, wrong)
    with pytest.raises(ConfigError, match="nothing to train"):
        fuse.from_model(model, {})
    with pytest.raises(Unsupported, match="no Llama-type decoder"):
        fuse.from_model(nn.Linear(3, 3), found)
    trainable, found = llama(device)
    trainable.model.layers[1].input_layernorm.weight.requires_grad_()
    with pytest.raises(Unsupported, match="model.layers.1.input_layernorm.weight requires a gradient"):
        fuse.from_model(trainable, found)
    with pytest.raises(ConfigError, match="expected 0 <= dropout < 1"):
        fuse.from_model(*llama(device), dropout=1.0)
    qwen3, found = llama(device, "Qwen3", head_dim=16)
    with pytest.raises(Unsupported, match="parameters that a Llama block has not: self_attn.q_norm"):
        fuse.from_model(qwen3, found)
    scaled, found = llama(device, "Granite", residual_multiplier=0.5)
    with pytest.raises(Unsupported, match="not the same function"):
        fuse.from_model(scaled, found)
