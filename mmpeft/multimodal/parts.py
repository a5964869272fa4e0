"""From the arguments of `MultimodalLM` to its parts: encoders by name, connectors built to fit, readers of raw media."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmpeft.connectors import MLP, Connector
from mmpeft.encoders import Encoder, load_encoder
from mmpeft.errors import ConfigError, nearest
from mmpeft.multimodal.sample import MediaReader


def make_encoder(modality: str, given: str | Mapping[str, Any] | Encoder) -> Encoder:
    """An encoder by name, by load_encoder's arguments, or as it is."""
    options: Any = {"name": given} if isinstance(given, str) else given
    encoder = load_encoder(**{"modality": modality, **options}) if isinstance(options, Mapping) else options
    if encoder.modality != modality:
        raise ConfigError(f"{encoder.name!r} reads {encoder.modality}, it was given as {modality}=")
    return encoder


def make_connectors(
    given: Connector | Mapping[str, Connector] | None, widths: Mapping[str, int], embedding: Tensor
) -> dict[str, Connector]:
    """One built connector for every modality; an output norm of a new one starts at the scale of the embeddings [V, D]."""
    if isinstance(given, Mapping):
        for name in given:
            if name not in widths:
                valid = ", ".join(widths) or "none: give image=, audio= or state="
                raise ConfigError(f"connector for {name!r}, the model's inputs are {valid}{nearest(name, widths)}")
    elif given is not None and not widths:
        raise ConfigError("a connector needs something to connect: give image=, audio= or state=")
    elif given is not None and given.built and len(widths) > 1:
        raise ConfigError(f"one built connector cannot serve {' and '.join(widths)}: give a mapping by modality")
    connectors: dict[str, Connector] = {}
    for modality, width in widths.items():
        one = given.get(modality) if isinstance(given, Mapping) else given
        connector = MLP(depth=2) if one is None else copy.deepcopy(one) if len(widths) > 1 and not one.built else one
        new = not connector.built
        connectors[modality] = connector.build(width, embedding.shape[1])
        if new and connector.output_norm is not None and not embedding.is_meta:
            connector.set_output_std(float(embedding.float().std()))
    return connectors


def make_reader(modality: str, encoder: Encoder | None, connector: Connector) -> MediaReader:
    return MediaReader(
        modality,
        preprocess=None if encoder is None else encoder.preprocess,
        encoder_tokens=None if encoder is None else encoder.num_tokens,
        connector_tokens=connector.num_tokens,
        width=connector.in_dim,
    )
