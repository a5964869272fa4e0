"""Hub names out of a filled cache, offline: folders of the libraries' own formats, laid out as huggingface_hub keeps them.

    hub/models--ORG--NAME/  blobs/HASH   refs/main   snapshots/COMMIT/FILE -> ../../blobs/HASH

The hub client reads its settings when it is imported, so everything is loaded in one process of its own; what it gives
is compared with the same model loaded by its folder here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmpeft.encoders import load_encoder, load_llm

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import json, os, sys
import torch
from mmpeft.encoders import load_encoder, load_llm
found = {}
for key, name in json.loads(sys.argv[1]).items():
    if key == "llm":
        llm = load_llm(name)
        with torch.no_grad():
            found[key] = llm.model(torch.tensor([[4, 6, 7], [4, 9, 11]])).logits
        found["words"] = llm.tokenizer("what digit")["input_ids"]
    else:
        found[key] = load_encoder(name, revision="main" if key == "revision" else None).fingerprint()
torch.save(found, sys.argv[2])
"""


def put(hub: Path, repository: str, folder: str | Path) -> None:
    """A folder's files as a downloaded repository of the cache."""
    place = hub / f"models--{repository.replace('/', '--')}"
    for part in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (place / part).mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    for file in sorted(p for p in Path(folder).iterdir() if p.is_file()):
        blob = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, place / "blobs" / blob)
        (place / "snapshots" / COMMIT / file.name).symlink_to(Path("..", "..", "blobs", blob))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, hf_vision, hf_audio, hf_text, llama, timm_folder, open_clip_folder):
    """name of a case -> (what the process of its own got, the folder)."""
    import timm
    from safetensors.torch import save_file

    home = tmp_path_factory.mktemp("hf")
    hub = home / "hub"
    tagged = home / "tagged"  # timm's own repository of a registry name and tag
    tagged.mkdir()
    torch.manual_seed(0)
    tag = timm.models.get_pretrained_cfg("test_vit").tag
    model = timm.create_model("test_vit", pretrained=False)
    save_file(model.state_dict(), tagged / "model.safetensors")
    (tagged / "config.json").write_text(json.dumps({"architecture": "test_vit", "num_classes": model.num_classes}))
    cases = {
        "siglip": ("hf:org/siglip", hf_vision["siglip"]),
        "revision": ("hf:org/dinov2", hf_vision["dinov2"]),
        "wav2vec2": ("hf:org/wav2vec2", hf_audio["wav2vec2"]),
        "whisper": ("hf:org/whisper", hf_audio["whisper"]),
        "bert": ("hf:org/bert", hf_text["bert"]),
        "timm": ("timm:hf-hub:org/vit", timm_folder),
        "tag": (f"timm:test_vit.{tag}", tagged),
        "open_clip": ("open_clip:hf-hub:org/clip", open_clip_folder),
        "llm": ("hf:org/llama", llama),
    }
    for key, (name, folder) in cases.items():
        put(hub, f"timm/test_vit.{tag}" if key == "tag" else name.rpartition(":")[2], folder)
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    out = home / "found.pt"
    command = [sys.executable, "-c", LOAD, json.dumps({k: name for k, (name, _) in cases.items()}), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out), {k: str(folder) for k, (_, folder) in cases.items()}


@pytest.mark.parametrize("case", ["siglip", "revision", "wav2vec2", "whisper", "bert", "timm", "open_clip"])
def test_an_encoder_of_the_cache_is_the_one_of_its_folder(loaded, case) -> None:
    found, folders = loaded
    assert found[case] == load_encoder(folders[case]).fingerprint()


def test_timms_own_name_and_tag_are_found_in_the_cache(loaded) -> None:
    found, folders = loaded
    weights = str(Path(folders["tag"]) / "model.safetensors")
    assert found["tag"] == load_encoder("timm:test_vit", weights=weights).fingerprint()


def test_a_language_model_and_its_tokenizer(loaded) -> None:
    found, folders = loaded
    here = load_llm(folders["llm"])
    with torch.no_grad():
        expected = here.model(torch.tensor([[4, 6, 7], [4, 9, 11]])).logits
    assert torch.equal(found["llm"], expected) and found["words"] == here.tokenizer("what digit")["input_ids"]
