"""The C-Abstractor's RegNet stages against timm's, and its positions on grids of other sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmpeft.connectors import CAbstractor
from mmpeft.connectors.conv import reg_stage


@pytest.mark.parametrize(("in_dim", "out_dim"), [(12, 8), (8, 8)])
def test_stage_equals_timm(in_dim: int, out_dim: int) -> None:
    """The stages Honeybee takes from timm: LayerNorm2d, SiLU, depthwise 3x3, squeeze-and-excite at a quarter."""
    regnet = pytest.importorskip("timm.models.regnet")
    layers = pytest.importorskip("timm.layers")
    theirs = regnet.RegStage(2, in_dim, out_dim, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=layers.LayerNorm2d)
    ours = reg_stage(2, in_dim, out_dim)
    names = {
        "conv1.conv": "conv1", "conv1.bn": "norm1", "conv2.conv": "conv2", "conv2.bn": "norm2", "se.fc1": "excite.down",
        "se.fc2": "excite.up", "conv3.conv": "conv3", "conv3.bn": "norm3", "downsample.conv": "shortcut.0",
        "downsample.bn": "shortcut.1",
    }  # fmt: skip
    state = {}
    for name, tensor in theirs.state_dict().items():
        block, part = name.split(".", 1)
        part, kind = part.rsplit(".", 1)
        state[f"{int(block[1:]) - 1}.{names[part]}.{kind}"] = torch.randn_like(tensor)
    ours.load_state_dict(state)  # strict: the same tensors, none more
    for name, tensor in theirs.state_dict().items():
        block, part = name.split(".", 1)
        part, kind = part.rsplit(".", 1)
        tensor.copy_(state[f"{int(block[1:]) - 1}.{names[part]}.{kind}"])
    x = torch.randn(2, in_dim, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)


def test_positions_follow_the_grid() -> None:
    """At the table's own size the table is added as it is; elsewhere it is interpolated, rows to rows."""
    connector = CAbstractor(in_dim=4, out_dim=6, num_queries=4, hidden_dim=8, depth=1, position_side=2, grid=(2, 6))
    x = torch.randn(2, 12, 4)
    with torch.no_grad():
        connector.positions.zero_()
        without, _ = connector(x)
        connector.positions[:2] = 5.0  # the upper row of the 2 x 2 table
        with_upper, _ = connector(x)
        upper = x.unflatten(1, (2, 6)).clone()
        upper[:, 0] += 5.0  # 2 rows onto 2: exact; columns are constant
        connector.positions.zero_()
        expected, _ = connector(upper.flatten(1, 2))
    assert not torch.allclose(without, with_upper)
    torch.testing.assert_close(with_upper, expected)
