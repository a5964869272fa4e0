"""A method whose shapes do not fit the tensors of its place is refused by its name; a wrong example is not blamed on it."""

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import ConfigError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(5, 7)

    def forward(self, x, scale):
        return torch.tanh(self.up(x)) * scale


def test_a_misfit_names_the_adapter_and_leaves_the_model_alone():
    model = Net()
    model.up = nn.Sequential(model.up)  # what a container takes and gives is known only when it runs
    with pytest.raises(ConfigError, match=r"(?s)adapter 'a' does not fit.*adaptformer at up.*size of tensor"):
        mmpeft.attach(model, {"up": mmpeft.AdaptFormer(size=3)}, name="a", example=(torch.randn(3, 5), torch.ones(7)))
    assert type(model) is Net and type(model.up) is nn.Sequential and not hasattr(model, "_adapters")


def test_a_wrong_example_is_its_own_fault():
    with pytest.raises(RuntimeError, match="size of tensor") as caught:
        mmpeft.attach(Net(), {"up": mmpeft.Bottleneck(size=3)}, example=(torch.randn(3, 5), torch.ones(6)))
    assert "does not fit" not in str(caught.value)


@pytest.mark.parametrize("side", ["in", "out"])
def test_a_scale_of_all_rows_costs_one_frozen_product(side):
    """The column scale is on the input of the frozen product, not of a second one."""
    model, x = nn.Sequential(nn.Linear(10, 6)), torch.randn(4, 10)
    seen = mmpeft.inspect(model, {"0": mmpeft.IA3(side=side)}, example=x)
    assert seen.cost.forward_flops == seen.base_flops == 2 * 4 * 10 * 6
