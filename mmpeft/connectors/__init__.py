"""Connectors: encoder tokens [B, T, d_v] to LLM tokens [B, Q, d_l], with masks (bool, True = valid).

Every class is keyword-only and usable from YAML by its path (`mmpeft.connectors.MLP`), or by the short name in
`CONNECTORS` through `build_connector("mlp", depth=2)`. Widths left out are given by `build(in_dim, out_dim)`.

| name | Q for T tokens | needs |
|---|---|---|
| linear, mlp | T | |
| pixel-shuffle | T / factor^2 | a grid |
| qformer, perceiver | num_queries, num_latents | |
| c-abstractor | num_queries | a grid |
| concat, conv1d, stack-swiglu | ceil(T / stack) | |
| cformer | ceil(T / frames_per_token) | |
| modality-adapter | its connector's | a connector |

`GatedCrossAttention` (Flamingo) is no such map: it brings media into the layers of an LLM.
"""

from __future__ import annotations

import inspect
from typing import Any

from mmpeft.connectors.base import Connector
from mmpeft.connectors.cformer import CFormer
from mmpeft.connectors.concat import ConcatLinear, Conv1dLinear, StackSwiGLU
from mmpeft.connectors.conv import CAbstractor
from mmpeft.connectors.cross_attention import GatedCrossAttention, GatedCrossAttentionBlock
from mmpeft.connectors.mlp import MLP, Linear
from mmpeft.connectors.modality_adapter import ModalityAdapter
from mmpeft.connectors.perceiver import PerceiverResampler
from mmpeft.connectors.pixel_shuffle import PixelShuffleMLP
from mmpeft.connectors.published import load_mlp
from mmpeft.connectors.qformer import QFormer
from mmpeft.connectors.qformer_weights import load_qformer
from mmpeft.errors import ConfigError, NameNotFound, nearest

CONNECTORS: dict[str, type[Connector]] = {
    "linear": Linear,
    "mlp": MLP,
    "pixel-shuffle": PixelShuffleMLP,
    "qformer": QFormer,
    "perceiver": PerceiverResampler,
    "c-abstractor": CAbstractor,
    "concat": ConcatLinear,
    "conv1d": Conv1dLinear,
    "stack-swiglu": StackSwiGLU,
    "cformer": CFormer,
    "modality-adapter": ModalityAdapter,
}


def build_connector(name: str, **options: Any) -> Connector:
    """A connector by its short name, with its class's own options.

    Raises:
        NameNotFound: no such connector; the message lists the nearest.
        ConfigError: an option its class does not have; the message lists the nearest.
    """
    if name not in CONNECTORS:
        raise NameNotFound(f"no connector {name!r}; valid: {', '.join(CONNECTORS)}{nearest(name, CONNECTORS)}")
    cls = CONNECTORS[name]
    valid = list(inspect.signature(cls).parameters)
    for option in options:
        if option not in valid:
            raise ConfigError(
                f"{cls.__name__} has no option {option!r}; valid: {', '.join(valid)}{nearest(option, valid)}"
            )
    return cls(**options)


__all__ = [
    "CONNECTORS",
    "MLP",
    "CAbstractor",
    "CFormer",
    "ConcatLinear",
    "Connector",
    "Conv1dLinear",
    "GatedCrossAttention",
    "GatedCrossAttentionBlock",
    "Linear",
    "ModalityAdapter",
    "PerceiverResampler",
    "PixelShuffleMLP",
    "QFormer",
    "StackSwiGLU",
    "build_connector",
    "load_mlp",
    "load_qformer",
]
