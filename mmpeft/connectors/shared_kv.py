"""Keys and values of all cross-attention layers in one product: they project the same features.

A Q-Former's layers all read the encoder's tokens x [M = B T, C] through two Linears each, a perceiver's through one, behind
LayerNorms that differ in gain and bias only. One product with the n weights side by side, N outputs in all, reads x once
instead of n times, and in the backward forms dx in one product instead of adding up n; but the weights have to be put
side by side every time, since they train. Which is less is counted here, in passes over memory (elements read or written):

    Q-Former    side by side: 2 N C. Saved, for each linear but one: M C read in the forward, M C in dW, and where x needs a
                gradient (a trained `ln_vision`) 3 M C for adding dx up. So it pays in training from M = 2 N / 5 (n - 1) on,
                335 rows at width 768 and six layers, two pictures of 257 tokens; without gradients from M = 2 N / (n - 1).
    perceiver   W diag(gain) side by side: 4 N C, and 4 N C again in its backward. Saved a layer: the norm's M C read and
                written, M C read by the product, and in the backward 4 M C of norm, dW and dX; 11 in all where x needs a
                gradient. Over frozen features, where only gains and biases ask for it, the whole dX product is saved too,
                a third of the work; on an H100 it takes as long as moving M N C / 264 elements of two bytes.

Another gain of an H100 is not counted: 12 products of [2056, 1408] x [1408, 768] are 102 tiles of 128 x 128 on 132
multiprocessors each, one of N = 9,216 is 1,224 tiles, ten waves nearly full.

On a CPU x comes from the cache and products run at their roof, so a saved pass saves nothing. Measured on one core, in ms,
each layer's own against one product:

    rows                                          64          257          1028          2056
    Q-Former, training (ln_vision trained)    82 / 114    216 / 242    832 / 887   1674 / 1678
    Q-Former, no gradients                    20 / 52      69 / 82     265 / 298    570 / 611
    perceiver, training on frozen features    35 / 60     110 / 95     406 / 308    855 / 608
    perceiver, no gradients                   10 / 19      35 / 44     137 / 147    296 / 280

so there only a saved product counts, from 256 rows on. `pays` chooses.

Where an adapter acts on one of these linears as a product of its own (LoRA), or anything else stands in its call, the layers
project for themselves, as always. Adapters that are read as a weight (`full`) are put side by side like the base's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.adapters.classes import spec_of
from mmpeft.adapters.state import SLOT

CPU_ROWS = 256  # from here on a saved product is worth putting weights side by side, on a CPU
PRODUCT = 264  # elements of two bytes that an H100 moves (3.0 TB/s) while it multiplies 2 x 264 of them (796 TFLOP/s)


def pays(
    rows: int, outputs: int, members: int, *, weight_passes: int, feature_passes: int, products: int = 0,
    cached: bool = False,
) -> bool:  # fmt: skip
    """Whether moving the weights (`weight_passes` x outputs x C) is less than what `members` products on `rows` rows of
    features save: `feature_passes` x rows x C for each but one, and `products` whole ones. `cached`: features are read
    from the cache, as on a CPU."""
    if cached:
        return products > 0 and rows >= CPU_ROWS
    saved = feature_passes * rows * (members - 1) + products * rows * outputs / PRODUCT
    return saved > weight_passes * outputs


def shows_its_weight(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module is what `kind` computes with its `weight` and `bias` as they are read, and nothing else:
    no hook, no adapter that is a product or a call of its own, no packed or sharded storage."""
    if type(module._parameters.get("weight")) is not nn.Parameter or "forward" in module.__dict__:
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return False
    if type(module) is kind:
        return True
    slot: Any = module._modules.get(SLOT)
    if spec_of(type(module))[0] is not kind or slot is None:
        return False
    state = slot.state
    if state.watching or state.indexed == "rows":
        return False
    active = state.current()
    acting = [] if state.bare or active.base else [d for _, d in slot.deltas(active.names)]
    if active.rows is not None or any(d.site.kind != "weight" or (d.training and d.method.dropout) for d in acting):
        return False
    found = slot.parts("weight", module._parameters["weight"])
    return bool(found is None or not found[1])


def _trains(modules: Sequence[nn.Module]) -> bool:
    """Whether a gradient reaches these modules, adapters inside included."""
    return torch.is_grad_enabled() and any(p.requires_grad for m in modules for p in m.parameters())


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _operands(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Weights as the product will read them: rounded by autocast first, so that fewer bytes are moved."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return list(weights)
    return [w.to(torch.get_autocast_dtype(kind)) for w in weights]


def keys_and_values(x: Tensor, linears: Sequence[nn.Linear]) -> list[Tensor] | None:
    """x [B, T, C] through linears [D_i, C] in one product: [B, T, D_i] views; None where each is to be called itself."""
    trains = _trains(linears)
    saved = 1 + trains + 3 * (torch.is_grad_enabled() and x.requires_grad)
    outs = [m.out_features for m in linears]
    if len(outs) < 2 or not pays(
        _rows(x), sum(outs), len(outs), weight_passes=2, feature_passes=saved, cached=x.device.type == "cpu"
    ):
        return None
    if not all(shows_its_weight(m, nn.Linear) and m._parameters["bias"] is not None for m in linears):
        return None
    weight = torch.cat(_operands(x, [m.weight for m in linears]))
    bias = torch.cat(_operands(x, [m.bias for m in linears]))
    return list(F.linear(x, weight, bias).split_with_sizes(outs, -1))


def normed_keys_and_values(
    x: Tensor, norms: Sequence[nn.LayerNorm], linears: Sequence[nn.Linear]
) -> list[Tensor] | None:
    """linear_i(norm_i(x)) [B, T, D_i] for linears without bias, in one product on the features that the norms share:
    W (n(x) gain + bias) = (W diag(gain)) n(x) + W bias. None where each layer is to compute its own.

    All norms have the same epsilon.
    """
    trains = _trains((*norms, *linears))
    through = torch.is_grad_enabled() and x.requires_grad
    outs = [m.out_features for m in linears]
    if len(outs) < 2 or not pays(
        _rows(x), sum(outs), len(outs), weight_passes=4 + 4 * trains, feature_passes=3 + 4 * trains + 4 * through,
        products=int(trains and not through), cached=x.device.type == "cpu",
    ):  # fmt: skip
        return None
    kinds = [*((m, nn.LayerNorm) for m in norms), *((m, nn.Linear) for m in linears)]
    if not all(shows_its_weight(m, kind) for m, kind in kinds):
        return None
    weights = [m.weight for m in linears]  # read once: an adapter may form it
    weight = torch.cat(_operands(x, [w * n.weight for n, w in zip(norms, weights, strict=True)]))
    bias = torch.cat([w @ n.bias for n, w in zip(norms, weights, strict=True)])
    normed = F.layer_norm(x, norms[0].normalized_shape, None, None, norms[0].eps)
    return list(F.linear(normed, weight, *_operands(x, [bias])).split_with_sizes(outs, -1))
