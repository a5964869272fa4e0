"""HF PEFT as oracle: its tensors, random, copied into ours give the weight it merges to. Folders, both ways, are in
`tests/adapters/test_peft*.py`; where PEFT is wrong in `test_peft_wrong.py`."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import close
from hypothesis import given, settings
from hypothesis import strategies as st
from table import INTO, OUT
from torch import nn

import mmpeft
from mmpeft.adapters.methods.kronecker import factor_pair
from mmpeft.adapters.methods.orthogonal import butterfly

peft = pytest.importorskip("peft")


def lora_like(layer, prefix):
    return {"A": getattr(layer, f"{prefix}_A")["default"], "B": getattr(layer, f"{prefix}_B")["default"]}


def loha(layer):
    names = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
    return {ours: getattr(layer, theirs)["default"] for ours, theirs in names.items()}


def lokr(layer):
    names = {"C": "lokr_w1", "C1": "lokr_w1_a", "C2": "lokr_w1_b", "D": "lokr_w2", "D1": "lokr_w2_a", "D2": "lokr_w2_b"}
    return {o: getattr(layer, t)["default"].flatten(1) for o, t in names.items() if "default" in getattr(layer, t)}


def gralora(layer):
    tensors = {"A": layer.gralora_A["default"].mT, "B": layer.gralora_B["default"].mT}
    if layer.hybrid_r["default"]:
        tensors |= {
            "A_hybrid": layer.gralora_A_general["default"].weight,
            "B_hybrid": layer.gralora_B_general["default"].weight,
        }
    return tensors


def boft(layer):
    R = layer.boft_R["default"]
    b = R.shape[-1]
    Q = (R - R.mT) / 2
    # PEFT turns by (I - Q)(I + Q)^-1 from the left of W^T, we by (I + Q)(I - Q)^-1 from the right of W: the same
    # rotation.
    return {"Q": Q[..., *torch.triu_indices(b, b, 1)], "s": layer.boft_s["default"].squeeze(-1)}


def randlora(layer):
    n, small, large = (
        layer.num_bases,
        min(layer.in_features, layer.out_features),
        max(layer.in_features, layer.out_features),
    )
    return {
        "A": layer.randlora_A["default"][:, 0, :small],
        # PEFT flattens A's rows rank by rank but B's columns base by base, so column (j, k) of its B meets row (k', j')
        # of A at the same flat position: the paper's sum with the columns of the random B in another order.
        "B": layer.randlora_B["default"][:large, :n].reshape(large, -1, n).permute(2, 0, 1),
        "lambda_": layer.randlora_lambda["default"].mT,
        "gamma": layer.randlora_gamma["default"],
    }


def shapes(config, *sites):
    return [pytest.param(*config, site, id=f"{config[0].name}-{site}") for site in sites]


def delora(layer):
    return {
        **lora_like(layer, "delora"),
        "lam": layer.delora_lambda["default"],
        "norms": layer.delora_w_norm["default"],
    }


CASES = [
    *shapes(
        (mmpeft.LoHa(rank=3, alpha=2), lambda: peft.LoHaConfig(r=3, alpha=2, init_weights=False), loha),
        "wide",
        "narrow",
        "conv",
    ),
    *shapes(
        (mmpeft.LoKr(rank=2, alpha=3), lambda: peft.LoKrConfig(r=2, alpha=3, init_weights=False), lokr),
        "wide",
        "narrow",
        "conv",
    ),
    *shapes(
        (
            mmpeft.LoKr(rank=1, alpha=3, factor=8, decompose_both=True),
            lambda: peft.LoKrConfig(r=1, alpha=3, decompose_factor=8, decompose_both=True, init_weights=False),
            lokr,
        ),
        "wide",
        "narrow",
    ),
    *shapes(
        (
            mmpeft.C3A(block_size=8),
            lambda: peft.C3AConfig(block_size=8, init_weights="gaussian"),
            lambda m: {"w": m.c3a_kernel["default"]},
        ),
        "wide",
        "narrow",
    ),
    *shapes(
        (
            mmpeft.GraLoRA(rank=4, k=4, alpha=3, hybrid_rank=2),
            lambda: peft.GraloraConfig(r=4, gralora_k=4, alpha=3, hybrid_r=2, init_weights=False),
            gralora,
        ),
        "wide",
        "narrow",
    ),
    *shapes(
        (
            mmpeft.MiSS(rank=5),
            lambda: peft.MissConfig(r=5, init_weights=False),
            lambda m: {"D": m.miss_block["default"].mT},
        ),
        "wide",
        "narrow",
    ),
    *shapes(
        (
            mmpeft.OFT(block_size=8),
            lambda: peft.OFTConfig(r=0, oft_block_size=8, use_cayley_neumann=False, init_weights=False),
            lambda m: {"Q": m.oft_R["default"].weight},
        ),
        "wide",
        "narrow",
    ),
    *shapes(
        (
            mmpeft.OFT(block_size=4, eps=0.3),
            lambda: peft.OFTConfig(
                r=0, oft_block_size=4, use_cayley_neumann=False, init_weights=False, coft=True, eps=0.3
            ),
            lambda m: {"Q": m.oft_R["default"].weight},
        ),
        "wide",
    ),
    *shapes(
        (mmpeft.BOFT(block_size=4, m=1), lambda: peft.BOFTConfig(boft_block_size=4, init_weights=False), boft),
        "wide",
        "narrow",
    ),
    *shapes(
        (mmpeft.HRA(rank=4), lambda: peft.HRAConfig(r=4, init_weights=False), lambda m: {"u": m.hra_u["default"].mT}),
        "wide",
        "narrow",
    ),
    *shapes(
        (mmpeft.HiRA(rank=3), lambda: peft.HiraConfig(r=3, init_weights=False), lambda m: lora_like(m, "hira")),
        "wide",
        "narrow",
    ),
    *shapes(
        (mmpeft.DeLoRA(rank=3), lambda: peft.DeloraConfig(r=3, delora_lambda=15, init_weights=False), delora),
        "wide",
        "narrow",
    ),
    *shapes(
        (
            mmpeft.FourierFT(n=30),
            lambda: peft.FourierFTConfig(n_frequency=30, scaling=150.0, random_loc_seed=777),
            lambda m: {"c": m.fourierft_spectrum["default"]},
        ),
        "wide",
        "narrow",
    ),
    *shapes(
        (
            mmpeft.RandLoRA(rank=5, alpha=20),
            lambda: peft.RandLoraConfig(r=5, randlora_alpha=20, init_weights=False),
            randlora,
        ),
        "wide",
        "narrow",
    ),
]
SITES = {
    "wide": (lambda: nn.Linear(INTO, OUT), (3, 5, INTO)),
    "narrow": (lambda: nn.Linear(OUT, INTO), (3, 5, OUT)),
    "conv": (lambda: nn.Conv2d(6, 24, 3, padding=1), (3, 6, 7, 5)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "config", "read", "site"), CASES)
def test_the_same_tensors_give_the_same_weight_and_output(method, config, read, site):
    same_weight(method, config(), read, *SITES[site])


def same_weight(method, config, read, make, shape):
    torch.manual_seed(0)
    base = nn.Sequential(make())
    x = torch.randn(shape)
    ours = nn.Sequential(make())
    ours.load_state_dict(base.state_dict())
    config.target_modules = ["0"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base, config).eval()
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        for n, p in layer.named_parameters():
            if "base_layer" not in n and p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
        expected = theirs(x)
        tensors = read(layer)
        mmpeft.attach(ours, {"0.weight": method}, example=x)
        delta = next(d for d in ours[0]._adapters.modules() if hasattr(d, "trained"))
        assert set(delta.trained) <= set(tensors), "every trained tensor comes from PEFT"
        for n, t in tensors.items():
            assert delta._parameters[n].shape == t.shape, n
            delta._parameters[n].copy_(t)
        assert close(ours(x), expected, 2e-5)
        layer.merge()
        assert close(ours[0].weight, layer.base_layer.weight, 2e-5)
    trained = sum(delta._parameters[n].numel() for n in delta.trained)
    theirs_count = sum(p.numel() for n, p in layer.named_parameters() if p.requires_grad)
    assert trained == theirs_count or isinstance(
        method, mmpeft.BOFT
    )  # PEFT's trains whole blocks, and uses their skew part


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    which=st.integers(0, 9),
    sides=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    b=st.sampled_from([1, 2, 3, 4]),
    r=st.integers(1, 4),
    alpha=st.integers(1, 9),
    bias=st.booleans(),
)
def test_sampled_sizes_ranks_and_scales_agree_with_peft(which, sides, b, r, alpha, bias):
    out, into = 2 * b * sides[0], 2 * b * sides[1]
    method, config, read = SAMPLED[which](min(r, out, into), alpha, b)
    same_weight(method, config, read, lambda: nn.Linear(into, out, bias=bias), (3, into))


SAMPLED = [
    lambda r, a, b: (mmpeft.LoHa(rank=r, alpha=a), peft.LoHaConfig(r=r, alpha=a, init_weights=False), loha),
    lambda r, a, b: (
        mmpeft.LoKr(rank=r, alpha=a, decompose_both=a % 2 == 0),
        peft.LoKrConfig(r=r, alpha=a, decompose_both=a % 2 == 0, init_weights=False),
        lokr,
    ),
    lambda r, a, b: (
        mmpeft.GraLoRA(rank=2 * (r // 2) or 2, k=2, alpha=a),
        peft.GraloraConfig(r=2 * (r // 2) or 2, gralora_k=2, alpha=a, init_weights=False),
        gralora,
    ),
    lambda r, a, b: (
        mmpeft.C3A(block_size=b),
        peft.C3AConfig(block_size=b, init_weights="gaussian"),
        lambda m: {"w": m.c3a_kernel["default"]},
    ),
    lambda r, a, b: (
        mmpeft.MiSS(rank=r),
        peft.MissConfig(r=r, init_weights=False),
        lambda m: {"D": m.miss_block["default"].mT},
    ),
    lambda r, a, b: (mmpeft.HiRA(rank=r), peft.HiraConfig(r=r, init_weights=False), lambda m: lora_like(m, "hira")),
    lambda r, a, b: (
        mmpeft.DeLoRA(rank=r, lam=float(a)),
        peft.DeloraConfig(r=r, delora_lambda=a, init_weights=False),
        delora,
    ),
    lambda r, a, b: (
        mmpeft.RandLoRA(rank=r, alpha=a),
        peft.RandLoraConfig(r=r, randlora_alpha=a, init_weights=False),
        randlora,
    ),
    lambda r, a, b: (
        mmpeft.BOFT(block_size=2 * b, m=1),
        peft.BOFTConfig(boft_block_size=2 * b, init_weights=False),
        boft,
    ),
    lambda r, a, b: (
        mmpeft.OFT(block_size=2 * b),
        peft.OFTConfig(r=0, oft_block_size=2 * b, use_cayley_neumann=False, init_weights=False),
        lambda m: {"Q": m.oft_R["default"].weight},
    ),
]


def test_kronecker_splits_are_pefts():
    from peft.tuners.lokr.layer import factorization

    for n in range(1, 130):
        for factor in (-1, 1, 2, 3, 4, 8, 16, 64):
            assert factor_pair(n, factor) == tuple(factorization(n, factor)), (n, factor)


@pytest.mark.parametrize(("n", "b", "m"), [(16, 2, 4), (24, 6, 3), (32, 4, 3)])
def test_butterfly_orders_are_pefts(n, b, m):
    from peft.tuners.boft.layer import BOFTLayer

    layer = BOFTLayer.__new__(BOFTLayer)
    for j in range(m):
        theirs = BOFTLayer.block_butterfly_perm(layer, n, n // b // 2**j, b // 2, m - 1)
        P = BOFTLayer.perm2mat(layer, theirs)  # and a factor is P R P^T
        ours = torch.eye(n)[:, butterfly(n, b, j, torch.device("cpu"))]
        assert torch.equal(
            P @ torch.block_diag(*[torch.ones(b, b)] * (n // b)) @ P.T,
            ours @ torch.block_diag(*[torch.ones(b, b)] * (n // b)) @ ours.T,
        )
        assert torch.equal(P, ours)
