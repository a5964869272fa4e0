"""Which methods PEFT and this package both have: `CODECS` for those that wrap modules one by one, the parameter names
of each PEFT type, and `files`, which the catalogue shows.

Types without a row are refused by name when read: this package has no such method.
"""

from __future__ import annotations

from collections.abc import Mapping

from mmpeft.adapters.peft.blocks import BONE, GRALORA, MISS
from mmpeft.adapters.peft.codec import Codec
from mmpeft.adapters.peft.products import HIRA, LOHA, LOKR
from mmpeft.adapters.peft.rotations import BOFT_CODEC, HRA_CODEC, OFT_CODEC
from mmpeft.adapters.peft.structured import ADALORA, BEFT, C3A_CODEC, DELORA, FOURIERFT, SHIRA

CODECS: Mapping[str, Codec] = {
    codec.kind: codec
    for codec in (
        ADALORA, BEFT, BOFT_CODEC, BONE, C3A_CODEC, DELORA, FOURIERFT, GRALORA, HIRA, HRA_CODEC, LOHA, LOKR, MISS,
        OFT_CODEC, SHIRA,
    )
}  # fmt: skip

BY_METHOD: Mapping[str, Codec] = {name: codec for codec in CODECS.values() for name in codec.methods}

# What stands between a module's path and the adapter's name in a live model, and what follows in a file.
_LORA = {"lora_A": ".weight", "lora_B": ".weight", "lora_embedding_A": "", "lora_embedding_B": ""}
LEAVES: Mapping[str, Mapping[str, str | None]] = {
    "LORA": {**_LORA, "lora_magnitude_vector": "", "token_adapter.trainable_tokens_delta": ""},
    "IA3": {"ia3_l": ""},
    "VERA": dict.fromkeys(("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"), ""),
    "RANDLORA": dict.fromkeys(("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"), ""),
    "LN_TUNING": {"ln_tuning_layers": None},  # a whole module, whose own names follow
    "TRAINABLE_TOKENS": {"trainable_tokens_delta": ""},
    **{kind: codec.leaves for kind, codec in CODECS.items()},
}

# Methods whose update is another's: they are written as that one and may share a file with it. LoRA+ and LoRA-FA are
# optimizers over an ordinary LORA in PEFT; QA-LoRA is a LoRA whose A repeats in groups.
SAME = {"lora+": "lora", "lora-fa": "lora", "qa-lora": "lora"}
SAME |= {name: codec.methods[0] for name, codec in BY_METHOD.items() if name != codec.methods[0]}
WEIGHT_METHODS = ("lora", "dora", "ia3", "vera", "randlora", *SAME, *BY_METHOD)
PROMPTS = ("prompt_tuning", "prefix", "prefix-tuning")  # tokens of a language model: see `prompts.py`
VALUES = ("full", "bitfit", "layernorm")  # trained base tensors: see `values.py`


def files(method: str) -> str:
    """How HF PEFT's files hold a method, in the catalogue's words; "" where they do not."""
    if method in SAME:
        kind = BY_METHOD[method].kind if method in BY_METHOD else SAME[method].upper()
        return _PARTLY.get(method, f"written as {kind}")
    return _PARTLY.get(method, "both ways" if method in (*WEIGHT_METHODS, *VALUES, *PROMPTS) else "")


_PARTLY = {
    "qa-lora": "read from use_qalora, written as LORA",
    "rocoft": "columns of an embedding",
    "prefix": "of a decoder with rotary positions",
    "prefix-tuning": "written as the prefix it makes",
}
