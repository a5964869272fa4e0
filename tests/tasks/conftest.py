"""A quiet trainer, and one tokenizer for the folder."""

import logging

import pytest

from tests.multimodal.kit import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def make_trainer(tmp_path):
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    def make(**options):
        defaults = {
            "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
            "enable_checkpointing": False, "default_root_dir": tmp_path, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
        }  # fmt: skip
        return lightning.Trainer(**defaults | options)

    return make
