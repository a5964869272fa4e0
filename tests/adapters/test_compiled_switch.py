"""Switching among adapters on fused blocks: one batched copy, and never the tensors of an adapter that is gone."""

import copy
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mmpeft
from mmpeft.adapters import state
from mmpeft.adapters.methods.lora_prune import drop_below
from mmpeft.errors import NameNotFound


def noise(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if state.SLOT in name:
            p.data += 0.3 * torch.randn(p.shape, generator=generator).to(p)
    return model


IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
DECODER = {"model.layers.*.*.*_proj": mmpeft.LoRA(rank=3, alpha=6)}


def llama(layers=2, names="ab", method=None):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=31)
    model = transformers.LlamaForCausalLM(config).eval()
    for name in names:
        mmpeft.attach(model, DECODER if method is None else {next(iter(DECODER)): method}, name=name, check=False)
    mmpeft.use(noise(model), names[0])
    return model


def compiled(model):
    return mmpeft.compile(model, loss=False, out=io.StringIO())


def agree(model, names):
    """The fused decoder under each name equals the model's own forward."""
    own = copy.deepcopy(model)  # copies have their own forward
    with torch.no_grad():
        for name in names:
            mmpeft.use(model, name)
            mmpeft.use(own, name)
            want = own(input_ids=IDS, use_cache=False).logits
            torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, want, rtol=1e-4, atol=1e-5)


class Ops(TorchDispatchMode):
    """The names of what is dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("layers", [2, 5])
def test_a_switch_is_one_batched_copy(layers):
    model = llama(layers)
    part = compiled(model).decoders[0]
    for name in "ab":
        mmpeft.use(model, name)
        part.prepare()
    with Ops() as run:
        mmpeft.use(model, "a")
        part.prepare()
    assert sorted(run.names) == ["_foreach_copy_", "_foreach_mul"]
    with Ops() as run:
        mmpeft.use(model, "a")
        part.prepare()
    assert not run.names


@pytest.mark.parametrize("method", [mmpeft.LoRA(rank=3, alpha=6), mmpeft.DoRA(rank=2)], ids=["lora", "dora"])
def test_fused_values_after_switches_and_changes(method):
    model = llama(names="abc", method=method)
    part = compiled(model).decoders[0]
    agree(model, "abcab")
    p = next(d.B for _, _, slot in state.slots(model) for n, d in slot.deltas(("c",)))
    with torch.no_grad():
        p.add_(0.5)
    agree(model, "cac")
    mmpeft.attach(model, {next(iter(DECODER)): method}, name="d", check=False)
    noise(model, 5)
    agree(model, "dbd")
    for name in ("a", "d"):  # in use, and not: other tensors under the same name
        mmpeft.detach(model, name)
        mmpeft.attach(model, {next(iter(DECODER)): method}, name=name, check=False)
        noise(model, 6)
        agree(model, "dad")
    mmpeft.detach(model, "d")
    with pytest.raises(NameNotFound, match="'d'"):
        part.current()  # the one in use last
    assert part.calls["own"] == 0 and part.calls["fused"] == 17


def test_fused_blocks_leave_an_edited_adapter_to_the_model():
    model = llama()
    part = compiled(model).decoders[0]
    agree(model, "ab")
    with drop_below(model, 1, name="b"):
        agree(model, "ab")
    assert part.calls["own"] == 1
    agree(model, "ab")
    mmpeft.drop_sites(model, lambda site: "q_proj" in site.name, "b")
    agree(model, "bab")
    assert part.calls["own"] == 3 and any("'b' differs" in why for why in part.reasons)
