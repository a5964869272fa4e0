"""One tokenizer and one tiny model for the whole folder; what they are made of is in kit.py."""

import pytest

from .kit import build_model, build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    return build_model("llama", tokenizer)
