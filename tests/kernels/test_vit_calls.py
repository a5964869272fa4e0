"""Which calls of a tower run fused, replayed or on the blocks' own forwards: hooks, masks, checkpoints, switches."""

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.adapters.compiled import towers

from .vit_kit import (
    MODELS,
    adapted,
    made,
    open_clip,
    quiet,
    run,
    same,
    siglip,
    timm_scaled,
    tokens,
    transformers,
    vit,
)


def test_hidden_states_attentions_and_hooks(device):
    model, x = adapted(siglip, device)
    with torch.no_grad():
        wanted = model(x, output_hidden_states=True).hidden_states
        compiled = quiet(model)
        (stack,) = compiled.stacks
        got = model(x, output_hidden_states=True).hidden_states  # transformers' recorders stay on the modules for good
        assert len(got) == len(wanted) == 4 and stack.calls == {"fused": 3, "own": 0}
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        handle = model.encoder.layers[1].mlp.fc1.register_forward_hook(lambda m, args, y: 2 * y)
        hooked = tokens(model, x)
        assert stack.calls == {"fused": 5, "own": 1} and stack.reasons == {"hooks inside a block"}
        handle.remove()
        want = model.post_layernorm(wanted[-1])
        assert (hooked - want).norm() > 1e-2 * want.norm()
        torch.testing.assert_close(tokens(model, x), want, rtol=1e-4, atol=1e-4)
        assert stack.calls == {"fused": 8, "own": 1}
        model.config._attn_implementation = "eager"
        attentions = model(x, output_attentions=True).attentions
        assert len(attentions) == 3 and "called with output_attentions" in stack.reasons


def test_a_hook_on_a_block_of_a_sequential_sees_the_block(device):
    model, x = adapted(timm_scaled, device)
    seen = []
    model.blocks[1].register_forward_hook(lambda m, args, y: seen.append(y.detach()))
    want = run(model, x)
    compiled = quiet(model)
    same(run(model, x), want)
    torch.testing.assert_close(seen[-1], seen[0], rtol=1e-4, atol=1e-4)
    assert compiled.stacks[0].calls == {"fused": 3, "own": 0}


def test_ragged_pictures_of_siglip2():
    config = transformers.Siglip2VisionConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, patch_size=4, num_patches=25, intermediate_size=40,
        vision_use_head=False,
    )  # fmt: skip
    model, _ = made(lambda: transformers.Siglip2VisionModel(config))
    patches, whole, ragged = torch.randn(2, 25, 48), torch.tensor([[5, 5]] * 2), torch.tensor([[5, 5], [4, 5]])
    with torch.no_grad():
        for shapes in (whole, ragged):
            mask = (torch.arange(25) < shapes.prod(1)[:, None]).long()
            want = model(patches, mask, shapes).last_hidden_state
            with quiet(model) as compiled:
                got = model(patches, mask, shapes).last_hidden_state
                (stack,) = compiled.stacks
                assert stack.calls == ({"fused": 2, "own": 0} if shapes is whole else {"fused": 0, "own": 2})
                assert stack.reasons == (set() if shapes is whole else {"called with attention_mask"})
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_checkpointing_goes_to_the_blocks_own_forward(device):
    model, x = adapted(siglip, device)
    want = run(model, x)
    compiled = quiet(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.encoder.layers:
        layer.training = True
    same(run(model, x), want)
    assert compiled.stacks[0].calls["fused"] == 0 and "gradient checkpointing is on" in compiled.stacks[0].reasons


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_single_blocks(reentrant, device):
    from torch.utils.checkpoint import checkpoint

    model, _ = adapted(siglip, device)
    x = torch.randn(2, 7, 24).to(device).requires_grad_()
    blocks = model.encoder.layers
    trained = [p for p in model.parameters() if p.requires_grad]

    def grads(wrap):
        y = x
        for block in blocks:
            y = checkpoint(block, y, None, use_reentrant=reentrant) if wrap else block(y, None)
        y.square().sum().backward()
        found = [x.grad, *(p.grad for p in trained)]
        x.grad = None
        model.zero_grad()
        return found

    want = grads(False)
    quiet(model)
    for a, b in zip(grads(True), want, strict=True):
        assert (a - b).norm() <= 5e-4 * b.norm()


def test_masks_and_dropout_of_the_blocks_own(device):
    model, _ = adapted(siglip, device)
    x, layer = torch.randn(2, 7, 24).to(device), model.encoder.layers[1]
    mask = torch.zeros(2, 1, 7, 7).masked_fill(torch.arange(7) > 4, float("-inf")).to(device)
    want = layer(x, mask).detach()
    compiled = quiet(model)
    torch.testing.assert_close(layer(x, mask).detach(), want)
    assert compiled.stacks[0].reasons == {"called with attention_mask"}
    model, _ = adapted(vit, device)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.5
    compiled = quiet(model)
    model.layers[0](x)
    assert compiled.stacks[0].calls == {"fused": 1, "own": 0}
    model.layers[0].dropout.training = True
    model.layers[0](x)
    assert "dropout of its own in training" in compiled.stacks[0].reasons


def test_switching_dropout_and_training(device):
    model, x = adapted(siglip, device, names="ab", dropout=0.3)
    with torch.no_grad():
        wanted = {}
        for use in "ab":
            mmpeft.use(model, use)
            wanted[use] = tokens(model.eval(), x)
        compiled = quiet(model)
        for use in "aba":
            mmpeft.use(model, use)
            torch.testing.assert_close(tokens(model, x), wanted[use], rtol=1e-4, atol=1e-4)
        assert compiled.stacks[0].calls["own"] == 0
        model.train()
        first, second = tokens(model, x), tokens(model, x)
        assert not torch.allclose(first, second, atol=1e-3)
    model.eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    curve = []
    for _ in range(3):
        loss = tokens(model, x).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    assert curve[2] < curve[1] < curve[0]


def test_loaded_biases_are_noticed(device):
    model, x = made(siglip, device)
    compiled = quiet(model)
    model.load_state_dict({k: v + 0.3 if "q_proj.bias" in k else v for k, v in model.state_dict().items()})
    with torch.no_grad():
        fused = tokens(model, x)
        assert compiled.stacks[0].calls == {"fused": 3, "own": 0}
        compiled.undo()
        torch.testing.assert_close(fused, tokens(model, x), rtol=1e-4, atol=1e-4)


def test_an_adapter_attached_after_compile_acts(device):
    for builder in (siglip, timm_scaled):
        model, x = made(builder, device)
        compiled = quiet(model)
        before = tokens(model, x)
        mmpeft.attach(model, {MODELS[builder]: mmpeft.LoRA(rank=2)}, check=False)
        for p in model.parameters():
            p.data += torch.randn_like(p) if p.requires_grad else 0
        got = run(model, x)
        assert any("attached since" in why for why in compiled.stacks[0].reasons)
        assert (got[0] - before).norm() > 0.01 * before.norm()
        compiled.undo()
        same(got, run(model, x))


class Replays:
    """In place of `Graphed`: counts the calls that a GPU would replay."""

    def __init__(self, fn):
        self.fn, self.keys = fn, []

    def __call__(self, *args, key, **kwargs):
        assert not torch.is_grad_enabled()
        self.keys.append(key)
        return self.fn(*args, **kwargs)


@pytest.mark.parametrize("builder", [siglip, timm_scaled, open_clip])
def test_when_a_tower_is_replayed(monkeypatch, builder):
    monkeypatch.setattr(towers, "Graphed", Replays)

    def captured(model):
        compiled = quiet(model, towers=False)
        (stack,) = compiled.stacks
        towers.apply(model, compiled, graphs=True, devices=("cpu",), fused={id(stack.module)})
        assert "around the fused blocks; CUDA graphs" in str(compiled)
        fast = next(m.__dict__["forward"].fast for _, m, _ in towers.find(model))
        return compiled, stack, fast.graphed.keys

    model, x = made(builder)
    want = tokens(model, x)
    compiled, stack, keys = captured(model)
    torch.testing.assert_close(tokens(model, x), want, rtol=1e-4, atol=1e-4)  # frozen: no gradient can flow
    assert len(keys) == 1 and stack.calls["own"] == 0
    tokens(model, x.clone().requires_grad_())
    assert len(keys) == 1
    handle = stack.blocks[1].register_forward_hook(lambda m, args, y: None)
    torch.testing.assert_close(tokens(model, x), want, rtol=1e-4, atol=1e-4)
    handle.remove()
    assert len(keys) == 1  # a replay would not call the hook
    compiled.undo()

    model, x = adapted(builder, names="ab", dropout=0.0 if builder is open_clip else 0.1)
    wanted = {}
    with torch.no_grad():
        for use in "ab":
            mmpeft.use(model, use)
            wanted[use] = tokens(model, x)
        compiled, stack, keys = captured(model)
        for use in "ab":
            mmpeft.use(model, use)
            torch.testing.assert_close(tokens(model, x), wanted[use], rtol=1e-4, atol=1e-4)
        assert len(keys) == 2
    assert tokens(model, x).requires_grad and len(keys) == 2
    with torch.no_grad():
        model.train()
        tokens(model, x)
    assert len(keys) == (3 if builder is open_clip else 2)  # dropout draws anew at every call
