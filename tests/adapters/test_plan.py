"""Plans and patterns: what they mean, and every bad input refused before work, with the nearest valid value."""

from __future__ import annotations

import pytest
import torch
from cases import Attention, DirectRead, Host, Tied, _new_weight_norm, assert_same_object, deltas, fill, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mmpeft
from mmpeft.adapters.pattern import select
from mmpeft.adapters.plan import Plan, resolve
from mmpeft.errors import ConfigError, NameNotFound, Unsupported


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(6, 18), "proj": nn.Linear(6, 6)})
        self.mlp = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        q, k, v = self.attn["qkv"](self.norm(x)).chunk(3, -1)
        x = x + self.attn["proj"](nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.mlp(x)


class Tiny(nn.Module):
    def __init__(self, n=12):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.blocks = nn.ModuleList(Block() for _ in range(n))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = x + self.token
        for block in self.blocks:
            x = block(x)
        return self.head(x)


X = torch.randn(2, 3, 6)
LORA = mmpeft.LoRA(rank=2)


def sites(plan, model=None):
    return [t.site.name for t in resolve(model or Tiny(2), Plan.read(plan))]


# --- what a pattern means ---------------------------------------------------------------------------------------------

PATHS = [
    "a",
    "a.b",
    "a.b.c",
    "a.x.c",
    "a.b.x.c",
    "b.c",
    "layers.0.q",
    "layers.1.q",
    "layers.10.q",
    "layers.1.k",
    "head",
]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.b.c", ["a.b.c"]),
        ("a.*.c", ["a.b.c", "a.x.c"]),
        ("a.**.c", ["a.b.c", "a.x.c", "a.b.x.c"]),
        ("**.c", ["a.b.c", "a.x.c", "a.b.x.c", "b.c"]),
        ("a.**", ["a", "a.b", "a.b.c", "a.x.c", "a.b.x.c"]),
        ("layers.1*.q", ["layers.1.q", "layers.10.q"]),
        ("layers.{0..1}.q", ["layers.0.q", "layers.1.q"]),
        ("layers.1.{q,k}", ["layers.1.q", "layers.1.k"]),
        ("layers.*.q !layers.0.q", ["layers.1.q", "layers.10.q"]),
        ("a.b b.c", ["a.b", "b.c"]),
        ("*", ["a", "head"]),
        ("**", PATHS),
        ("** !a.** !layers.**", ["b.c", "head"]),
    ],
)
def test_patterns(pattern, expected):
    assert [path for path, _ in select(pattern, PATHS)] == expected


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["a", "bc", "d1", "q_proj"]), min_size=1, max_size=5), st.data())
def test_a_path_matches_itself_with_any_segment_starred_and_with_a_leading_double_star(segments, data):
    path = ".".join(segments)
    i = data.draw(st.integers(0, len(segments) - 1))
    starred = ".".join("*" if j == i else s for j, s in enumerate(segments))
    tail = ".".join(["**", *segments[i:]])
    for pattern in (path, starred, tail, "**"):
        assert select(pattern, [path]) == [(path, ())]
    with pytest.raises(NameNotFound):
        select(path + ".more", [path])


def test_slices_and_later_rules_win():
    assert sites({"blocks.*.attn.qkv[q,v]": LORA}) == [
        f"blocks.{i}.attn.qkv.weight[{r}]" for i in range(2) for r in "qv"
    ]
    plan = {"blocks.**": LORA, "blocks.0.**": "frozen", "blocks.1.mlp.2": mmpeft.DoRA(rank=1)}
    targets = resolve(Tiny(2), Plan.read(plan))
    assert {t.site.path: t.method.name for t in targets} == {
        "blocks.1.attn.qkv": "lora", "blocks.1.attn.proj": "lora", "blocks.1.mlp.0": "lora", "blocks.1.mlp.2": "dora",
    }  # fmt: skip


def test_full_covers_everything_below_once_and_a_parameter_by_name():
    assert sites({"head": "full"}) == ["head.weight", "head.bias"]
    assert sites({"token": "full"}) == ["token"]
    assert sites({"blocks.0.norm": "full"}) == ["blocks.0.norm.weight", "blocks.0.norm.bias"]
    assert len(sites({".": "full"})) == len(list(Tiny(2).parameters()))
    assert len(sites({".": "full"}, Tied())) == 1
    assert set(sites({"**": "full"}, Host(_new_weight_norm()))) == {"site.weight", "site.bias"}
    assert sites({"**": LORA}, Host(_new_weight_norm())) == ["site.weight"]


def test_plan_forms_are_one_plan(tmp_path):
    text = """
- match: blocks.*.attn.qkv[q,v]
  method: {LoRA: {rank: 2}}
  lr: 1.0e-3
- {match: head, train: full, weight_decay: 0.05}
"""
    (tmp_path / "plan.yaml").write_text(text)
    from_file = Plan.read(tmp_path / "plan.yaml")
    as_list = Plan.read(
        [
            {
                "match": "blocks.*.attn.qkv[q,v]",
                "method": {"class_path": "mmpeft.LoRA", "init_args": {"rank": 2}},
                "lr": "1e-3",
            },
            {"match": "head", "train": "full", "weight_decay": 0.05},
        ]
    )
    assert from_file == as_list == Plan.read(from_file.to_list())
    assert [r.train for r in from_file.rules] == ["adapter", "full"]
    assert Plan.read({"head": "full"}) == Plan.read([{"match": "head", "train": "full"}])


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "error", "says"),
    [
        ({"blocks.*.attn.qvk": LORA}, NameNotFound, r"qvk.*nearest.*blocks\.\*\.attn\.qkv"),
        ({"heads": LORA}, NameNotFound, "nearest: head"),
        ({"head !haed": LORA}, NameNotFound, "haed.*nearest: head"),
        ({"head !head": LORA}, NameNotFound, "excludes everything"),
        ({"!head": LORA}, ConfigError, "includes nothing"),
        ({"": LORA}, ConfigError, "includes nothing"),
        ({"blocks.{0,1": LORA}, ConfigError, "malformed"),
        ({"blocks.*.norm": LORA}, NameNotFound, "LayerNorm.*none that LoRA adapts"),
        ({"blocks.*.attn.qkv[q,z]": LORA}, NameNotFound, "no role 'z'.*q, k, v"),
        ({"head[q]": LORA}, NameNotFound, "not a fused weight"),
        ({"head": "lroa"}, NameNotFound, "unknown method 'lroa'.*nearest: lora"),
        ({"head": {"LoRA": {"rnak": 2}}}, ConfigError, "no field 'rnak'.*nearest: rank"),
        ({"head": 3}, ConfigError, "is no method"),
        ([{"match": "head", "train": "ful"}], ConfigError, "train 'ful'"),
        ([{"match": "head", "train": "adapter"}], ConfigError, "needs a method"),
        ([{"match": "head", "trian": "full"}], ConfigError, "no field 'trian'.*nearest: train"),
        ([{"match": "head", "train": "full", "lr": -1}], ConfigError, "lr -1"),
        ([{"train": "full"}], ConfigError, "is no rule"),
        ({}, ConfigError, "empty"),
        (17, ConfigError, "is no plan"),
        ("no_such_plan.yaml", NameNotFound, "does not exist"),
        ({"head": "frozen"}, ConfigError, "trains nothing"),
        ({"head": "full", "**": "frozen"}, ConfigError, "trains nothing"),
        ({"blocks.0.attn.qkv[q]": LORA, "blocks.0.attn.qkv": LORA}, ConfigError, "overlap"),
        ({"head": mmpeft.LoRA(rank=4)}, ConfigError, r"rank 4 at head.weight of shape \(3, 6\); expected 1 to 3"),
        ({"head": mmpeft.DoRA(rank=4)}, ConfigError, "rank 4"),
        ({"head": mmpeft.RoCoFT(rank=4)}, ConfigError, "with 3 rows; expected 1 to 3"),
        ({"head": mmpeft.RoCoFT(rank=7, axis="columns")}, ConfigError, "with 6 columns"),
        ({"blocks.0.attn.qkv[q]": mmpeft.LoRA(rank=7)}, ConfigError, "expected 1 to 6"),
    ],
)
def test_bad_plans_are_refused_before_anything_changes(plan, error, says):
    model = Tiny(2)
    before = snapshot(model)
    with pytest.raises(error, match=f"(?s){says}"):
        mmpeft.attach(model, plan, example=X)
    assert_same_object(before, snapshot(model))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: mmpeft.LoRA(rank=0), "rank 0"),
        (lambda: mmpeft.LoRA(rank=-1), "rank -1"),
        (lambda: mmpeft.LoRA(dropout=1.0), "dropout 1.0"),
        (lambda: mmpeft.LoRA(init_from="svd"), "init_from 'svd'"),
        (lambda: mmpeft.LoRA(lr_ratio=0), "lr_ratio"),
        (lambda: mmpeft.VeRA(rank=0), "rank 0"),
        (lambda: mmpeft.IA3(side="left"), "side 'left'"),
        (lambda: mmpeft.RoCoFT(rank=0), "rank 0"),
        (lambda: mmpeft.RoCoFT(axis="diagonal"), "axis 'diagonal'"),
        (lambda: mmpeft.RoCoFT(select="best"), "select 'best'"),
    ],
)
def test_bad_method_fields(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


@pytest.mark.parametrize("name", ["", "a b", "a.b", "1a", "a/b"])
def test_bad_names(name):
    with pytest.raises(ConfigError, match="adapter name"):
        mmpeft.attach(Tiny(1), {"head": LORA}, name=name, example=X)


def test_a_taken_name():
    model = Tiny(1)
    mmpeft.attach(model, {"head": LORA}, name="a", example=X)
    before = [id(p) for d in deltas(model) for p in d.parameters()]
    with pytest.raises(ConfigError, match="already has an adapter 'a'"):
        mmpeft.attach(model, {"head": LORA}, name="a", example=X)
    assert [id(p) for d in deltas(model) for p in d.parameters()] == before


def test_shapes_that_methods_cannot_take():
    with pytest.raises(Unsupported, match="VeRA"):
        from cases import Experts

        mmpeft.attach(Host(Experts(False), 6), {"site": mmpeft.VeRA(rank=2)}, example=torch.randn(2, 6))
    interleaved = nn.ModuleDict({"query_key_value": nn.Linear(6, 18)})
    with pytest.raises(Unsupported, match="interleaves its heads"):
        mmpeft.attach(interleaved, {"query_key_value[q]": LORA})


class AnyShape(nn.Module):
    """Bare parameters of zero to five dimensions, each of which matters to the output."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        for n in range(6):
            self.register_parameter(f"p{n}", nn.Parameter(torch.randn((2, 3, 2, 3, 2)[:n], generator=g)))

    def forward(self, x):
        return sum(torch.tanh(x * p.reshape(-1, *(1,) * (x.ndim - 1)).sum(0)) for p in self.parameters_in_use())

    def parameters_in_use(self):
        return [getattr(self, f"p{n}") for n in range(6)]


@pytest.mark.parametrize("plan", [*({f"part.p{n}": "full"} for n in range(6)), {"part": "full"}], ids=str)
def test_full_takes_a_bare_parameter_of_any_shape(plan, tmp_path):
    model = nn.ModuleDict({"part": AnyShape()})
    model.forward = lambda x: model["part"](x)
    x, before = torch.randn(3, 5), {n: p.clone() for n, p in model.named_parameters()}
    y = model(x)
    mmpeft.attach(model, plan, "a", example=x)
    assert torch.equal(model(x), y)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        p.numel() for n, p in before.items() if n in plan or "part" in plan
    )
    fill(model)
    changed = model(x)
    changed.sum().backward()
    assert not torch.allclose(changed, y) and all(d.value.grad.any() for d in deltas(model))
    with mmpeft.use(model, None):
        assert torch.equal(model(x), y)
    mmpeft.save(model, tmp_path)
    mmpeft.merge(model, check=x)
    assert torch.equal(model(x), changed)
    mmpeft.unmerge(model)
    mmpeft.load(model, tmp_path, "b")
    mmpeft.stack(model)
    with torch.no_grad():
        mmpeft.use(model, "b")
        assert torch.equal(model(x), changed)
    mmpeft.detach(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("method", [LORA, mmpeft.IA3(), mmpeft.RoCoFT(rank=1)], ids=lambda m: m.name)
def test_nothing_but_full_takes_a_tensor_without_a_matrix_view(method):
    with pytest.raises(Unsupported, match=r"p4 of shape \(2, 3, 2, 3\).*only `full`"):
        mmpeft.attach(AnyShape(), {"p4": method})


def test_roles_are_the_right_rows():
    """Zero the q slice's partner rows: only q moves."""
    model = DirectRead()
    x = torch.randn(2, 3, 6)
    mmpeft.attach(model, {"qkv[k]": LORA}, example=x)
    with torch.no_grad():
        for d in deltas(model, "default"):
            d.B.fill_(1.0)
    moved = (model.qkv.weight - model.qkv._parameters["weight"]).abs().sum(1) > 0
    assert moved.tolist() == [False] * 6 + [True] * 6 + [False] * 6
    model = Attention()
    mmpeft.attach(model, {"site[v]": mmpeft.RoCoFT(rank=2, select="last")}, example=torch.randn(2, 3, 8))
    with torch.no_grad():
        deltas(model, "default")[0].delta.fill_(1.0)
    moved = (model.site.in_proj_weight - model.site._parameters["in_proj_weight"]).abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == [22, 23]


def test_grouped_query_attention_slices():
    transformers = pytest.importorskip("transformers")
    config = transformers.Phi3Config(
        vocab_size=20, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    targets = resolve(transformers.Phi3ForCausalLM(config), Plan.read({"**.qkv_proj[q,k,v]": LORA}))
    assert [t.site.rows for t in targets] == [(0, 32), (32, 48), (48, 64)]


def test_gates_of_recurrent_layers():
    lstm = nn.LSTM(5, 4, proj_size=2)
    assert [t.site.rows for t in resolve(lstm, Plan.read({"weight_{ih,hh}_l0[f]": LORA}))] == [(4, 8), (4, 8)]
    with pytest.raises(NameNotFound, match="weight_hr_l0.*not a fused weight"):
        resolve(lstm, Plan.read({".": LORA, "weight_hr_l0[f]": LORA}))
    gru = nn.ModuleDict({"gru": nn.GRU(5, 4)})
    assert [t.site.rows for t in resolve(gru, Plan.read({"gru[z]": LORA}))] == [(4, 8), (4, 8)]
    model = nn.ModuleDict({"lstm": nn.LSTM(5, 4, batch_first=True)})
    model.forward = lambda x: model.lstm(x)[0]  # type: ignore[method-assign]
    mmpeft.attach(model, {"lstm[o]": LORA}, example=torch.randn(2, 3, 5))
    with torch.no_grad():
        for d in deltas(model, "default"):
            d.B.fill_(1.0)
    moved = (model.lstm.weight_hh_l0 - model.lstm._parameters["weight_hh_l0"]).abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == [12, 13, 14, 15]
