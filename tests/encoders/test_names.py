"""Names, folders and files: what is understood, and what each wrong one is told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmpeft.encoders import Encoder, load_encoder, load_llm
from mmpeft.encoders.names import Name, parse
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound


@pytest.mark.parametrize(
    ("text", "source", "rest", "random"),
    [
        ("timm:vit_base_patch16_siglip_224", "timm", "vit_base_patch16_siglip_224", False),
        ("timm:hf-hub:timm/vit.x", "timm", "hf-hub:timm/vit.x", False),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "open_clip", "ViT-B-32/laion2b_s34b_b79k", False),
        ("hf:google/siglip2-base-patch16-224", "hf", "google/siglip2-base-patch16-224", False),
        ("random:timm:vit_tiny_patch16_224", "timm", "vit_tiny_patch16_224", True),
        ("torchaudio:WAV2VEC2_BASE", "torchaudio", "WAV2VEC2_BASE", False),
    ],
)
def test_grammar(text: str, source: str, rest: str, random: bool) -> None:
    assert parse(text) == Name(text, source, rest, random)


def test_folders_say_which_library_wrote_them(
    timm_folder: str, open_clip_folder: str, hf_vision: dict[str, str]
) -> None:
    sources = {timm_folder: "timm", open_clip_folder: "open_clip", hf_vision["vit"]: "hf"}
    for folder, source in sources.items():
        assert parse(folder).source == source
        assert parse(f"random:{folder}") == Name(f"random:{folder}", source, folder, True)
        load_encoder(f"{source}:{folder}")


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("", ConfigError, "name is a text"),
        ("timm:", ConfigError, "names no model"),
        ("tim:vit_tiny_patch16_224", NameNotFound, "nearest: timm"),
        ("timm:vit_tiny_patch16_22", NameNotFound, "nearest: vit_tiny_patch16_224"),
        ("timm:vit_tiny_patch16_224.augreg_in21", NameNotFound, "nearest: augreg_in21k"),
        ("open_clip:ViT-B-31/openai", NameNotFound, "nearest: ViT-B-32"),
        ("open_clip:ViT-B-32/laion2b_s34b", NameNotFound, "laion2b_s34b_b79k"),
        ("open_clip:ViT-B-32", NameNotFound, "names no weights"),
        ("open_clip:ViT-B-32/w.safetensors", NameNotFound, "weights="),
        ("google/siglip-base", NameNotFound, "hf:google/siglip-base"),
        ("hf:./no/such", NameNotFound, "no folder"),
        ("package:efficientnet", NameNotFound, "nearest: efficientnet-lite0"),
        ("package:smollm2-135m-instruct", NameNotFound, "kind 'llm'"),
    ],
)
def test_wrong_names_are_told_the_nearest(name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        load_encoder(name)


def test_wrong_kind_of_model(timm_folder: str, hf_audio: dict[str, str]) -> None:
    with pytest.raises(FileFormatError, match="written by 'timm'"):
        load_encoder(f"open_clip:{timm_folder}")
    with pytest.raises(FileFormatError, match="no transformers model"):
        load_llm(timm_folder)
    with pytest.raises(ConfigError, match="no encoder of texts"):
        load_encoder(timm_folder, modality="text")
    with pytest.raises(NameNotFound, match="hf:org/name"):
        load_llm("org/name")


def test_folders_that_are_no_model(tmp_path, timm_folder: str) -> None:
    with pytest.raises(FileFormatError, match="holds nothing"):
        load_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileFormatError, match="model_type"):
        load_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text("{ no json")
    with pytest.raises(FileFormatError, match="JSON"):
        load_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FileFormatError, match="expected an object"):
        load_encoder(str(tmp_path))
    shutil.copy(f"{timm_folder}/config.json", tmp_path)
    with pytest.raises(FileFormatError, match="has no weights"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize("kind", ["timm", "hf", "open_clip", "llm"])
def test_pickled_weights_are_refused_and_conversion_is_told(
    kind: str, tmp_path, timm_folder: str, hf_vision: dict[str, str], open_clip_folder: str, llama: str
) -> None:
    source = {"timm": timm_folder, "hf": hf_vision["vit"], "open_clip": open_clip_folder, "llm": llama}[kind]
    folder = shutil.copytree(source, tmp_path / "m")
    (weights,) = folder.glob("*.safetensors")
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(FileFormatError, match="pickle.*save_file"):
        (load_llm if kind == "llm" else load_encoder)(str(folder))


@pytest.mark.parametrize("kind", ["timm", "hf", "open_clip", "llm"])
def test_truncated_weights_are_refused(
    kind: str, tmp_path, timm_folder: str, hf_vision: dict[str, str], open_clip_folder: str, llama: str
) -> None:
    source = {"timm": timm_folder, "hf": hf_vision["vit"], "open_clip": open_clip_folder, "llm": llama}[kind]
    folder = shutil.copytree(source, tmp_path / "m")
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FileFormatError, match="could not be loaded"):
        (load_llm if kind == "llm" else load_encoder)(str(folder))


def test_a_checkpoint_without_a_weight_is_refused(tmp_path, hf_vision: dict[str, str]) -> None:
    folder = shutil.copytree(hf_vision["vit"], tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    lost = next(k for k in state if "layernorm" in k)
    save_file({k: v for k, v in state.items() if k != lost}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FileFormatError, match="lacks"):
        load_encoder(str(folder))


# --- a weights file of one's own --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["timm", "hf", "open_clip"])
def test_weights_file(kind: str, tmp_path, timm_folder: str, hf_vision: dict[str, str], open_clip_folder: str) -> None:
    source = {"timm": timm_folder, "hf": hf_vision["vit"], "open_clip": open_clip_folder}[kind]
    (weights,) = Path(source).glob("*.safetensors")
    x = torch.randn(2, 3, 32, 32)
    want = load_encoder(source)(x)[0]
    assert not torch.allclose(load_encoder(f"random:{source}")(x)[0], want)
    torch.testing.assert_close(load_encoder(source, weights=str(weights))(x)[0], want)

    state = load_file(weights)
    first = next(iter(state))
    save_file({k: v for k, v in state.items() if k != first}, tmp_path / "less.safetensors")
    with pytest.raises(FileFormatError, match="missing|lacks|could not be loaded"):
        load_encoder(source, weights=str(tmp_path / "less.safetensors"))
    torch.save(state, tmp_path / "w.bin")
    with pytest.raises(FileFormatError, match="pickle"):
        load_encoder(source, weights=str(tmp_path / "w.bin"))
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(FileFormatError, match="cannot be read as safetensors"):
        load_encoder(source, weights=str(tmp_path / "junk.safetensors"))
    with pytest.raises(NameNotFound, match="not found"):
        load_encoder(source, weights=str(tmp_path / "none.safetensors"))


def test_a_file_as_a_name_is_told_to_give_the_architecture(timm_folder: str) -> None:
    with pytest.raises(FileFormatError, match="weights="):
        load_encoder(f"{timm_folder}/model.safetensors")


def test_misfitting_weights_name_their_keys(tmp_path, timm_folder: str) -> None:
    state = load_file(f"{timm_folder}/model.safetensors")
    state["head.weight"] = state["head.weight"][:, :-1].contiguous()
    state["alien"] = torch.zeros(1)
    del state["norm.bias"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(
        FileFormatError, match=r"1 missing: norm.bias; 1 extra: alien; 1 misshapen: head.weight is \[5, 31\]"
    ):
        load_encoder(timm_folder, weights=str(tmp_path / "w.safetensors"))


def test_yaml_names_the_loaders_by_class_path() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--image", type=str | Encoder)
    options = {"name": "random:timm:resnet18", "pool": [2, 2], "image_size": 64, "dtype": "bfloat16"}
    given = parser.parse_object({"image": {"class_path": "mmpeft.encoders.load_encoder", "init_args": options}})
    encoder = (
        parser.instantiate(given).image if hasattr(parser, "instantiate") else parser.instantiate_classes(given).image
    )
    assert encoder.num_tokens((64, 64)) == 4 and next(encoder.parameters()).dtype == torch.bfloat16


# --- the hub ----------------------------------------------------------------------------------------------------------

OFFLINE = """
import os
os.environ["HF_HUB_OFFLINE"] = "1"
from mmpeft.encoders import load_encoder, load_llm
from mmpeft.errors import NameNotFound
names = ["hf:google/siglip2-base-patch16-224", "timm:vit_tiny_patch16_224", "timm:hf-hub:org/name",
         "open_clip:ViT-B-32/laion2b_s34b_b79k", "open_clip:hf-hub:org/name"]
for load, name in [(load_encoder, n) for n in names] + [(load_llm, "hf:HuggingFaceTB/SmolLM2-135M-Instruct")]:
    try:
        load(name)
        raise SystemExit(f"{name} loaded")
    except NameNotFound as error:
        assert name in str(error) and os.environ["HF_HOME"] in str(error) and "give its path" in str(error), error
"""


def test_hub_that_gives_nothing(tmp_path) -> None:
    """The error names the id, the cache that was tried, and the way without the hub; in a process of its own, offline."""
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", OFFLINE], check=False, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_the_encoders_imports_no_library() -> None:
    code = (
        "import sys, mmpeft.encoders\n"
        "heavy = {'transformers', 'timm', 'open_clip', 'torchaudio', 'torchvision', 'PIL', 'lightning'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
