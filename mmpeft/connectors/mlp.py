"""Token-wise projectors: one Linear (LLaVA-1, MiniGPT-4), or an MLP (LLaVA-1.5 `mlp2x_gelu` and deeper).

Each token is mapped on its own, so Q = T and the mask passes through. `projector` builds the stack of Linears used by
every connector that ends in an MLP. Weights start from PyTorch's default, as in LLaVA; `init_std` gives N(0, std) and
zero biases instead (nanoVLM .02).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from mmpeft.connectors.base import Connector, require_positive
from mmpeft.errors import ConfigError, nearest

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


def activation_module(name: str) -> nn.Module:
    """A new activation module by name.

    Raises:
        ConfigError: unknown name; the message lists the valid ones.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"unknown activation {name!r}; valid: {', '.join(ACTIVATIONS)}{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def projector(
    in_dim: int,
    hidden_dim: int,
    out_dim: int,
    *,
    depth: int,
    activation: str = "gelu",
    bias: bool = True,
    init_std: float | None = None,
) -> nn.Sequential:
    """`depth` Linears in_dim -> hidden_dim -> ... -> out_dim, activations between (keys 0, 2, 4, ... as in LLaVA)."""
    widths = [in_dim, *[hidden_dim] * (depth - 1), out_dim]
    layers: list[nn.Module] = []
    for i in range(depth):
        if i:
            layers.append(activation_module(activation))
        linear = nn.Linear(widths[i], widths[i + 1], bias=bias)
        if init_std is not None:
            nn.init.normal_(linear.weight, std=init_std)
            if bias:
                nn.init.zeros_(linear.bias)
        layers.append(linear)
    return nn.Sequential(*layers)


def first_reader(layers: nn.Sequential) -> list[nn.Linear | nn.LayerNorm]:
    """The Linear or LayerNorm a stack begins with (see `Connector.channel_readers`)."""
    first = layers[0]
    return [first] if isinstance(first, nn.Linear | nn.LayerNorm) else []


class MLP(Connector):
    """[B, T, d_v] -> [B, T, d_l] by `depth` Linears; two with GELU are LLaVA-1.5's (20.98 M at 1024 -> 4096).

    Args:
        depth: number of Linears, 1 or more.
        hidden_dim: width between them; None = out_dim (LLaVA).
        activation: "gelu", "relu" or "silu".
        bias: biases on the Linears.
        init_std: None = PyTorch's default; else N(0, init_std) weights and zero biases.
        output_norm: end with a LayerNorm; see `Connector.set_output_std`.

    Raises:
        ConfigError: depth or hidden_dim not positive, unknown activation.

    Paper: Liu et al., Improved Baselines with Visual Instruction Tuning, 2023.
    """

    layers: nn.Sequential

    def __init__(
        self,
        *,
        in_dim: int | None = None,
        out_dim: int | None = None,
        depth: int = 2,
        hidden_dim: int | None = None,
        activation: str = "gelu",
        bias: bool = True,
        init_std: float | None = None,
        output_norm: bool = False,
    ) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, output_norm=output_norm)
        require_positive(self, depth=depth, hidden_dim=hidden_dim)
        activation_module(activation)
        self.depth = depth
        self.hidden_dim = hidden_dim
        self.activation = activation
        self.bias = bias
        self.init_std = init_std
        self._build_if_given(in_dim, out_dim)

    def _build(self, in_dim: int, out_dim: int) -> None:
        self.layers = projector(
            in_dim,
            self.hidden_dim or out_dim,
            out_dim,
            depth=self.depth,
            activation=self.activation,
            bias=self.bias,
            init_std=self.init_std,
        )

    def channel_readers(self) -> list[nn.Linear | nn.LayerNorm]:
        return first_reader(self.layers)

    def connect(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.layers(tokens), mask


class Linear(Connector):
    """[B, T, d_v] -> [B, T, d_l] by one Linear.

    Args:
        bias: add a bias.
        output_norm: end with a LayerNorm; see `Connector.set_output_std`.

    Paper: Liu et al., Visual Instruction Tuning, 2023 (4.2 M at 1024 -> 4096).
    """

    linear: nn.Linear

    def __init__(
        self, *, in_dim: int | None = None, out_dim: int | None = None, bias: bool = True, output_norm: bool = False
    ) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, output_norm=output_norm)
        self.bias = bias
        self._build_if_given(in_dim, out_dim)

    def _build(self, in_dim: int, out_dim: int) -> None:
        self.linear = nn.Linear(in_dim, out_dim, bias=self.bias)

    def channel_readers(self) -> list[nn.Linear | nn.LayerNorm]:
        return [self.linear]

    def connect(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.linear(tokens), mask
