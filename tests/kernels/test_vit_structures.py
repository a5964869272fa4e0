"""ViT blocks of every library run on the fused blocks, frozen and with adapters, at any layer; what does not fit is said."""

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.encoders import load_encoder
from mmpeft.kernels import dispatch
from mmpeft.kernels.vit_parts import parts_of

from .vit_kit import MODELS, adapted, clip, dinov2, made, quiet, run, same, siglip, tokens


@pytest.mark.parametrize("builder", MODELS)
def test_a_frozen_tower(builder, device):
    model, x = made(builder, device)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    want = run(model, x)
    compiled = quiet(model)
    assert "3 fused ViT blocks, frozen" in str(compiled)
    (stack,) = compiled.stacks
    with torch.no_grad():
        torch.testing.assert_close(tokens(model, x), want[0], rtol=1e-4, atol=1e-4)
        whole = isinstance(stack.module, nn.Sequential)
        assert stack.calls == {"fused": 1 if whole else 3, "own": 0}
        torch.testing.assert_close(tokens(model, x[:1]), want[0][:1], rtol=1e-4, atol=1e-4)
    assert not tokens(model, x).requires_grad  # nothing is kept where no gradient can flow
    same(run(model, x), want)  # and one flows through to a prompt before the tower
    assert stack.calls["own"] == 0
    compiled.undo()
    same(run(model, x), want)
    assert all(torch.equal(v, state[k]) and v.is_contiguous() for k, v in model.state_dict().items())
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("builder", MODELS)
def test_output_and_every_gradient_with_adapters(builder, device):
    model, x = adapted(builder, device)
    want = run(model, x)
    compiled = quiet(model)
    assert "3 fused ViT blocks, adapter 'a'" in str(compiled)
    same(run(model, x), want)
    assert compiled.stacks[0].calls["own"] == 0 and compiled.stacks[0].calls["fused"] > 0
    with mmpeft.use(model, None):
        base = tokens(model, x)
        assert compiled.stacks[0].calls["own"] > 0 and not torch.allclose(base, want[0], atol=1e-2)
    same(run(model, x), want)
    compiled.undo()
    same(run(model, x), want)


def test_the_kernels(backend, device):
    model, x = adapted(clip, device)
    with dispatch.backend("reference"):
        want = run(model, x[:1])
    quiet(model)
    same(run(model, x[:1]), want, rtol=2e-4)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "quick_gelu", "gelu_pytorch_tanh", "gelu_fast"])
def test_the_activation_is_told_by_what_it_computes(act, device):
    kind = {"gelu": "none", "quick_gelu": "quick"}.get(act, "tanh")
    model, x = made(lambda: siglip(act), device)
    assert parts_of(model.encoder.layers[0], "0", set()).gelu == kind
    with torch.no_grad():
        want = tokens(model, x)
        quiet(model)
        torch.testing.assert_close(tokens(model, x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", [None, MODELS[siglip]])
@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_the_encoder_at_another_layer(tmp_path, layer, plan, device):
    siglip().config.save_pretrained(tmp_path)
    encoder = load_encoder(f"random:hf:{tmp_path}", layer=layer, image_size=20).to(device)
    x = torch.randn(2, 3, 20, 20).to(device)
    if plan is not None:
        mmpeft.attach(encoder, {f"backbone.{plan}": mmpeft.LoRA(rank=2)}, check=False)
        for p in encoder.parameters():
            p.data += 0.2 * torch.randn_like(p) if p.requires_grad else 0
    want = encoder(x)[0]
    with quiet(encoder) as compiled:
        assert f"{(layer % 3) + 1} fused ViT blocks" in str(compiled)
        torch.testing.assert_close(encoder(x)[0], want, rtol=1e-4, atol=1e-4)
        assert compiled.stacks[0].calls == {"fused": layer % 3 + 1, "own": 0}
        assert encoder(x)[0].requires_grad == (plan is not None)
    torch.testing.assert_close(encoder(x)[0], want)


def test_timm_encoders_run_block_by_block(device):
    encoder = load_encoder("random:timm:vit_tiny_patch16_224", layer=2, image_size=32).to(device)
    x = torch.randn(2, 3, 32, 32).to(device)
    want = encoder(x)[0]
    with quiet(encoder) as compiled:
        torch.testing.assert_close(encoder(x)[0], want, rtol=1e-4, atol=1e-4)
        assert compiled.stacks[0].calls == {"fused": 3, "own": 0}


class Nested(nn.Module):
    """A block in BERT's layout, as transformers 5.17 has DINOv2: q, k, v one module deeper, the output under another."""

    def __init__(self, width=24, heads=3):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.ModuleDict({
            "attention": nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")}),
            "output": nn.ModuleDict({"dense": nn.Linear(width, width)}),
        })  # fmt: skip
        self.attention["attention"].num_attention_heads = heads
        self.mlp = nn.Sequential()
        for name, part in (("fc1", nn.Linear(width, 40)), ("activation", nn.GELU()), ("fc2", nn.Linear(40, width))):
            self.mlp.add_module(name, part)

    def forward(self, x):
        inner, n = self.attention["attention"], self.norm1(x)
        q, k, v = (m(n).unflatten(-1, (inner.num_attention_heads, -1)).transpose(1, 2) for m in inner.values())
        o = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attention["output"]["dense"](o)
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("plan", [None, "*.{attention,mlp}.**.{query,value,dense,fc1,fc2}"])
def test_attention_one_module_deeper(device, plan):
    torch.manual_seed(0)
    model, x = nn.Sequential(Nested(), Nested()).requires_grad_(False).to(device), torch.randn(2, 7, 24).to(device)
    if plan is not None:
        mmpeft.attach(model, {plan: mmpeft.LoRA(rank=2)}, example=x)
        for p in model.parameters():
            p.data += 0.2 * torch.randn_like(p) if p.requires_grad else 0
    want = run(model, x)
    with quiet(model) as compiled:
        same(run(model, x), want)
        assert compiled.stacks[0].calls == {"fused": 1, "own": 0}
        assert plan is None or len(compiled.stacks[0].fused.masters) == 2 * 2 * 5
    same(run(model, x), want)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def test_what_does_not_fit_is_said_in_one_line():
    cases = [
        (lambda m: setattr(m.encoder.layers[1].mlp, "activation_fn", nn.ReLU()), "computes no GELU"),
        (lambda m: setattr(m.encoder.layers[1].mlp, "activation_fn", nn.GELU()), "blocks that differ in"),
        (lambda m: setattr(m.encoder.layers[1].mlp, "fc2", nn.Sequential(m.encoder.layers[1].mlp.fc2, Twice())),
         "1.mlp.fc2 is a Sequential, not a Linear"),
        (lambda m: setattr(m.encoder.layers[1].self_attn, "scale", 0.3), "blocks that differ in"),
        (lambda m: setattr(m.encoder.layers[0], "extra", nn.Parameter(torch.ones(2))), "a plain ViT block has not"),
        (lambda m: m.encoder.layers[2].mlp.fc1.requires_grad_(True), "requires a gradient; the fused blocks' base"),
    ]  # fmt: skip
    for change, why in cases:
        model, x = made(siglip)
        change(model)
        with torch.no_grad():
            want = tokens(model, x)
            report = str(quiet(model))
            lines = [line for line in report.splitlines() if line.startswith("off  blocks encoder.layers")]
            assert len(lines) == 1 and why in lines[0], report
            torch.testing.assert_close(tokens(model, x), want)


def test_a_changed_residual_is_seen_by_the_comparison():
    model, x = made(dinov2)
    model.encoder.layer[1].layer_scale2 = Twice()
    places = {p.untyped_storage().data_ptr() for p in model.parameters()}
    report = str(quiet(model))
    assert "differ from the stack's own" in report
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(places)  # q, k and v lie apart again


def test_one_adapter_of_another_kind_is_refused_and_runs_as_before():
    model, x = adapted(siglip, plan={MODELS[siglip]: mmpeft.LoRA(rank=2), "encoder.layers.1.mlp.fc1": mmpeft.IA3()})
    want = run(model, x)
    assert "ia3 is not a plain" in str(quiet(model))
    same(run(model, x), want)
