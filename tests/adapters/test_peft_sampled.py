"""Methods, layers, shapes, options and dtypes by chance: PEFT -> here -> PEFT, always the same outputs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_cases import outputs, peft, randomise, transformers
from torch import nn

from mmpeft.adapters.peft.format import export_peft, load_peft

Draw = Callable[[st.SearchStrategy[Any]], Any]
FEW = st.integers(1, 4)


def linear(draw: Draw, bias: bool) -> tuple[nn.Module, tuple[int, ...]]:
    into = 4 * draw(FEW)
    return nn.Linear(into, 4 * draw(FEW), bias=bias), (2, 3, into)


def hf_conv1d(draw: Draw, bias: bool) -> tuple[nn.Module, tuple[int, ...]]:
    into = 4 * draw(FEW)
    return transformers.pytorch_utils.Conv1D(4 * draw(FEW), into), (2, 3, into)


def conv(dims: int, *, grouped: bool = False, square: bool = False) -> Callable[..., Any]:
    """A convolution of any geometry PEFT computes rightly: `square` for those that take one number for all axes."""

    def make(draw: Draw, bias: bool) -> tuple[nn.Module, tuple[int, ...]]:
        def numbers(low: int, high: int) -> tuple[int, ...]:
            if square:
                return (draw(st.integers(low, high)),) * dims
            return tuple(draw(st.integers(low, high)) for _ in range(dims))

        groups = draw(st.sampled_from([1, 2])) if grouped else 1
        into, kernel, dilation = 4 * draw(st.integers(1, 2)), numbers(1, 3), (1,) * dims if square else numbers(1, 2)
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
            into, 4 * draw(st.integers(1, 2)), kernel, numbers(1, 2), numbers(0, 1), dilation, groups, bias
        )
        return layer, (2, into, *(d * k + 2 for k, d in zip(kernel, dilation, strict=True)))

    return make


def point(draw: Draw, bias: bool) -> tuple[nn.Module, tuple[int, ...]]:
    into = 4 * draw(FEW)
    return nn.Conv2d(into, 4 * draw(FEW), 1, draw(st.integers(1, 2)), bias=bias), (2, into, 5, 4)


def embedding(draw: Draw, bias: bool) -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Embedding(7, 4 * draw(FEW), padding_idx=draw(st.sampled_from([None, 2]))), (2, 3)


LYCORIS = [linear, conv(1, grouped=True), conv(2, grouped=True)]
ranks, alphas, flags = st.integers(1, 4), st.integers(1, 9), st.booleans()

SAMPLED: dict[str, tuple[list[Any], Callable[[Draw], Any]]] = {
    "lora": (
        [embedding, hf_conv1d],
        lambda d: peft.LoraConfig(r=d(ranks), lora_alpha=d(alphas), use_rslora=d(flags), use_dora=d(flags)),
    ),
    "loha": (
        LYCORIS,
        lambda d: peft.LoHaConfig(r=d(ranks), alpha=d(alphas), use_effective_conv2d=d(flags)),
    ),
    "lokr": (
        [linear, conv(2, grouped=True)],
        lambda d: peft.LoKrConfig(
            r=d(ranks), alpha=d(alphas), decompose_both=d(flags), decompose_factor=d(st.sampled_from([-1, 2, 4]))
        ),
    ),
    "hira": ([linear, hf_conv1d, embedding, conv(1), conv(2), conv(3)], lambda d: peft.HiraConfig(r=d(ranks))),
    "gralora": (
        [linear, hf_conv1d],
        lambda d: peft.GraloraConfig(r=4, alpha=d(alphas), gralora_k=d(st.sampled_from([1, 2, 4])), hybrid_r=d(ranks) - 1),
    ),
    "miss": ([linear], lambda d: peft.MissConfig(r=d(ranks))),
    "bat": ([linear], lambda d: peft.MissConfig(r=d(st.sampled_from([1, 2, 4])), init_weights="bat")),
    "oft": (
        [linear, point, embedding],
        lambda d: peft.OFTConfig(
            oft_block_size=d(st.sampled_from([2, 4])),
            block_share=d(flags),
            coft=d(flags),
            eps=0.3,
            use_cayley_neumann=d(flags),
            num_cayley_neumann_terms=d(st.integers(3, 6)),
        ),
    ),
    "boft": (
        [linear, conv(2, square=True)],
        lambda d: peft.BOFTConfig(boft_block_size=d(st.sampled_from([2, 4]))),
    ),
    "hra": (
        [linear, conv(2, square=True)],
        lambda d: peft.HRAConfig(r=d(st.sampled_from([2, 4])), apply_GS=d(flags)),
    ),
    "c3a": ([linear], lambda d: peft.C3AConfig(block_size=d(st.sampled_from([1, 2, 4])))),
    "fourierft": (
        [linear, hf_conv1d],
        lambda d: peft.FourierFTConfig(n_frequency=4 * d(FEW), scaling=20.0, random_loc_seed=d(st.integers(0, 99))),
    ),
    "shira": ([linear], lambda d: peft.ShiraConfig(r=1)),
    "delora": ([linear], lambda d: peft.DeloraConfig(r=d(ranks), delora_lambda=d(alphas))),
    "adalora": (
        [linear, hf_conv1d, conv(2)],
        lambda d: peft.AdaLoraConfig(init_r=d(ranks), lora_alpha=d(alphas), total_step=9),
    ),
    "randlora": (
        [linear, hf_conv1d],
        lambda d: peft.RandLoraConfig(r=d(ranks), randlora_alpha=d(alphas), very_sparse=d(flags)),
    ),
}  # fmt: skip


def there_and_back(base: nn.Module, config: Any, x: torch.Tensor, folder: Path, *, std: float) -> None:
    """PEFT's folder of a random adapter gives its outputs here, and the folder written from that gives them in PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
        randomise((p for n, p in sorted(theirs.named_parameters()) if p.requires_grad and "ranknum" not in n), std)
        expected = outputs(theirs, x)
        theirs.save_pretrained(folder / "a")
        ours = load_peft(copy.deepcopy(base), folder / "a", example=x, check=False)
        torch.testing.assert_close(outputs(ours, x), expected, atol=1e-5, rtol=1e-5)
        export_peft(ours, folder / "b", example=x)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "b").eval()
    torch.testing.assert_close(outputs(again, x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", SAMPLED)
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_sampled(tmp_path_factory: pytest.TempPathFactory, method: str, data: st.DataObject) -> None:
    layers, configure = SAMPLED[method]
    torch.manual_seed(data.draw(st.integers(0, 9)))
    layer, shape = data.draw(st.sampled_from(layers))(data.draw, data.draw(flags))
    # PEFT's own tensors of these are fp32 whatever the base is, and it multiplies them with the base's
    dtype = torch.float32 if method in ("hra", "c3a", "fourierft", "oft", "boft") else data.draw(
        st.sampled_from([torch.float32, torch.float64])
    )  # fmt: skip
    config = configure(data.draw)
    config.target_modules = {"1"}
    ids = isinstance(layer, nn.Embedding)
    x = torch.randint(0, 7, shape) if ids else torch.randn(shape, dtype=dtype)
    base = nn.Sequential(nn.Identity(), layer).to(dtype).eval()
    there_and_back(base, config, x, tmp_path_factory.mktemp("sampled"), std=0.2)


class Stack(nn.Module):
    """Attention and a stack of experts: [B, T, d] -> [B, T, d]."""

    def __init__(self, heads: int, width: int, experts: int, hidden: int, bias: bool) -> None:
        super().__init__()
        dim = heads * width
        self.attn = nn.MultiheadAttention(dim, heads, bias=bias, batch_first=True)
        self.up = nn.Parameter(torch.randn(experts, hidden, dim) / dim**0.5)
        self.down = nn.Parameter(torch.randn(experts, dim, hidden) / hidden**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + torch.einsum("beth,edh->btd", torch.einsum("btd,ehd->beth", x, self.up).tanh(), self.down)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_sampled_attention_and_experts(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    draw, small = data.draw, st.integers(1, 3)
    torch.manual_seed(draw(st.integers(0, 9)))
    stack = Stack(draw(small), draw(small), draw(st.integers(2, 3)), draw(st.integers(2, 5)), draw(flags))
    base = nn.Sequential(stack, nn.Linear(stack.attn.embed_dim, 3)).eval()
    x = torch.randn(2, 4, stack.attn.embed_dim)
    bare = draw(st.sampled_from([None, ["0.up"], ["0.up", "0.down"]]))
    config = peft.LoraConfig(
        r=draw(ranks), lora_alpha=draw(alphas), target_modules=draw(st.sampled_from([["attn"], ["attn", "1"]])),
        target_parameters=bare, use_rslora=draw(flags), rank_pattern={"0.up": draw(ranks)} if bare else {},
    )  # fmt: skip
    there_and_back(base, config, x, tmp_path_factory.mktemp("stack"), std=0.3)
