"""Train with 1-bit or ternary weights and few-bit activations, by straight-through estimators.

Two schemes, as their papers have them:

- Nicholls & Kanemura, "Final Sample Batch Normalization For Quantized Neural Networks": weights ±s with
  one scale s per output channel or per layer, 2-bit activations, first and last layers in float;
- Sari & Partovi Nia, "Understanding BatchNorm in Ternary Training": weights -1, 0, +1 by a threshold.

Latent float weights are kept and updated; the forward pass sees them quantised, and the gradient at the
quantised weight is taken for the latent one's. `quantize_network` converts a network in one call,
`bake_weights` leaves plain quantised weights in the end. A converted network can be attached to the array
either way: ``layer.weight`` is the quantised weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sysmt.config import parse_count, parse_layer_names, parse_name
from sysmt.errors import ConfigError, DataError, UnsupportedLayerError, nearest
from sysmt.quant.ternary import TWN_FACTOR, variance_threshold

__all__ = [
    "ActivationQuantizer",
    "BinaryWeight",
    "TernaryThreshold",
    "TernaryWeight",
    "WeightScale",
    "bake_weights",
    "initialise_uniform",
    "per_image_standardization",
    "quantize_network",
    "quantized_layers",
    "remove_batchnorm",
]


class WeightScale(StrEnum):
    """What 1-bit weights share a scale: an output channel, or the whole layer."""

    CHANNEL = "channel"
    LAYER = "layer"


class TernaryThreshold(StrEnum):
    """Where the threshold of ternary weights comes from, if it is no number."""

    TWN = "twn"
    VARIANCE = "variance"


class _StraightThrough(torch.autograd.Function):
    """Gives the second argument's value and the first one's gradient, exactly.

    ``x + (q - x).detach()`` would do the same but for rounding: ternary weights would not be whole.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class BinaryWeight(nn.Module):
    """1-bit weights: the sign of each latent weight times the mean magnitude of those that share a scale.

    sign(0) is +1. The gradient passes straight through, the scale included.

    Parameters
    ----------
    scale : {"channel", "layer"}
        One scale per output channel ("channelwise") or one for all ("layerwise_quant").
    """

    def __init__(self, scale: str | WeightScale = "channel") -> None:
        super().__init__()
        self.scale = parse_name(WeightScale, scale, "scale")

    def forward(self, weight: Tensor) -> Tensor:
        """Map latent weights (N, ...) to ±s of the same shape."""
        with torch.no_grad():
            axes = tuple(range(1 if self.scale is WeightScale.CHANNEL else 0, weight.dim()))
            size = weight.abs().mean(dim=axes, keepdim=True)
            quantized = torch.where(weight >= 0, size, -size)
        return _straight_through(weight, quantized)

    def extra_repr(self) -> str:
        """Say it as the constructor's argument."""
        return f"scale={self.scale.value!r}"


class TernaryWeight(nn.Module):
    """Ternary weights: -1, 0, +1 by equation (1); the gradient passes straight through.

    Parameters
    ----------
    threshold : {"twn", "variance"} or float
        ``"twn"``: 0.7 times the mean magnitude of the layer's latent weights, anew in each step.
        ``"variance"``: equation (8) for the layer's fan-in, always the same (0 for a fan-in of
        1, where no threshold gives enough variance). Or a number, at least 0.
    scaled : bool
        Multiply by the mean of the magnitudes above the threshold, as ternary weight networks do (arXiv
        1605.04711); the paper's equations leave that out.
    """

    def __init__(self, threshold: str | TernaryThreshold | float = "twn", scaled: bool = False) -> None:
        super().__init__()
        self.threshold: TernaryThreshold | float
        if isinstance(threshold, str):
            self.threshold = parse_name(TernaryThreshold, threshold, "threshold")
        elif (
            isinstance(threshold, bool)
            or not isinstance(threshold, Real)
            or not 0 <= threshold < float("inf")
        ):
            allowed = ", ".join(repr(kind.value) for kind in TernaryThreshold)
            raise ConfigError(f"threshold={threshold!r} must be {allowed} or a number, at least 0 and finite")
        else:
            self.threshold = float(threshold)
        self.scaled = scaled

    def limit_of(self, weight: Tensor) -> Tensor | float:
        """Return the threshold Δ for latent weights (N, fan-in ...)."""
        if self.threshold is TernaryThreshold.TWN:
            return TWN_FACTOR * weight.detach().abs().mean()
        if self.threshold is TernaryThreshold.VARIANCE:
            return variance_threshold(max(2, weight[0].numel()))
        return float(self.threshold)

    def forward(self, weight: Tensor) -> Tensor:
        """Map latent weights (N, ...) to ternary ones of the same shape."""
        with torch.no_grad():
            limit = self.limit_of(weight)
            exact = weight.double()  # as `sysmt.quant.ternary.ternarize` compares
            above, below = exact > limit, exact < -limit
            quantized = above.to(weight.dtype) - below.to(weight.dtype)
            if self.scaled:
                kept = (weight.abs() * quantized.abs()).sum()
                count = quantized.abs().sum()
                quantized = quantized * torch.where(count > 0, kept / count.clamp_min(1), 1.0)
        return _straight_through(weight, quantized)

    def extra_repr(self) -> str:
        """Say it as the constructor's arguments."""
        threshold = self.threshold.value if isinstance(self.threshold, TernaryThreshold) else self.threshold
        return f"threshold={threshold!r}, scaled={self.scaled}"


class ActivationQuantizer:
    """Quantises what a layer reads: clip to [0, limit], round to 2^bits levels, both ends included.

    The gradient passes straight through between the ends and is 0 beyond. It is a forward pre-hook of
    the layer, so it makes no difference whether a ReLU before it is a module or a function, and a
    layer that is attached to the array reads the quantised values, too: with the default, codes 0, 85,
    170 and 255 of 255.

    Parameters
    ----------
    bits : int
        1 to 8.
    limit : float
        Largest activation; above 0.
    """

    limit: float

    def __init__(self, bits: int = 2, limit: float = 2.0) -> None:
        self.bits = parse_count(bits, "bits")
        if self.bits > 8:
            raise ConfigError(f"bits={bits} is out of range; activations have 1 to 8 bits")
        if isinstance(limit, bool) or not isinstance(limit, Real) or not 0 < limit < float("inf"):
            raise ConfigError(f"limit={limit!r} must be a number above 0: the largest activation")
        self.limit = float(limit)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Quantise a layer's first input."""
        return (self.quantize(inputs[0]), *inputs[1:])

    def quantize(self, x: Tensor) -> Tensor:
        """Return x on the grid."""
        clipped = x.clamp(0.0, self.limit)
        with torch.no_grad():
            step = self.limit / (2**self.bits - 1)
            quantized = (clipped / step).round_() * step
        return _straight_through(clipped, quantized)

    def __repr__(self) -> str:
        return f"ActivationQuantizer(bits={self.bits}, limit={self.limit:g})"


def quantize_network(
    model: nn.Module,
    weights: nn.Module | None = None,
    activations: ActivationQuantizer | None = None,
    *,
    first: bool = False,
    last: bool = False,
    exclude: Iterable[str] = (),
) -> tuple[str, ...]:
    """Make the convolutions and fully connected layers of a network quantised, in place.

    The latent weights start from what the weights are. Train with `sysmt.nn.networks.training.train`,
    then call `bake_weights`.

    Parameters
    ----------
    model : nn.Module
    weights : BinaryWeight or TernaryWeight, optional
        How weights are quantised; not at all by default.
    activations : ActivationQuantizer, optional
        How the input of each of these layers is quantised; not at all by default.
    first, last : bool
        Quantise the first and the last layer, too (in order of definition). Both papers' networks leave them
        in float, or need not say.
    exclude : iterable of str
        Names of further layers to leave in float.

    Returns
    -------
    tuple of str
        Names of the layers that are quantised now.

    Raises
    ------
    ConfigError
        If there is nothing to quantise, or a name is unknown.
    UnsupportedLayerError
        If a layer is quantised, masked or parametrised already. Nothing has been changed then.
    """
    if not isinstance(weights, BinaryWeight | TernaryWeight | None):
        raise ConfigError(f"weights={weights!r} must be a BinaryWeight, a TernaryWeight or None")
    if not isinstance(activations, ActivationQuantizer | None):
        raise ConfigError(f"activations={activations!r} must be an ActivationQuantizer or None")
    layers = _layers(model)
    excluded = parse_layer_names(exclude, "exclude")
    for name in sorted(excluded.difference(layers)):
        raise ConfigError(
            f"exclude names {name!r}, but the network has no such Conv2d or Linear layer"
            f"{nearest(name, layers)}"
        )
    names = list(layers)
    chosen = names[0 if first else 1 : None if last else -1]
    chosen = [name for name in chosen if name not in excluded]
    if not chosen or (weights is None and activations is None):
        raise ConfigError(
            f"{type(model).__name__} has nothing to quantise: weights={weights}, activations={activations}, "
            f"and of its {len(names)} Conv2d and Linear layers first={first}, last={last} and exclude leave "
            f"{len(chosen)}"
        )
    for name in chosen:
        _check_plain(name, layers[name])
        hooks = layers[name]._forward_pre_hooks.values()
        if activations is not None and any(isinstance(hook, ActivationQuantizer) for hook in hooks):
            raise UnsupportedLayerError(f"the input of layer {name!r} is quantised already")
    for name in chosen:
        layer = layers[name]
        if weights is not None:
            parametrize.register_parametrization(layer, "weight", weights)
        if activations is not None:
            layer.register_forward_pre_hook(activations)
    return tuple(chosen)


def quantized_layers(model: nn.Module) -> dict[str, BinaryWeight | TernaryWeight]:
    """Return how the weights of each quantised layer are made; empty after `bake_weights`."""
    found = {}
    for name, layer in _layers(model).items():
        quantizer = _quantizer(layer)
        if quantizer is not None:
            found[name] = quantizer
    return found


def bake_weights(model: nn.Module) -> tuple[str, ...]:
    """Replace latent weights by what they are quantised to, as plain parameters.

    The network's outputs stay what they are, and its state_dict has the keys that it had before
    `quantize_network`. Activations stay quantised.

    Returns
    -------
    tuple of str
        Names of the layers that were baked.
    """
    names = tuple(quantized_layers(model))
    layers = _layers(model)
    for name in names:
        # torch puts the weight into a class of the layer's own, which a deep copy shares: take it apart
        # in another one, or the copy loses its weight.
        shared: Any = type(layers[name])
        layers[name].__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))
        parametrize.remove_parametrizations(layers[name], "weight", leave_parametrized=True)
    return names


def remove_batchnorm(model: nn.Module) -> tuple[str, ...]:
    """Replace every BatchNorm layer by `nn.Identity`, as the columns without BatchNorm of Table 1 do.

    Layers before them get no bias in exchange.

    Returns
    -------
    tuple of str
        Names of the layers that are gone.
    """
    removed = []
    for path, module in list(model.named_modules()):
        for name, child in list(module._modules.items()):  # `named_children` leaves out second names
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(module, name, nn.Identity())
                removed.append(f"{path}.{name}" if path else name)
    return tuple(removed)


def initialise_uniform(model: nn.Module, seed: int = 0) -> None:
    """Draw the weights of all Conv2d and Linear layers anew, uniform in ±√(6 / K), and set biases to 0.

    What the threshold of equation (8) assumes (He et al., arXiv 1502.01852). Call it before
    `quantize_network`.

    Parameters
    ----------
    model : nn.Module
    seed : int
    """
    generator = torch.Generator().manual_seed(parse_count(seed, "seed", minimum=0))
    for name, layer in _layers(model).items():
        _check_plain(name, layer)
        limit = (6 / layer.weight[0].numel()) ** 0.5
        with torch.no_grad():
            drawn = torch.rand(layer.weight.shape, generator=generator)
            layer.weight.copy_((2 * drawn - 1) * limit)
            if layer.bias is not None:
                layer.bias.zero_()


def per_image_standardization(model: nn.Module) -> Callable[[], None]:
    """Let a network standardise each image that it gets: (x - mean) / max(deviation, 1 / √values).

    What "PerImageStandardization" is in TensorFlow, the input of most networks of the final-sample
    paper; its ``divide255`` networks take pixel / 255 as it is, 8 bits wide. The input's own scale makes no
    difference to a standardised image but for the lower bound, which is meant for pixels / 255.

    Parameters
    ----------
    model : nn.Module
        Gets a forward pre-hook.

    Returns
    -------
    callable
        Takes the hook off again.
    """
    return model.register_forward_pre_hook(_standardize).remove


def _standardize(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = inputs[0]
    if x.dim() != 4 or not x[:1].numel():
        raise DataError(f"images of shape {tuple(x.shape)} cannot be standardised; (N, C, H, W) is needed")
    variance, mean = torch.var_mean(x, dim=(1, 2, 3), keepdim=True, correction=0)
    deviation = variance.sqrt().clamp_min(x[0].numel() ** -0.5)
    return ((x - mean) / deviation, *inputs[1:])


def _straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    result: Tensor = _StraightThrough.apply(x, quantized)  # type: ignore[no-untyped-call]
    return result


def _layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }


def _quantizer(layer: nn.Module) -> BinaryWeight | TernaryWeight | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    (quantizer, *others) = layer.parametrizations["weight"]  # type: ignore[index]
    return quantizer if isinstance(quantizer, BinaryWeight | TernaryWeight) and not others else None


def _check_plain(name: str, layer: nn.Module) -> None:
    """Refuse a layer whose weight is not a parameter of its own."""
    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    if weight is None or nn.parameter.is_lazy(weight):
        what = "quantised already" if _quantizer(layer) is not None else "masked, parametrised or lazy"
        raise UnsupportedLayerError(f"the weight of layer {name!r} is {what}; a plain parameter is needed")
