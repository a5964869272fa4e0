"""All layers' keys and values in one product equal the layers' own: outputs, every gradient, adapters, compile, autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mmpeft
from mmpeft.connectors import PerceiverResampler, QFormer, shared_kv
from mmpeft.errors import NameNotFound

IN, OUT = 20, 14


def qformer(**options: object) -> nn.Module:
    sizes = {"num_queries": 5, "width": 24, "depth": 3, "heads": 4, "hidden_dim": 40}
    return QFormer(in_dim=IN, out_dim=OUT, **{**sizes, **options})


def perceiver(**options: object) -> nn.Module:
    return PerceiverResampler(in_dim=IN, out_dim=OUT, num_latents=5, depth=3, heads=2, head_dim=6, **options)


BUILD = {"qformer": qformer, "perceiver": perceiver}


@pytest.fixture(params=BUILD)
def connector(request) -> nn.Module:
    torch.manual_seed(0)
    module = BUILD[request.param]().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (0.5 if p.dim() == 1 else 0.0))
    return module


@pytest.fixture
def choose(monkeypatch):
    """choose(True): one product at any size; choose(False): never. Returns how often one product ran."""
    ran: list[int] = []
    linear = torch.nn.functional.linear

    def counted(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        ran.append(len(w))
        return linear(x, w, b)

    monkeypatch.setattr(shared_kv.F, "linear", counted)

    def set_to(on: bool) -> list[int]:
        monkeypatch.setattr(shared_kv, "pays", lambda *sizes, **passes: on)
        ran.clear()
        return ran

    return set_to


def features(batch: int = 3, tokens: int = 9) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(batch, tokens, IN), torch.arange(tokens) < torch.tensor([tokens, 4, 1])[:batch, None]


def run(connector: nn.Module, x: Tensor, mask: Tensor | None, *, grad: bool) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_(grad)
    connector.zero_grad()
    y, _ = connector(x, mask)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    found = {n: p.grad.clone() for n, p in connector.named_parameters() if p.grad is not None}
    return y.detach(), found | ({"x": x.grad} if grad else {})


def same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]], tolerance: float) -> None:
    assert (one[0] - other[0]).norm() <= tolerance * other[0].norm()
    assert one[1].keys() == other[1].keys() and len(one[1]) > 1
    for name, grad in other[1].items():
        noise = tolerance * 10 * max(g.norm() for g in other[1].values())  # a key's bias has no gradient but rounding
        assert (one[1][name] - grad).norm() <= tolerance * 10 * grad.norm() + noise * 1e-2, name


def shared(connector: nn.Module) -> list[nn.Linear]:
    """The linears that project the features."""
    if isinstance(connector, QFormer):
        attentions = [layer.cross_attention for layer in connector.core.layers[::2]]
        return [m for attention in attentions for m in (attention.key, attention.value)]
    return [layer.attention.to_kv for layer in connector.layers]


def width(connector: nn.Module) -> int:
    """Rows of their weights side by side."""
    return sum(m.out_features for m in shared(connector))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_outputs_and_every_gradient(connector, choose, masked, grad, dtype, tolerance) -> None:
    connector = connector.to(dtype)
    x, mask = features()
    x, mask = x.to(dtype), mask if masked else None
    choose(False)
    want = run(connector, x, mask, grad=grad)
    ran = choose(True)
    got = run(connector, x, mask, grad=grad)
    assert ran.count(width(connector)) == 1
    same(got, want, tolerance)
    with torch.no_grad():
        torch.testing.assert_close(connector(x, mask)[0], want[0], rtol=tolerance * 10, atol=tolerance * 10)


def test_the_state_dict_is_as_it_was(connector, choose) -> None:
    state = connector.state_dict()
    assert not any("shared" in name for name in state)
    other = copy.deepcopy(connector)
    for p in other.parameters():
        nn.init.zeros_(p)
    other.load_state_dict(state)
    choose(True)
    x, mask = features()
    assert torch.equal(other(x, mask)[0], connector(x, mask)[0])


def test_published_weights_still_equal_transformers(choose) -> None:
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    from mmpeft.connectors import load_qformer

    torch.manual_seed(1)
    sizes = {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Blip2QFormerConfig(**sizes, intermediate_size=40, cross_attention_frequency=2, encoder_hidden_size=IN)
    theirs = Blip2QFormerModel(config).eval()
    for p in theirs.parameters():
        p.data = torch.randn_like(p) * 0.3
    ours = qformer(depth=3).eval()
    load_qformer(ours, theirs.state_dict())
    ran = choose(True)
    x, mask = features()
    queries = torch.randn(3, 5, 24)
    want = theirs(query_embeds=queries, encoder_hidden_states=x, encoder_attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours.core(queries, x, mask), want, atol=1e-5, rtol=0)
    assert 4 * 24 in ran


QUERY, VALUE = {"qformer": "query", "perceiver": "to_q"}, {"qformer": "value", "perceiver": "to_kv"}
PLANS = {  # what is adapted -> (plan, whether one product is still possible)
    "all in full": (lambda kind: {"connector": "full"}, True),
    "one in full": (lambda kind: {f"connector.**.layers.2.**.{VALUE[kind]}": "full"}, True),
    "queries": (lambda kind: {f"connector.**.{QUERY[kind]}": mmpeft.LoRA(rank=2)}, True),
    "values": (lambda kind: {f"connector.**.layers.2.**.{VALUE[kind]}": mmpeft.LoRA(rank=2)}, False),
    "dropout": (lambda kind: {f"connector.**.{VALUE[kind]}": mmpeft.LoRA(rank=2, dropout=0.1)}, False),
    "bias": (lambda kind: {"connector.**.{key,value}": mmpeft.BitFit()}, True),
}


@pytest.mark.parametrize("plan", PLANS)
def test_adapters(connector, choose, plan) -> None:
    rules, one = PLANS[plan]
    kind = "qformer" if isinstance(connector, QFormer) else "perceiver"
    model = nn.ModuleDict({"connector": connector})
    if plan == "bias" and kind == "perceiver":  # its projections have none
        with pytest.raises(NameNotFound):
            mmpeft.attach(model, rules(kind), check=False)
        return
    mmpeft.attach(model, rules(kind), check=False)
    for p in model.parameters():
        p.data += torch.randn_like(p) if p.requires_grad else 0
    model.eval()
    x, mask = features()
    choose(False)
    want = run(connector, x, mask, grad=True)
    ran = choose(True)
    same(run(connector, x, mask, grad=True), want, 1e-5)
    assert (width(connector) in ran) == one
    with mmpeft.use(model, None):  # the base under a LoRA is read as a weight again
        ran = choose(True)
        base = connector(x, mask)[0]
        assert width(connector) in ran and (base - want[0]).norm() > 2e-4 * want[0].norm()
        choose(False)
        torch.testing.assert_close(base, connector(x, mask)[0], rtol=1e-4, atol=1e-4)


def test_hooks_on_a_projection_are_called(connector, choose) -> None:
    ran = choose(True)
    x, mask = features()
    seen: list[int] = []
    handle = shared(connector)[-1].register_forward_hook(lambda m, args, y: seen.append(len(y)))
    connector(x, mask)
    assert seen and width(connector) not in ran
    handle.remove()
    connector(x, mask)
    assert width(connector) in ran


def test_one_graph_under_compile(connector, choose) -> None:
    if not isinstance(connector, QFormer):  # one of the two with its own copies of the weights
        mmpeft.attach(connector, {"**": "full"}, check=False)
        connector.eval()
    x, mask = features()
    choose(False)
    want = run(connector, x, mask, grad=True)
    choose(True)
    torch._dynamo.reset()
    compiled = torch.compile(connector, backend="eager", fullgraph=True)
    y, _ = compiled(x, mask)
    torch.testing.assert_close(y, want[0], rtol=1e-4, atol=1e-4)
    connector.zero_grad()
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    for name, p in ((n, p) for n, p in connector.named_parameters() if p.requires_grad):
        assert (p.grad - want[1][name]).norm() <= 1e-4 * want[1][name].norm() + 1e-4, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(connector, choose, reentrant) -> None:
    x, mask = features()
    choose(True)
    want = run(connector, x, mask, grad=True)
    connector.zero_grad()
    again = x.clone().requires_grad_()
    y = checkpoint(lambda t: connector(t, mask)[0], again, use_reentrant=reentrant)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    same((y.detach(), {n: p.grad for n, p in connector.named_parameters()} | {"x": again.grad}), want, 1e-6)


def test_autocast(connector, choose) -> None:
    x, mask = features()
    with torch.autocast("cpu", torch.bfloat16):
        choose(False)
        want = run(connector, x, mask, grad=True)
        choose(True)
        got = run(connector, x, mask, grad=True)
    assert got[0].dtype == want[0].dtype
    choose(False)
    exact = run(connector, x, mask, grad=True)
    for name, grad in exact[1].items():
        ours, theirs = (float((r[1][name].float() - grad).norm()) for r in (got, want))
        assert got[1][name].dtype == want[1][name].dtype
        assert ours <= 2 * theirs + 1e-2 * float(max(g.norm() for g in exact[1].values())), name


def test_bf16_weights(connector, choose) -> None:
    x, mask = features()
    choose(False)
    exact = connector(x, mask)[0]
    half = copy.deepcopy(connector).to(torch.bfloat16)
    theirs = half(x, mask)[0].float()
    choose(True)
    ours = half(x, mask)[0].float()
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm() + 1e-2 * exact.norm()


def test_the_choice_by_size() -> None:
    def asked(connector: nn.Module, x: Tensor) -> tuple[dict[str, object], bool]:
        with pytest.MonkeyPatch.context() as patch:
            seen: list[tuple[dict[str, object], bool]] = []
            real = shared_kv.pays

            def note(rows: int, outputs: int, members: int, **passes: object) -> bool:
                answer = real(rows, outputs, members, **passes)  # type: ignore[arg-type]
                seen.append(({"rows": rows, "outputs": outputs, "members": members} | passes, answer))
                return answer

            patch.setattr(shared_kv, "pays", note)
            connector(x)
        return seen[0]

    x = torch.randn(2, 130, IN)
    size = {"rows": 260, "outputs": 96, "members": 4, "weight_passes": 2, "cached": True}
    blind = qformer(input_norm=False)
    assert asked(blind, x) == (size | {"feature_passes": 2}, False)
    assert asked(qformer(), x) == (size | {"feature_passes": 5}, False)
    size = {"rows": 260, "outputs": 72, "members": 3, "cached": True}
    assert asked(perceiver(), x) == (size | {"weight_passes": 8, "feature_passes": 7, "products": 1}, True)
    through = size | {"weight_passes": 8, "feature_passes": 11, "products": 0}
    assert asked(perceiver(), x.clone().requires_grad_()) == (through, False)
    with torch.no_grad():
        assert asked(perceiver(), x) == (size | {"weight_passes": 4, "feature_passes": 3, "products": 0}, False)
        assert asked(blind, x)[0]["feature_passes"] == 1


@pytest.mark.parametrize(
    ("rows", "passes", "pays"),
    [
        # BLIP-2 on a GPU: from two pictures of 257 tokens on in training, from seven on without gradients
        (257, {"weight_passes": 2, "feature_passes": 5}, False),
        (2 * 257, {"weight_passes": 2, "feature_passes": 5}, True),
        (6 * 257, {"weight_passes": 2, "feature_passes": 1}, False),
        (7 * 257, {"weight_passes": 2, "feature_passes": 1}, True),
        (9999, {"weight_passes": 2, "feature_passes": 5, "cached": True}, False),
        (255, {"weight_passes": 8, "feature_passes": 7, "products": 1, "cached": True}, False),
        (256, {"weight_passes": 8, "feature_passes": 7, "products": 1, "cached": True}, True),
    ],
)
def test_where_one_product_pays(rows, passes, pays) -> None:
    assert shared_kv.pays(rows, 9216, 12, **passes) is pays
