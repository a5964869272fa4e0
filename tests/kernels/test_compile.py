"""`mmpeft.compile`: the same losses and gradients as before it, a report that says what and why, and no trace after it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.adapters.compiled import towers
from mmpeft.adapters.compiled.graphs import Graphed
from mmpeft.errors import ConfigError, Unsupported

transformers = pytest.importorskip("transformers")

PLAN = {"model.layers.*.{self_attn,mlp}.*_proj": mmpeft.LoRA(rank=3, alpha=6)}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
LABELS = torch.where(torch.arange(7) < 3, -100, IDS)


def llama(device="cpu", kind="Llama", **extra):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
             "intermediate_size": 56, "vocab_size": 101}  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes | extra)).to(device)


def adapted(model, plan=None, names=("a",)):
    for name in names:
        mmpeft.attach(model, plan or PLAN, name=name)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator).to(p)
    mmpeft.use(model, names[0])
    return model


def quiet(model, **options):
    return mmpeft.compile(model, out=io.StringIO(), **options)


def batch(model):
    return {"input_ids": IDS.to(model.device), "labels": LABELS.to(model.device)}


def run(model):
    """(loss, gradients of what is trained and active)."""
    model.zero_grad()
    loss = model(**batch(model)).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=0)
    assert len(one[1]) == len(other[1]) > 0
    for a, b in zip(one[1], other[1], strict=True):
        assert (a - b).norm() <= 5e-4 * b.norm() + 1e-7


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_loss_and_gradients_equal_and_undo(kind, device, capsys):
    model = adapted(llama(device, kind))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    want = run(model)
    compiled = mmpeft.compile(model)
    report = capsys.readouterr().out
    assert "on   decoder model" in report and "2 fused blocks, adapter 'a'" in report
    assert ("off  graphs" in report and "CUDA graphs need a GPU" in report) == (device == "cpu")
    same(run(model), want)
    assert model(**batch(model)).logits is None
    assert compiled.decoders[0].calls == {"fused": 3, "own": 0} or compiled.decoders[0].calls["own"] == 0
    compiled.undo()
    compiled.undo()
    same(run(model), want)
    assert model(**batch(model)).logits is not None
    assert "forward" not in model.__dict__ | model.model.__dict__
    after = model.state_dict()
    assert all(torch.equal(after[k], v) and after[k].is_contiguous() for k, v in state.items())


def test_an_ordinary_optimizer_and_the_written_out_step_agree(device):
    losses = []
    for way in ("plain", "compiled", "step"):
        model = adapted(llama(device))
        optimizer = torch.optim.AdamW(mmpeft.parameter_groups(model, lr=1e-2, weight_decay=0.0))
        compiled = None if way == "plain" else quiet(model)
        step = compiled.train_step(batch=2, length=7, lr=1e-2) if way == "step" else None
        curve = []
        for _ in range(4):
            if step is not None:
                curve.append(float(step(IDS, LABELS)))
                continue
            curve.append(float(run(model)[0]))
            optimizer.step()
        losses.append(torch.tensor(curve))
        if compiled is not None:
            compiled.undo()
            assert float(model(**batch(model)).loss) == pytest.approx(float(run(model)[0]), rel=1e-5)
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-4, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=2e-4, atol=0)
    assert losses[0][-1] < losses[0][0] - 0.1


def test_a_switch_to_another_adapter_and_what_is_left_to_the_model(device):
    model = adapted(llama(device), names="ab")
    ids = IDS.to(device)

    def rows(*values):
        return torch.tensor(values, device=device)

    cases = {
        "b": lambda: model(input_ids=ids, use_cache=False).logits,
        "left": lambda: model(input_ids=ids, attention_mask=rows([0] * 2 + [1] * 5, [1] * 7), use_cache=False).logits[1],
        "packed": lambda: model(input_ids=ids, position_ids=rows(*[[0, 1, 2, 0, 1, 2, 3]] * 2), use_cache=False).logits,
        "elsewhere": lambda: model(input_ids=ids, position_ids=rows(*[[0, 1, 2, 9, 3, 4, 5]] * 2), use_cache=False).logits,
        "cache": lambda: model(input_ids=ids, use_cache=True).logits,
        "attentions": lambda: model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1],
        "right": lambda: model(
            input_ids=ids, attention_mask=rows([1] * 5 + [0] * 2, [1] * 7), use_cache=False
        ).logits[:, :5],
    }
    with torch.no_grad():
        wanted = {}
        for use in ("a", "b", None, ["a", "b"]):
            mmpeft.use(model, use)
            wanted[str(use)] = {name: case() for name, case in cases.items()}
        mmpeft.use(model, "a")
        compiled = quiet(model)
        decoder = compiled.decoders[0]
        for use in ("a", "b", None, ["a", "b"], "a"):
            mmpeft.use(model, use)
            for name, case in cases.items():
                before = decoder.calls["fused"]
                torch.testing.assert_close(case(), wanted[str(use)][name], rtol=1e-4, atol=1e-4)
                fused = use in ("a", "b") and name in ("b", "right", "packed")
                assert decoder.calls["fused"] - before == fused, (use, name)
    assert {"padding on the left", "a key/value cache is asked for", "called with output_hidden_states"} <= decoder.reasons
    compiled.undo()


def test_generation_is_the_same(device):
    model = adapted(llama(device))
    ids = IDS.to(device)
    config = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **config)
    with quiet(model):
        assert torch.equal(model.generate(ids, **config), want)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_mode_dropout_checkpointing_and_accumulation(dropout, device):
    model = adapted(llama(device), plan={k: mmpeft.LoRA(rank=3, alpha=6, dropout=dropout) for k in PLAN})
    model.train()
    plain = run(model)
    with quiet(model):
        first, again = run(model), run(model)
        if dropout:
            assert first[0] != again[0] and abs(first[0] - plain[0]) < 0.2 * plain[0]
            model.eval()
            assert run(model)[0] == run(model)[0]
        else:
            same(first, plain)
        model.zero_grad()
        (model(**batch(model)).loss + model(**batch(model)).loss).backward()  # two tapes
        if not dropout:
            for g, p in zip(plain[1], (p for p in model.parameters() if p.grad is not None), strict=True):
                torch.testing.assert_close(p.grad, 2 * g, rtol=1e-3, atol=1e-6)


def test_a_step_between_forward_and_backward_is_refused(device):
    model = adapted(llama(device))
    with quiet(model):
        loss = model(**batch(model)).loss
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_copies_and_pickles_have_their_own_forward(device):
    model = adapted(llama(device))
    want = run(model)
    with quiet(model) as compiled:
        other, read = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        before = dict(compiled.decoders[0].calls)
        for m in (other, read):
            m.model.layers[0].self_attn.q_proj._parameters["weight"].data.mul_(2)
            assert not torch.allclose(run(m)[0], want[0])
        assert compiled.decoders[0].calls == before
        same(run(model), want)


def test_moved_weights_and_loaded_ones_are_noticed(device):
    model = adapted(llama(device))
    with quiet(model) as compiled:
        state = {k: v * 1.5 if "q_proj.weight" in k else v for k, v in model.state_dict().items()}
        model.load_state_dict(state)
        ours = run(model)
        assert compiled.decoders[0].calls["own"] == 0
        model.double().float()
        same(run(model), ours)
        assert any("moved or cast" in r for r in compiled.decoders[0].reasons)


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ({"model.layers.*.mlp.*_proj": mmpeft.DoRA(rank=2, init_from="pissa")}, "dora is not a plain"),
        ({"model.layers.*.mlp.*_proj": mmpeft.LoRA(rank=2), "model.norm": "full"}, "full is not a plain"),
        ({"model.layers.*.mlp": mmpeft.Bottleneck(size=4)}, "is not a plain"),
    ],
)
def test_what_does_not_fit_is_said_and_runs_as_before(plan, why, device):
    model = adapted(llama(device), plan=plan)
    want = run(model)
    out = io.StringIO()
    with mmpeft.compile(model, out=out) as compiled:
        assert why in out.getvalue() and "off  decoder model" in out.getvalue()
        same(run(model), want)
        with pytest.raises(ConfigError, match="needs one fused decoder"):
            compiled.train_step(batch=2, length=7)


def test_adapters_on_embedding_and_head_act_beside_the_fused_blocks(device):
    plan = PLAN | {"model.embed_tokens": mmpeft.LoRA(rank=2), "lm_head": mmpeft.LoRA(rank=2)}
    model = adapted(llama(device, tie_word_embeddings=False), plan=plan)
    want = run(model)
    with quiet(model) as compiled:
        same(run(model), want)
        assert compiled.decoders[0].calls["fused"] > 0
        with pytest.raises(ConfigError, match="plain head"):
            compiled.train_step(batch=2, length=7)


def test_nothing_fits():
    model = nn.Sequential(nn.Linear(4, 4))
    out = io.StringIO()
    mmpeft.compile(model, out=out)
    assert out.getvalue().count("off") == 4 and "no Llama-type decoder" in out.getvalue()
    with pytest.raises(ConfigError, match="takes a module"):
        mmpeft.compile("model")
    assert "not asked for" in str(quiet(model, towers=False))


def vit():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    x = torch.randn(2, 3, 32, 32)
    mmpeft.attach(model, {"blocks.*.attn.qkv[q,v]": mmpeft.LoRA(rank=2), "head": "full"}, name="a", example=x)
    for p in model.parameters():
        p.data += 0.05 if p.requires_grad else 0
    return model, x


def test_towers_are_found_and_compiled_as_one_graph():
    model, x = vit()
    assert [(path, count) for path, _, count in towers.find(model)] == [("", 2)]
    assert not list(towers.find(llama()))
    want = model(x)
    grads = torch.autograd.grad(want.square().sum(), [p for p in model.parameters() if p.requires_grad])
    compiled = mmpeft.adapters.compiled.Compiled()
    towers.apply(model, compiled, graphs=True, backend="aot_eager", devices=("cpu",))
    y = model(x)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    again = torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])
    for a, b in zip(again, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
        with mmpeft.use(model, None):
            base = model(x)
        assert not torch.allclose(base, want)
    compiled.undo()
    assert "forward" not in model.__dict__ and "on   tower VisionTransformer" in str(compiled)
    assert "on cpu: compiled and captured on a GPU only" in str(quiet(model, blocks=False))
    assert "no stack of transformer blocks outside" not in str(quiet(model))  # its blocks run fused


def test_another_forward_in_place_is_not_overwritten():
    model, x = vit()
    model.forward = lambda x: x
    compiled = mmpeft.adapters.compiled.Compiled()
    towers.apply(model, compiled, graphs=False, backend="eager", devices=("cpu",))
    assert "has a forward of its own" in str(compiled) and model(x) is x


def test_graphed_runs_plainly_without_a_gpu():
    def fn(a, *, scale):
        return {"y": a * scale}

    graphed = Graphed(fn)
    x = torch.randn(3)
    torch.testing.assert_close(graphed(x, scale=2.0, key="k")["y"], 2 * x)
    assert not graphed.captures


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphed_replays_on_a_gpu():
    weight = torch.randn(4, 4, device="cuda")
    graphed = Graphed(lambda x: torch.tanh(x @ weight))
    with torch.no_grad():
        for n in (1, 2, 1):
            x = torch.randn(n, 4, device="cuda")
            first = graphed(x)
            weight.mul_(1.5)  # read where it lies
            torch.testing.assert_close(graphed(x), torch.tanh(x @ weight))
            assert not torch.equal(first, graphed(x))
    assert len(graphed.captures) == 2


def test_a_decoder_alone(device):
    torch.manual_seed(0)
    lm = llama(device)
    decoder = lm.model
    mmpeft.attach(decoder, {"layers.*.self_attn.*_proj": mmpeft.LoRA(rank=2)}, name="a",
                  example={"input_ids": IDS.to(device)})  # fmt: skip
    x = torch.randn(2, 5, 48).to(device)
    with torch.no_grad():
        want = decoder(inputs_embeds=x, use_cache=False)[0]
        with quiet(decoder) as compiled:
            torch.testing.assert_close(decoder(inputs_embeds=x, use_cache=False)[0], want, rtol=1e-4, atol=1e-4)
            assert compiled.decoders[0].calls["fused"] == 1


def test_two_active_adapters_are_refused_with_the_remedy(device):
    model = adapted(llama(device), names="ab")
    mmpeft.use(model, ["a", "b"])
    assert "needs exactly one active adapter" in str(quiet(model))
    with pytest.raises(Unsupported, match="exactly one"):
        from mmpeft.adapters.compiled.llama import FusedDecoder

        FusedDecoder(model, "model", model.model, check=True)
