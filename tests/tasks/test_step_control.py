"""Every controller under Lightning, by its class path as YAML gives it: a resumed run ends where the whole run does, an
optimizer step counts once whatever is accumulated, and what is added to the loss is what a plain loop adds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.adapters.state import slots
from mmpeft.errors import ConfigError, NameNotFound
from mmpeft.tasks import AdapterTask, StepControl
from mmpeft.tasks.step_control import training_loss

lightning = pytest.importorskip("lightning")
jsonargparse = pytest.importorskip("jsonargparse")

X, Y = (torch.randn(24, n, generator=torch.Generator().manual_seed(n)) for n in (6, 4))


class Regress(AdapterTask):
    """Mean squared error a sample; batches of (x [B, 6], y [B, 4])."""

    def training_step(self, batch, index):
        x, y = batch
        self.log("loss", 0.0)
        return self.shared_loss((self.model(x) - y).square().sum(), len(x))


class Host(nn.Module):
    """Three numbered layers that can be adapted."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        parts = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)]
        self.layers = nn.Sequential(*parts)

    def forward(self, x):
        return self.layers(x)


def host():
    return Host()


def loader(size=4, n=24):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X[:n], Y[:n]), size)


class Points(lightning.LightningDataModule):
    def train_dataloader(self):
        return loader()


def deltas(model):
    return [d for _, _, s in slots(model) for _, d in s.deltas()]


def tensors(model):
    return {f"{d.site.name} {n}": p.detach().clone() for d in deltas(model) for n, p in d.named_parameters()}


def parsed(callback):
    """A callback from its YAML form."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(lightning.Callback, "callback")
    return parser.instantiate(parser.parse_object({"callback": callback})).callback


def step_control(of, weight=1.0, /, **options):
    controller = {"class_path": f"mmpeft.{of}", "init_args": options}
    return parsed(
        {"class_path": "mmpeft.tasks.StepControl", "init_args": {"controller": controller, "weight": weight}}
    )


def adam(groups):
    return torch.optim.Adam(groups, lr=0.02)


def task(plan, make=adam, model=None):
    torch.manual_seed(1)
    return Regress(model or host(), plan, lr=0.02, schedule="constant", warmup=0, optimizer=make)


BLOCKS = "layers.{0,2,4}"
LORA = {BLOCKS: mmpeft.LoRA(rank=2)}
BUDGET = {"class_path": "mmpeft.Budget", "init_args": {"target": 1, "total_steps": 12, "warmup": 1, "final": 3}}


def sm3(groups):
    return mmpeft.SM3(groups, lr=0.05, model=MODEL[0])


MODEL = []  # the host of the run that is being set up, for SM3

# name: plan, the callback's options; the optimizer where it matters
ROWS = {
    "FLOPGates": ({BLOCKS: mmpeft.FLOP()}, {"sparsity": 0.5, "steps": 8}),
    "DiffGates": ({BLOCKS: mmpeft.DiffPruning()}, {"weight": 0.01, "seed": 3}),
    "APTController": ({BLOCKS: mmpeft.APT(rank=3, start=1)}, {"sparsity": 0.5, "begin": 2, "end": 9, "grow_every": 4}),
    "Density": (LORA, {"pattern": "layers.4", "weight": 0.5}),
    "LoRAPruner": ({BLOCKS: mmpeft.LoRAPrune(rank=2)}, {"sparsity": 0.5, "begin": 1, "end": 10}),
    "LHSPG": ({BLOCKS: mmpeft.LoRAPrune(rank=2)}, {"sparsity": 0.5, "begin": 1, "end": 11, "periods": 2}),
    "RosePruner": ({BLOCKS: mmpeft.RoseLoRA(rank=2, sparsity=0.5)}, {"begin": 1, "end": 10}),
    "ChildMask": ({BLOCKS: "full"}, {"p": 0.4, "seed": 2}),
    "TopGradient": ({BLOCKS: "full"}, {"density": 0.2}),
    "WorstSamples": ({BLOCKS: "full"}, {"density": 0.2, "worst": 2, "every": 5, "pool": 6}),
    "RankController": ({BLOCKS: mmpeft.AdaLoRA(rank=3)}, {"policy": BUDGET, "weight": 0.5}),
    "LayerSampler": (LORA, {"active": 2, "suppressed": 1, "every": 3}),
    "AdapterDrop": (LORA, {"most": 2, "seed": 4}),
    "SpIELMoves": ({BLOCKS: mmpeft.SpIEL(density=0.2)}, {"share": 0.5, "every": 4, "end": 11, "batches": 2}),
    "SpIELMoves of -MA": ({BLOCKS: mmpeft.SpIELMA(density=0.2)}, {"share": 0.5, "every": 4, "end": 11}),
    "Restarts": ({BLOCKS: mmpeft.ReLoRA(rank=1, stages=3)}, {"every": 4, "warmup": 2, "keep": 0.2}),
    "Unloads": ({BLOCKS: mmpeft.PeriodicLoRA(rank=1, stages=3)}, {"every": 4}),
    "Once": ({BLOCKS: mmpeft.DeltaLoRA(rank=2, wait=True)}, {"of": "mmpeft.begin_delta_lora", "at": 4}),
    "Draws": ({BLOCKS: mmpeft.Mixout(p=0.5)}, {"of": "mmpeft.draw_mixout", "seed": 3}),
    "Penalty": ({BLOCKS: mmpeft.StructuredMask()}, {"of": "mmpeft.mask_l1", "weight": 0.01}),
}


def row(name):
    plan, options = copy.deepcopy(ROWS[name])
    return plan, step_control(name.partition(" ")[0], options.pop("weight", 1.0), **options), sm3 if "-MA" in name else None


def fit(make_trainer, name, *, epochs, model=None, ckpt=None, save=None):
    plan, callback, optimizer = row(name)
    lit = task(plan, *([optimizer] if optimizer else []), model=model)
    MODEL[:] = [lit.model]
    trainer = make_trainer(max_epochs=epochs, callbacks=[callback])
    torch.manual_seed(epochs)  # nothing may depend on the global generator
    trainer.fit(lit, loader(), ckpt_path=ckpt)
    if save is not None:
        trainer.save_checkpoint(save)
    return tensors(lit.model), callback


@pytest.mark.parametrize("name", ROWS)
def test_a_resumed_run_ends_where_the_whole_run_does(make_trainer, tmp_path, name):
    start = host()
    torch.manual_seed(7)
    mmpeft.attach(start, ROWS[name][0], check=False)
    begin = tensors(start)
    whole, callback = fit(make_trainer, name, epochs=2, model=copy.deepcopy(start))
    half = tmp_path / "half.ckpt"
    fit(make_trainer, name, epochs=1, model=copy.deepcopy(start), save=half)
    resumed, other = fit(make_trainer, name, epochs=2, model=copy.deepcopy(start), ckpt=half)
    assert set(whole) == set(resumed)
    for key in whole:
        assert torch.equal(whole[key], resumed[key]), key
    torch.testing.assert_close(callback.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert any(not torch.equal(begin[key], whole[key]) for key in whole)


@pytest.mark.parametrize("name", ["FLOPGates", "RankController", "Penalty", "LoRAPruner", "Unloads", "ChildMask"])
def test_steps_and_what_is_added_are_those_of_optimizer_steps(make_trainer, name):
    """Micro-batches of 2, two a step and the last alone, give what the same samples in one batch each step give."""
    plan, _ = ROWS[name]
    start = host()
    torch.manual_seed(7)
    mmpeft.attach(start, plan, check=False)
    found = []
    for size, accumulate in ((2, 2), (4, 1)):
        lit, callback = task(plan, sgd, copy.deepcopy(start)), row(name)[1]
        options = {"callbacks": [callback], "accumulate_grad_batches": accumulate}
        make_trainer(max_epochs=3, **options).fit(lit, loader(size, n=10))  # steps of 4, 4 and 2 samples
        found.append(tensors(lit.model))
        assert getattr(callback.controller, "steps", 9) == 9
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-4, atol=1e-5, msg=key)


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.02)


def test_a_penalty_of_activations_is_part_of_each_micro_batch_loss(make_trainer):
    plan, found = LORA, []
    start = host()
    torch.manual_seed(7)
    mmpeft.attach(start, plan, check=False)
    for size, accumulate in ((4, 2), (8, 1)):
        lit, callback = task(plan, sgd, copy.deepcopy(start)), step_control("Density", 0.5, pattern="layers.4")
        make_trainer(max_epochs=2, callbacks=[callback], accumulate_grad_batches=accumulate).fit(lit, loader(size))
        found.append(tensors(lit.model))
        assert not lit.model.layers[4]._forward_pre_hooks
    plain = copy.deepcopy(start).train()
    density, optimizer = mmpeft.Density(plain, "layers.4"), sgd(mmpeft.parameter_groups(plain, lr=0.02))
    for _ in range(2):
        for x, y in loader(8):
            with density:
                loss = (plain(x) - y).square().sum() / len(x) + 0.5 * density.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found.append(tensors(plain))
    for key in found[0]:
        for other in found[1:]:
            torch.testing.assert_close(found[0][key], other[key], rtol=1e-4, atol=1e-6, msg=key)


def test_flop_under_a_task_is_the_plain_loop_and_closes_components(make_trainer):
    start = host()
    mmpeft.attach(start, {BLOCKS: mmpeft.FLOP()}, check=False)
    lit, callback = task(None, adam, copy.deepcopy(start)), step_control("FLOPGates", sparsity=0.6, steps=30, lr=0.5)
    make_trainer(max_epochs=20, callbacks=[callback]).fit(lit, loader())
    plain = start.train()
    gates, optimizer = mmpeft.FLOPGates(plain, sparsity=0.6, steps=30, lr=0.5), adam(mmpeft.parameter_groups(plain, lr=0.02))
    shares = []
    for _ in range(20):
        for x, y in loader():
            gates.draw()
            loss = (plain(x) - y).square().sum() / len(x) + gates.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            shares.append(gates.step())
    assert shares[0] < 0.2 and shares[-1] > 0.5
    assert callback.controller.l1 == pytest.approx(gates.l1, rel=1e-3)
    for key, t in tensors(plain).items():
        torch.testing.assert_close(tensors(lit.model)[key], t, rtol=1e-2, atol=1e-3, msg=key)


def test_the_training_loss_of_a_batch_is_its_mean_and_leaves_no_trace(make_trainer):
    seen = []

    class Look(mmpeft.Controller):
        def __init__(self, model):
            self.model = model

        def look(self, loss):
            modes = []
            hook = self.model.register_forward_hook(lambda *_: modes.append([d.training for d in deltas(self.model)]))
            seen.append(float(loss().detach()))
            hook.remove()
            assert modes[-1] == [False] * 3  # the first forward is also the proof that every site is alive

    class Check(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            x, y = batch
            expected = (module.model(x) - y).square().sum().detach() / len(x)
            if index % 2 == 0:
                assert seen[-1] == pytest.approx(float(expected), rel=1e-5)
            assert all(d.training for d in deltas(module.model)) and "log" not in vars(module)
            assert module._window.total == (4 if index % 2 else 0)

    lit = task(LORA)
    make_trainer(max_epochs=1, callbacks=[StepControl(Look), Check()], accumulate_grad_batches=2).fit(lit, loader())
    assert len(seen) == 3


def test_a_mapping_of_a_loss_is_read_too():
    class Plain:
        def training_step(self, batch, index):
            self.log("x", 1)
            return {"loss": batch}

    assert training_loss(Plain(), 3.0) == 3.0


def test_hooks_are_gone_after_an_error(make_trainer):
    lit, callback = task(LORA), step_control("Density", pattern="layers.4")

    class Stop(lightning.Callback):
        def on_before_backward(self, trainer, module, loss):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        make_trainer(max_epochs=1, callbacks=[callback, Stop()]).fit(lit, loader())
    assert not lit.model.layers[4]._forward_pre_hooks


def test_two_controllers_of_one_trainer_keep_their_states_apart(make_trainer, tmp_path):
    plan = {"layers.{0,2}": mmpeft.LoRAPrune(rank=2), "layers.4": mmpeft.FLOP()}
    callbacks = [
        step_control("LoRAPruner", sparsity=0.5, begin=1, end=10),
        step_control("FLOPGates", sparsity=0.5, steps=8),
    ]
    trainer = make_trainer(max_epochs=1, callbacks=callbacks)
    trainer.fit(task(plan), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    states = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]
    assert states["StepControl:FLOPGates"]["l1"] == callbacks[1].controller.l1
    assert set(states["StepControl:LoRAPruner"]["scores"]) == {"layers.0.weight", "layers.2.weight"}
    with pytest.raises(RuntimeError, match="state_key"):
        make_trainer(callbacks=[step_control("ChildMask", p=0.5), step_control("ChildMask", p=0.1)])


@pytest.mark.parametrize(
    "plan, make, error, message",
    [
        (LORA, lambda: step_control("FLOPGates", sparsity=0.5, steps=8), ConfigError, "no site of FLOP"),
        (LORA, lambda: StepControl(lambda model: model), ConfigError, "gives a Host"),
        ({BLOCKS: "full"}, lambda: step_control("TopGradient", 2.0, density=0.1), ConfigError, "adds nothing to the loss"),
        (LORA, lambda: step_control("Density", pattern="layers.9"), NameNotFound, "layers.9"),
        (LORA, lambda: step_control("AdapterDrop", most=3), ConfigError, "most 3 of 3 layers"),
        ({BLOCKS: mmpeft.ReLoRA(rank=1, stages=2)}, lambda: step_control("Restarts", every=2, warmup=1), ConfigError, "3 stages"),
        ({BLOCKS: mmpeft.SpIELMA()}, lambda: step_control("SpIELMoves", share=0.5, every=2, end=5), ConfigError, "SM3"),
        (LORA, lambda: step_control("Penalty", of="mmpeft.mask_l1", options={"nam": "a"}), ConfigError, "nam"),
        (LORA, lambda: step_control("Penalty", of="mmpeft.mask_l1"), ConfigError, "StructuredMask"),
        (LORA, lambda: step_control("Once", of="mmpeft.begin_delta_lora", at=6), ConfigError, "at 6; .* 6 steps"),
        (LORA, lambda: step_control("Draws", of="mmpeft.draw_mixout", options={"p": 2}), ConfigError, "'p'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_the_first_step(make_trainer, plan, make, error, message):
    with pytest.raises(error, match=message):
        make_trainer(max_epochs=1, callbacks=[make()]).fit(task(plan), loader())


def test_a_wrong_option_is_refused_by_the_parser():
    with pytest.raises(jsonargparse.ArgumentError, match="sparsit"):
        step_control("FLOPGates", sparsit=0.5, steps=8)


@pytest.mark.parametrize(
    "plan, name, options",
    [
        ({"FLOP": {}}, "FLOPGates", {"sparsity": 0.5, "steps": 4}),
        ({"APT": {"rank": 2, "start": 1}}, "APTController", {"sparsity": 0.5, "begin": 1, "end": 4}),
        ({"LoRA": {"rank": 2}}, "Density", {"pattern": "layers.4"}),
        ({"StructuredMask": {}}, "LightPEFT", {"at": 2, "masks": 0.5, "modules": 0.5}),
    ],
)
def test_mmpeft_fit_runs_it_from_a_yaml_file(tmp_path, monkeypatch, plan, name, options):
    import yaml

    from mmpeft import cli

    here = "tests.tasks.test_step_control"
    rules = [{"match": "layers.{0,4}", "method": plan}]
    if name == "LightPEFT":
        rules = [{"match": "layers.2", "method": plan}, {"match": "layers.{0,4}", "method": {"LoRA": {"rank": 2}}}]
    control = {"controller": {"class_path": f"mmpeft.{name}", "init_args": options}}
    callbacks = [
        {"class_path": "mmpeft.tasks.StepControl", "init_args": control},
        {"class_path": "mmpeft.tasks.AdapterCheckpoint", "init_args": {"folder": str(tmp_path / "adapter")}},
    ]
    config = {
        "model": {"class_path": f"{here}.Regress", "init_args": {"model": {"class_path": f"{here}.Host"}, "plan": rules}},
        "data": {"class_path": f"{here}.Points"},
        "trainer": {
            "max_epochs": 1, "accelerator": "cpu", "logger": False, "callbacks": callbacks, "enable_progress_bar": False,
            "enable_checkpointing": False, "enable_model_summary": False,
        },
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["fit", "--config", str(tmp_path / "config.yaml")]) == 0
    other = host()
    mmpeft.load(other, tmp_path / "adapter")
    kept = {d.site.path for d in deltas(other)}
    assert len(kept) == 2 and kept <= {"layers.0", "layers.2", "layers.4"}
