"""What `inspect` predicts of a step is what a real step does: bytes kept for the backward against autograd's own hooks
within 5 %, FLOPs against torch's counter exactly, over methods and kinds of models."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mmpeft
from mmpeft.adapters.probe import as_call, tensors_in
from mmpeft.errors import ConfigError, NameNotFound

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}


def roberta():
    return transformers.RobertaModel(transformers.RobertaConfig(**SIZES))


def llama():
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False)
    return transformers.LlamaForCausalLM(config)


def vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=48, depth=2, num_classes=5)


def conv():
    return timm.create_model("resnet10t", num_classes=5, stem_width=8, channels=(8, 16, 24, 32))


def ids():
    return {"input_ids": torch.randint(3, 97, (3, 11))}


KINDS = {  # make, example, patterns of (projections, feed-forwards' second layer, wrapped calls, the last part)
    "roberta": (
        roberta,
        ids,
        "**.self.{query,value}", "**.output.dense", "encoder.layer.*.attention", "encoder.layer.1",
    ),
    "llama": (llama, ids, "**.{q,v}_proj", "**.down_proj", "**.mlp", "lm_head"),
    "vit": (
        vit, lambda: torch.randn(3, 3, 48, 48),
        "blocks.*.attn.qkv[q,v]", "blocks.*.mlp.fc2", "blocks.*.mlp", "head",
    ),
    "conv": (
        conv, lambda: torch.randn(3, 3, 35, 51),
        "layer*.**.conv1", "layer*.**.conv2", "layer{3,4}.*.conv2", "fc",
    ),
}  # fmt: skip


def plans(kind):
    _, _, projections, second, calls, last = KINDS[kind]
    several = [
        {"match": projections, "method": mmpeft.LoRA(rank=3)},
        {"match": calls, "method": mmpeft.AdaptFormer(size=4)},
        {"match": last, "train": "full"},
    ]
    found = {
        "lora": {projections: mmpeft.LoRA(rank=3)},
        "dora": {projections: mmpeft.DoRA(rank=2)},
        "ia3": {projections: mmpeft.IA3(), second: mmpeft.IA3(side="in")},
        "bottleneck": {calls: mmpeft.Bottleneck(size=5)},
        "full": {".": "full"},
        "several rules": several,
    }
    own = {
        "roberta": {
            "bitfit": {"**": mmpeft.BitFit()},
            "lora-dropout": {projections: mmpeft.LoRA(rank=3, dropout=0.1)},
            "prompt": {".": mmpeft.PromptTuning(num_tokens=4)},
        },
        "llama": {"norms": {"**": mmpeft.LayerNormTuning()}, "prompt": {"model": mmpeft.PromptTuning(num_tokens=4)}},
        "vit": {"bitfit": {"**": mmpeft.BitFit()}, "vpt": {"blocks": mmpeft.VPT(num_tokens=4)}},
        "conv": {"norms": {"**": mmpeft.LayerNormTuning()}, "oft": {"layer*.**.conv1": mmpeft.OFT(block_size=4)}},
    }
    return found | own[kind]


def measured(model, example):
    """(bytes of the distinct storages that autograd keeps beside parameters, buffers and input, FLOPs forward, FLOPs
    backward) of one real step."""
    args, kwargs = as_call(example)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *tensors_in(example)]}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t  # held, so that no address is used twice
        return t

    model.train()
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = model(*args, **kwargs)
        forward = counter.get_total_flops()
        sum(t.sum() for t in tensors_in(output) if t.requires_grad).backward()
    nbytes = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
    return nbytes, forward, counter.get_total_flops() - forward


CASES = [(kind, name) for kind in KINDS for name in plans(kind)]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=["-".join(c).replace(" ", "-") for c in CASES])
def test_a_step_costs_what_was_predicted(kind, name):
    make, example, *_ = KINDS[kind]
    model, x = make(), example()
    plan = plans(kind)[name]
    with sdpa_kernel(SDPBackend.MATH):  # torch's counter knows no fused attention on a CPU
        seen = mmpeft.inspect(model, plan, example=x)
        mmpeft.attach(model, plan, check=False)
        nbytes, forward, backward = measured(model, x)
    assert seen.note == "predicted"
    forward = forward if name != "dora" else pytest.approx(forward, rel=0.01)  # its norms are kept between two reads
    assert (seen.cost.forward_flops, seen.cost.backward_flops) == (forward, backward)
    assert seen.cost.saved_bytes == pytest.approx(nbytes, rel=0.05)


@pytest.mark.parametrize("kind", ["roberta", "llama", "vit"])
def test_fused_attention_is_predicted_too(kind):
    make, example, *_ = KINDS[kind]
    model, x = make(), example()
    plan = plans(kind)["lora"]
    seen = mmpeft.inspect(model, plan, example=x)
    with sdpa_kernel(SDPBackend.MATH):
        plain = mmpeft.inspect(model, plan, example=x)
    mmpeft.attach(model, plan, check=False)
    nbytes, *_ = measured(model, x)
    assert seen.cost.saved_bytes == pytest.approx(nbytes, rel=0.05)
    assert seen.cost.forward_flops == plain.cost.forward_flops
    assert seen.cost.backward_flops > plain.cost.backward_flops  # the scores once more


def net(width=10, layers=4):
    return nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width, bias=False), nn.Tanh())))


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_gradients_of_activations_start_at_the_first_trained_site(layer):
    """n tokens, d x d layers, rank r: forward 2 n d^2 a layer and 4 n d r; backward the input gradients of the layers
    above (2 n d^2 each), dA and dB (2 n d r each) and the gradient between them (2 n d r)."""
    n, d, r = 7, 10, 3
    seen = mmpeft.inspect(net(d), {str(2 * layer): mmpeft.LoRA(rank=r)}, example=torch.randn(n, d))
    assert seen.base_cost.forward_flops == 4 * 2 * n * d * d
    assert seen.cost.forward_flops == 4 * 2 * n * d * d + 4 * n * d * r
    assert seen.cost.backward_flops == (3 - layer) * 2 * n * d * d + 6 * n * d * r


def test_a_frozen_layer_keeps_no_input_and_computes_no_weight_gradient():
    n, d = 7, 10
    adapted, whole = (
        mmpeft.inspect(net(d), plan, example=torch.randn(n, d)).cost
        for plan in ({"0": mmpeft.LoRA(rank=1)}, {"**": "full"})
    )
    # Kept by LoRA at the bottom: the input's projection to rank 1, and the four tanh outputs.
    assert adapted.saved_bytes == 4 * (n * 1 + 4 * n * d)
    assert whole.saved_bytes == 4 * 4 * n * d
    assert whole.backward_flops == (4 + 3) * 2 * n * d * d


def test_rules_add_up_and_an_overruled_rule_is_taken_back():
    model, x = net(), torch.randn(5, 10)
    rules = [
        {"match": "{0,2}", "method": mmpeft.LoRA(rank=2)},
        {"match": "0", "train": "frozen"},
        {"match": "6", "train": "full"},
    ]
    seen = mmpeft.inspect(model, rules, example=x)
    assert sum((row.cost.backward_flops for row in seen.rows), 0) == seen.cost.backward_flops
    assert seen.rows[1].cost.saved_bytes < 0 and seen.rows[1].cost.backward_flops < 0
    alone = mmpeft.inspect(model, {"2": mmpeft.LoRA(rank=2), "6": "full"}, example=x)
    assert seen.cost == alone.cost
    nothing_yet = mmpeft.inspect(model, [{"match": "0", "train": "frozen"}, *rules[2:]], example=x)
    assert nothing_yet.rows[0].cost.forward_flops == nothing_yet.rows[0].cost.backward_flops == 0


def test_looking_changes_nothing_and_needs_no_weights():
    model, x = vit(), torch.randn(2, 3, 48, 48)
    torch.manual_seed(5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    real = mmpeft.inspect(model, plans("vit")["lora"], example=x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and len(before) == len(
        model.state_dict()
    )
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and model.training
    with torch.device("meta"):
        ghost = vit()
    assert mmpeft.inspect(ghost, plans("vit")["lora"], example=x.to("meta")).cost == real.cost


class Looks(nn.Module):
    """A model that asks for a value."""

    def __init__(self):
        super().__init__()
        self.site = nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.site(x)) if float(x.sum()) > -1e9 else x


def test_a_model_that_looks_at_values_is_measured_on_its_own_weights():
    model, x = Looks(), torch.randn(5, 6)
    plan = {"site": mmpeft.LoRA(rank=2)}
    seen = mmpeft.inspect(model, plan, example=x)
    assert seen.note.startswith("measured")
    assert type(model.site) is nn.Linear and all(p.requires_grad and p.grad is None for p in model.parameters())
    mmpeft.attach(model, plan, check=False)
    nbytes, forward, backward = measured(model, x)
    assert (seen.cost.saved_bytes, seen.cost.forward_flops, seen.cost.backward_flops) == (nbytes, forward, backward)
    ghost = Looks().to("meta")
    unseen = mmpeft.inspect(ghost, plan, example=x)
    assert unseen.cost is None and "looks at values" in unseen.note and unseen.trainable == 24


def test_an_adapted_model_is_costed_by_its_own_plan():
    model, x = vit(), torch.randn(2, 3, 48, 48)
    plan = plans("vit")["lora"]
    expected = mmpeft.inspect(model, plan, example=x).cost
    mmpeft.attach(model, plan, check=False)
    assert mmpeft.inspect(model).cost is None
    assert mmpeft.inspect(model, example=x).cost == expected
    assert mmpeft.active(model) == ("default",)


def test_wrong_input_is_refused():
    with pytest.raises(ConfigError, match=r"cannot be called with the example \[5, 9\]"):
        mmpeft.inspect(net(), {"0": mmpeft.LoRA(rank=2)}, example=torch.randn(5, 9))
    with pytest.raises(NameNotFound, match="unknown optimizer 'adamv'.*nearest: adam"):
        mmpeft.inspect(net(), {"0": mmpeft.LoRA(rank=2)}, optimizer="adamv")


OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adafactor": torch.optim.Adafactor,
    "sgd+momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd": torch.optim.SGD,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_bytes_are_those_of_the_optimizers_own_state(name):
    model, x = vit(), torch.randn(2, 3, 48, 48)
    seen = mmpeft.inspect(model, plans("vit")["several rules"], optimizer=name)
    mmpeft.attach(model, plans("vit")["several rules"], check=False)
    optimizer = OPTIMIZERS[name](mmpeft.parameter_groups(model, lr=1e-3))
    model(x).sum().backward()
    optimizer.step()
    states = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    assert seen.optimizer_bytes == sum(t.nbytes for t in states if isinstance(t, torch.Tensor))
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert seen.gradient_bytes == sum(g.nbytes for g in grads) == seen.file_bytes
