"""The connector contract: encoder tokens [B, T, d_v] in, LLM tokens [B, Q, d_l] out, with one rule for masks.

Choices made here, once, for every connector:

- Widths may come late. `MLP(depth=2)` in a YAML file knows neither the encoder nor the LLM; whoever does calls
  `build(in_dim, out_dim)`. Given both at construction, the parameters exist at once. Building is idempotent.
- A mask is bool, True = valid; None = every token is valid. `forward` (a template: subclasses write `connect`) zeroes
  padded inputs before anything reads them, so not even a NaN in the padding reaches a valid output, and zeroes outputs
  that are not valid.
- `num_tokens(t)` is the exact number of outputs for t inputs, and a sample with t valid tokens in a longer batch has
  exactly `num_tokens(t)` valid outputs, equal to those it has alone (grid connectors take whole grids only).
- Tokens are cast to the dtype of the connector's weights as its modules show them, so that an fp32 adapter copy over
  a bf16 model works. Nothing here freezes anything: the plan does.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.errors import ConfigError


class Connector(nn.Module):
    """Base class of all connectors.

    Subclasses store their options in `__init__` (which ends with `self._build_if_given(in_dim, out_dim)`), create their
    parameters in `_build`, and compute in `connect`; `num_tokens` stays the single source of the output length.

    Args:
        in_dim: encoder width d_v, or None until `build`.
        out_dim: LLM width d_l, or None until `build`.
        output_norm: end with a LayerNorm over d_l. `set_output_std` gives it the scale of the LLM's own embeddings.

    Raises:
        ConfigError: a width that is not a positive integer.
    """

    in_dim: int  # 0 until known
    out_dim: int

    def __init__(self, *, in_dim: int | None = None, out_dim: int | None = None, output_norm: bool = False) -> None:
        super().__init__()
        require_positive(self, in_dim=in_dim, out_dim=out_dim)
        self.in_dim = in_dim or 0
        self.out_dim = out_dim or 0
        self.built = False
        self.wants_output_norm = output_norm
        self.output_norm: nn.LayerNorm | None = None

    # ---- building -------------------------------------------------------------------------------------------------

    def build(self, in_dim: int, out_dim: int) -> Self:
        """Create the parameters for `in_dim` -> `out_dim`; calling it again with the same widths does nothing.

        Raises:
            ConfigError: a width that is not positive, or that differs from the one this connector already has.
        """
        require_positive(self, in_dim=in_dim, out_dim=out_dim)
        for name, given, known in (("in_dim", in_dim, self.in_dim), ("out_dim", out_dim, self.out_dim)):
            if known and known != given:
                raise ConfigError(
                    f"{type(self).__name__} has {name}={known} and cannot be built with {name}={given}; "
                    f"leave {name} out to take it from the encoder and the LLM"
                )
        if not self.built:
            self._build(in_dim, out_dim)
            self.in_dim, self.out_dim, self.built = in_dim, out_dim, True
            if self.wants_output_norm:
                self.output_norm = nn.LayerNorm(out_dim)
        return self

    def _build_if_given(self, in_dim: int | None, out_dim: int | None) -> None:
        """Last line of every subclass's `__init__`: build now when both widths are known."""
        if in_dim is not None and out_dim is not None:
            self.build(in_dim, out_dim)

    def _build(self, in_dim: int, out_dim: int) -> None:
        """Create the parameters. To be written by the subclass."""
        raise NotImplementedError

    # ---- tokens ---------------------------------------------------------------------------------------------------

    def num_tokens(self, t: int) -> int:
        """Number of output tokens for `t` input tokens; raises ConfigError for a `t` this connector cannot take."""
        require_positive(self, t=t)
        return t

    def connect(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[B, T, d_v] with zeroed padding, [B, T] bool or None -> [B, Q, d_l], [B, Q] bool or None."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Turn encoder tokens into LLM tokens.

        Args:
            tokens: [B, T, d_v].
            mask: [B, T] bool, True = valid; None = all valid.

        Returns:
            LLM tokens [B, Q, d_l] with Q = num_tokens(T), zero where invalid, and their mask [B, Q] (None = all valid).

        Raises:
            ConfigError: not built yet, or a shape or mask that does not fit.
        """
        tokens = self._receive(tokens, mask)
        return self._deliver(*self.connect(tokens, mask))

    def _receive(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Check shapes, cast to the weights' dtype, zero the padding."""
        if not self.built:
            raise ConfigError(f"{type(self).__name__} has no parameters yet: call build(in_dim, out_dim) first")
        if tokens.dim() != 3 or tokens.shape[-1] != self.in_dim:
            raise ConfigError(f"{type(self).__name__} expects tokens [B, T, {self.in_dim}], given {list(tokens.shape)}")
        self.num_tokens(tokens.shape[1])  # refuses a token count it cannot take
        tokens = tokens.to(weight_dtype(self))
        if mask is None:
            return tokens
        check_mask(self, mask, tokens)
        return tokens.masked_fill(~mask.unsqueeze(-1), 0.0)

    def _deliver(self, out: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Final norm, and zeros where the output is not valid."""
        if self.output_norm is not None:
            out = self.output_norm(out)
        if mask is not None:
            out = out.masked_fill(~mask.unsqueeze(-1), 0.0)
        return out, mask

    # ---- fitting to both ends, before training ----------------------------------------------------------------------

    @property
    def scales_output(self) -> bool:
        """Whether there is an output norm for `set_output_std` to set."""
        return self.output_norm is not None

    def set_output_std(self, std: float) -> None:
        """Set the gain of the output LayerNorm, so that outputs start with the scale of the LLM's embeddings.

        Args:
            std: usually `float(llm.get_input_embeddings().weight.float().std())`.

        Raises:
            ConfigError: built without `output_norm=True`, a std that is not positive, or an adapter already attached.
        """
        if self.output_norm is None:
            raise ConfigError(f"{type(self).__name__} has no output norm: build it with output_norm=True")
        if not 0.0 < std < float("inf"):
            raise ConfigError(f"std must be positive and finite, given {std}")
        require_own_parameters(self.output_norm, "set_output_std")
        with torch.no_grad():
            self.output_norm.weight.fill_(std)

    def channel_readers(self) -> list[nn.Linear | nn.LayerNorm]:
        """The modules that read the encoder's channels first: Linears or affine LayerNorms; [] where it is another."""
        return []

    def first_view(self, tokens: Tensor) -> Tensor:
        """[N, T, d_v] as those modules see it, [N, Q, C]; of a mask [N, T, 1] the mask."""
        return tokens

    @torch.no_grad()
    def calibrate(self, tokens: Tensor, mask: Tensor | None = None) -> Self:
        """Fold a per-channel standardisation of the features into what reads them first, as its initial values.

        With mean m and std s of a sample of features, a Linear W x + b becomes W (x - m) / s + b, and a LayerNorm
        g n(x) + b, whose normalised channels n(x) have them too, becomes g (n(x) - m) / s + b: plain weights again, no
        buffers, nothing to save beside them. A channel that (nearly) never moves would be blown up without bound, so s
        is at least a hundredth of the root mean square of all channels' s.

        Args:
            tokens: a sample of encoder tokens, [N, T, d_v] (whole grids where the connector groups tokens) or [N, d_v].
            mask: [N, T] (or [N]) bool, True = valid.

        Raises:
            ConfigError: this connector begins with neither Linear nor LayerNorm, or with one that has no bias; fewer
                than two valid tokens, features that are not finite; published weights, which know their encoder's
                features; an adapter already attached (calibrate before attaching).
        """
        name = type(self).__name__
        if not self.built:
            raise ConfigError(f"{name} has no parameters yet: there is nothing for calibrate to fold into")
        readers = self.channel_readers()
        if not readers:
            raise ConfigError(
                f"{name} begins with neither a Linear nor a LayerNorm, so calibrate has nothing to fold a "
                "standardisation into: leave calibrate out (calibrate: false)"
            )
        for reader in readers:
            if reader.bias is None:
                raise ConfigError(f"{name}: calibrate needs bias=True to take up the features' mean")
            require_own_parameters(reader, "calibrate")
        if tokens.shape[-1] != self.in_dim or tokens.dim() not in (2, 3):
            raise ConfigError(
                f"calibrate expects [N, T, {self.in_dim}] or [N, {self.in_dim}], given {list(tokens.shape)}"
            )
        for reader in readers:
            _fold(reader, *_statistics(_rows(self, reader, tokens, mask)))
        return self

    def extra_repr(self) -> str:
        return f"in_dim={self.in_dim}, out_dim={self.out_dim}" if self.built else "not built"


# ---- calibrate ------------------------------------------------------------------------------------------------------


def _rows(connector: Connector, reader: nn.Module, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """What `reader` sees of a sample, valid tokens only: [M, d_v] before a Linear, [M, C] normalised in a LayerNorm."""
    if isinstance(reader, nn.Linear):  # stacked frames and shuffled pixels repeat the same channels
        return tokens.reshape(-1, tokens.shape[-1]) if mask is None else tokens[mask]
    assert isinstance(reader, nn.LayerNorm)
    if tokens.dim() == 2 and reader.weight.shape[-1] != tokens.shape[-1]:
        raise ConfigError(f"{type(connector).__name__} normalises groups of tokens: calibrate needs them as [N, T, d_v]")
    seen = connector.first_view(tokens) if tokens.dim() == 3 else tokens
    if mask is not None:
        seen = seen[connector.first_view(mask.unsqueeze(-1)).all(-1) if tokens.dim() == 3 else mask]
    return F.layer_norm(seen.reshape(-1, seen.shape[-1]).float(), reader.normalized_shape, eps=reader.eps)


def _statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and bounded standard deviation of each channel, in double precision."""
    rows = rows.to(torch.float64)
    if rows.shape[0] < 2 or not bool(torch.isfinite(rows).all()):
        raise ConfigError(f"calibrate needs two or more finite valid tokens, given {rows.shape[0]}")
    mean, std = rows.mean(0), rows.std(0)
    return mean, std.clamp_min(max(1e-2 * float(std.square().mean().sqrt()), 1e-12))


def _fold(reader: nn.Linear | nn.LayerNorm, mean: Tensor, std: Tensor) -> None:
    """Standardise the channels that `reader` multiplies its weight with, in its own weight and bias."""
    copies = reader.weight.shape[-1] // len(mean)
    mean, std = (v.repeat(copies).to(reader.weight.device) for v in (mean, std))
    weight = reader.weight.double() / std
    shift = weight @ mean if isinstance(reader, nn.Linear) else weight * mean
    reader.bias.copy_(reader.bias.double() - shift)
    reader.weight.copy_(weight)


# ---- helpers shared by the connectors -------------------------------------------------------------------------------


def require_positive(owner: object, **values: int | None) -> None:
    """Raise ConfigError for a value that is neither None nor a positive integer."""
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(
                f"{type(owner).__name__}: {name} must be a positive integer, given {value!r} (nearest: 1)"
            )


def require_heads(owner: object, width: int, heads: int) -> None:
    """Raise ConfigError unless `heads` divides `width`, naming the nearest count that does."""
    if width % heads:
        valid = min((h for h in range(1, width + 1) if width % h == 0), key=lambda h: abs(h - heads))
        raise ConfigError(f"{type(owner).__name__}: {heads} heads do not divide width {width} (nearest: {valid})")


def check_mask(owner: object, mask: Tensor, tokens: Tensor) -> None:
    """Raise ConfigError unless `mask` is bool [B, T] for `tokens` [B, T, D]."""
    if mask.dtype != torch.bool or mask.shape != tokens.shape[:2]:
        raise ConfigError(
            f"{type(owner).__name__} expects a bool mask {list(tokens.shape[:2])} (True = valid), "
            f"given {mask.dtype} {list(mask.shape)}"
        )


def require_own_parameters(module: nn.Module, action: str) -> None:
    """Raise ConfigError when an adapter shows other tensors than the module's own: changing those would do nothing."""
    for name, parameter in module._parameters.items():
        if parameter is not None and getattr(module, name) is not parameter:
            raise ConfigError(f"{action} must run before an adapter is attached to this connector")


def weight_dtype(module: nn.Module) -> torch.dtype:
    """dtype of the first floating-point weight as the modules show it (an adapter's copy before the base's own)."""
    for child in module.modules():
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return weight.dtype
    return torch.get_default_dtype()
