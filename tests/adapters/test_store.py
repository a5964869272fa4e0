"""Files: exact round trips, strictness, and a crash at any moment leaves a folder that loads."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mmpeft
from mmpeft.adapters import store
from mmpeft.errors import BaseMismatch, ConfigError, FileFormatError, NameNotFound, Unsupported

PLAN = {"0": mmpeft.LoRA(rank=3), "2": mmpeft.DoRA(rank=2), "4": "full"}


def make(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 3))


def filled(seed: int = 0, plan: object = PLAN, name: str = "a") -> nn.Module:
    model = mmpeft.attach(make(seed), plan, name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for group in mmpeft.parameter_groups(model, lr=1.0):
            for p in group["params"]:
                p.copy_(torch.randn(p.shape, generator=generator))
    return model


X = torch.randn(4, 7, generator=torch.Generator().manual_seed(2))


def test_round_trip_is_exact_and_holds_only_what_was_trained(tmp_path):
    model = filled()
    mmpeft.save(model, tmp_path / "a", metadata={"accuracy": 0.5})
    other = make()
    assert mmpeft.load(other, tmp_path / "a") == "a"
    assert torch.equal(other(X), model(X))
    assert mmpeft.read_metadata(tmp_path / "a") == {"accuracy": 0.5}
    saved = load_file(tmp_path / "a" / "adapter.safetensors")
    assert set(saved) == {
        "0.lora__weight.A",
        "0.lora__weight.B",
        "2.dora__weight.A",
        "2.dora__weight.B",
        "2.dora__weight.m",
        "4.full__weight.value",
        "4.full__bias.value",
    }
    mmpeft.save(other, tmp_path / "b")
    assert (tmp_path / "a" / "adapter.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter.safetensors"
    ).read_bytes()


def test_loads_under_another_name_beside_the_first(tmp_path):
    mmpeft.save(filled(), tmp_path)
    model = make()
    mmpeft.load(model, tmp_path)
    mmpeft.load(model, tmp_path, name="b")
    with mmpeft.use(model, "a"):
        first = model(X)
    assert torch.equal(model(X), first)


def test_another_base_is_refused_and_left_as_it_was(tmp_path):
    mmpeft.save(filled(), tmp_path)
    other = make(seed=5)
    before = other(X)
    with pytest.raises(BaseMismatch, match="other values"):
        mmpeft.load(other, tmp_path)
    assert type(other[0]) is nn.Linear and torch.equal(other(X), before)
    mmpeft.load(other, tmp_path, check_base=False)


def test_a_fully_trained_head_is_no_part_of_the_base(tmp_path):
    mmpeft.save(filled(), tmp_path)
    other = make()
    nn.init.normal_(other[4].weight)  # a fresh random head
    mmpeft.load(other, tmp_path)
    assert torch.equal(other(X), filled()(X))


def test_the_fingerprint_ignores_precision_but_not_values():
    from mmpeft.adapters.fingerprint import fingerprint

    model = make()
    assert fingerprint(model) == fingerprint(make().bfloat16())
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    assert fingerprint(model) != fingerprint(make())


@pytest.mark.parametrize("damage", ["truncated", "pickle", "foreign", "tampered", "empty"])
def test_damaged_files_are_refused(tmp_path, damage):
    mmpeft.save(filled(), tmp_path)
    path = tmp_path / "adapter.safetensors"
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "pickle":
        torch.save({"x": torch.zeros(1)}, path)
    elif damage == "foreign":
        save_file({"weight": torch.zeros(2)}, path)
    elif damage == "tampered":
        path.write_bytes(data[:-4] + b"\x00\x00\x80\x3f")
    else:
        path.write_bytes(b"")
    model = make()
    with pytest.raises(FileFormatError, match="pickle|truncated|SHA-256"):
        mmpeft.load(model, tmp_path)
    assert type(model[0]) is nn.Linear


def _rewrite(folder, change):
    """Change the tensors of a saved adapter and make the description agree."""
    import hashlib

    tensors = change(load_file(folder / "adapter.safetensors"))
    save_file(tensors, folder / "adapter.safetensors")
    description = json.loads((folder / "adapter.json").read_text())
    description["sha256"] = hashlib.sha256((folder / "adapter.safetensors").read_bytes()).hexdigest()
    (folder / "adapter.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "0.lora__weight.B"}, "missing 0.lora__weight.B"),
        (lambda t: t | {"0.lora__weigth.B": torch.zeros(2)}, "extra 0.lora__weigth.B"),
        (lambda t: t | {"0.lora__weight.B": torch.zeros(9, 2)}, r"shape \(9, 2\), expected \(9, 3\)"),
        (lambda t: t | {"0.lora__weight.B": torch.full((9, 3), torch.nan)}, "0.lora__weight.B holds NaN"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, words):
    mmpeft.save(filled(), tmp_path)
    _rewrite(tmp_path, change)
    with pytest.raises(FileFormatError, match=words):
        mmpeft.load(make(), tmp_path)


def test_nothing_there_and_no_description(tmp_path):
    with pytest.raises(NameNotFound, match="no such folder"):
        mmpeft.load(make(), tmp_path / "nowhere")
    (tmp_path / "adapter.json").write_text("{}")
    with pytest.raises(FileFormatError, match="no mmpeft adapter description"):
        mmpeft.load(make(), tmp_path)


def test_nan_is_not_saved_and_the_old_adapter_stays(tmp_path):
    model = filled()
    mmpeft.save(model, tmp_path)
    before = (tmp_path / "adapter.safetensors").read_bytes()
    with torch.no_grad():
        next(p for g in mmpeft.parameter_groups(model, lr=1.0) for p in g["params"]).fill_(torch.nan)
    with pytest.raises(ConfigError, match="NaN"):
        mmpeft.save(model, tmp_path)
    assert (tmp_path / "adapter.safetensors").read_bytes() == before


@pytest.mark.parametrize("survivors", [0, 1, 2])
def test_a_crash_between_any_two_writes_leaves_the_old_or_the_new_adapter(tmp_path, monkeypatch, survivors):
    old = filled()
    mmpeft.save(old, tmp_path)
    new = filled()
    with torch.no_grad():
        for group in mmpeft.parameter_groups(new, lr=1.0):
            for p in group["params"]:
                p.add_(1)
    done = []
    real = store._atomic

    def dies(path, data):
        if len(done) == survivors:
            raise KeyboardInterrupt
        done.append(path)
        real(path, data)

    monkeypatch.setattr(store, "_atomic", dies)
    with pytest.raises(KeyboardInterrupt):
        mmpeft.save(new, tmp_path)
    model = make()
    mmpeft.load(model, tmp_path)
    assert torch.equal(model(X), old(X))
    assert not list(tmp_path.glob(".*"))


def test_several_adapters_need_a_name(tmp_path):
    model = filled()
    mmpeft.attach(model, {"2": mmpeft.LoRA(rank=1)}, "b")
    mmpeft.use(model, ["a", "b"])
    with pytest.raises(ConfigError, match="say which one"):
        mmpeft.save(model, tmp_path)
    with pytest.raises(NameNotFound, match="nearest: b"):
        mmpeft.save(model, tmp_path, name="bb")
    mmpeft.save(model, tmp_path, name="b")
    assert set(load_file(tmp_path / "adapter.safetensors")) == {"2.lora__weight.A", "2.lora__weight.B"}


def test_pissa_saves_its_frozen_pair_and_leaves_the_base_alone(tmp_path):
    plan = {"0": mmpeft.LoRA(rank=2, init_from="pissa")}
    model = filled(plan=plan)
    assert torch.equal(model[0]._parameters["weight"], make()[0].weight)
    mmpeft.save(model, tmp_path)
    other = make()
    mmpeft.load(other, tmp_path)
    assert torch.equal(other(X), model(X))


def test_vera_projections_come_from_the_seed(tmp_path):
    plan = {"{0,2}": mmpeft.VeRA(rank=5, seed=3)}
    model = filled(plan=plan)
    mmpeft.save(model, tmp_path)
    assert {k.rpartition(".")[2] for k in load_file(tmp_path / "adapter.safetensors")} == {"d", "b"}
    torch.manual_seed(99)
    other = make()
    mmpeft.load(other, tmp_path)
    assert torch.equal(other(X), model(X))


WRAPPERS = {
    "plain": lambda model: model,
    "data parallel": nn.DataParallel,
    "compiled": functools.partial(torch.compile, backend="eager"),
    "compiled twice over": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


class Pair(nn.Module):
    """A body whose parts can be wrapped one by one, and a head that `full` trains with its dropout."""

    def __init__(self):
        super().__init__()
        self.body = make()
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_saved_and_loaded_as_the_plain_one(tmp_path, wrap):
    torch.manual_seed(3)
    model = Pair()
    plan = {"body.{0,2}": mmpeft.LoRA(rank=2), "head": "full"}
    mmpeft.attach(model, plan, example=torch.randn(3, 7))
    mmpeft.save(model, tmp_path / "plain")
    mmpeft.save(wrap(model), tmp_path / "wrapped")
    for file in ("adapter.safetensors", "adapter.json"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "wrapped" / file).read_bytes()
    assert json.loads((tmp_path / "wrapped" / "adapter.json").read_text())["base"]["name"] == "Pair"
    torch.manual_seed(3)
    fresh = wrap(Pair())
    mmpeft.load(fresh, tmp_path / "wrapped")
    assert torch.equal(fresh.eval()(X), model.eval()(X))
    torch.manual_seed(3)
    again = wrap(Pair())
    assert mmpeft.attach(again, plan) is again  # patterns start at the model that is inside


def test_parts_that_are_compiled_keep_their_plain_names(tmp_path):
    torch.manual_seed(3)
    model = Pair()
    mmpeft.attach(model, {"body.{0,2}": mmpeft.LoRA(rank=2), "head": "full"}, example=torch.randn(3, 7))
    mmpeft.save(model, tmp_path / "plain")
    model.body = torch.compile(model.body, backend="eager")
    model.head = torch.compile(model.head, backend="eager")
    mmpeft.save(model, tmp_path / "parts")
    for file in ("adapter.safetensors", "adapter.json"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    model.train()
    assert model.head._orig_mod[0].training and not model.body._orig_mod[0].training


def test_attaching_inside_ddp_is_refused_by_name():
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module):  # a process group is not needed to be refused
            nn.Module.__init__(self)
            self.module = module

    with pytest.raises(Unsupported, match="attach first, then wrap"):
        mmpeft.attach(Wrapped(make()), PLAN)
