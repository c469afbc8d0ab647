"""Gradient variances: measured exactly, and the factors of equations (6) and (13) by hand."""

import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sysmt.errors import ConfigError
from sysmt.nn.low_bit.gradient_variance import GradientRecorder, predict_variances
from sysmt.nn.low_bit.straight_through import TernaryWeight, initialise_uniform, quantize_network
from sysmt.nn.networks.checkpoints import weights_hash
from sysmt.nn.networks.models import build_model


def test_variances_are_those_of_the_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(32, 3))
    gradients = []
    with GradientRecorder(model) as recorder:
        for _ in range(2):
            x = torch.randn(5, 1, 6, 6)
            logits = model(x)
            logits.retain_grad()
            logits.square().sum().backward()
            gradients.append(logits.grad)
    report = recorder.report()
    assert list(report["name"]) == ["0", "3"]
    assert list(report["depth"]) == [1, 2]
    assert list(report["fan_in"]) == [9, 32]
    assert list(report["outputs"]) == [32, 3]
    assert list(report["samples"]) == [5 * 16, 5]
    linear = torch.cat(gradients).double()
    assert report.loc[1, "variance"] == pytest.approx(float(linear.var(correction=0)), rel=1e-6)
    assert report.loc[1, "weight_variance"] == pytest.approx(
        float(model[3].weight.detach().square().mean()), rel=1e-6
    )
    # The convolution's own gradient, by hand: what the Linear layer passes back where ReLU let through.
    model[1].inplace = False
    dots = model[0](x).detach().requires_grad_()
    model[1:](dots).square().sum().backward()
    with GradientRecorder(model) as recorder:
        model(x).square().sum().backward()
    measured = recorder.report().loc[0, "variance"]
    assert measured == pytest.approx(float(dots.grad.double().var(correction=0)), rel=1e-6)


def test_nothing_is_changed_and_nothing_stays() -> None:
    torch.manual_seed(0)
    model = build_model("digits").train()
    x, y = torch.randn(4, 1, 16, 16), torch.arange(4)
    F.cross_entropy(model(x), y).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    before = weights_hash(model)
    model.zero_grad()
    with GradientRecorder(model) as recorder:
        F.cross_entropy(model(x), y).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert weights_hash(model) == before
    assert not any(module._forward_hooks for module in model.modules())
    report = recorder.report()
    assert (report["variance"] > 0).all()
    F.cross_entropy(model(x), y).backward()
    assert recorder.report().equals(report)


def test_gradients_that_are_no_numbers_and_forwards_without_any() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with GradientRecorder(model) as recorder:
        with torch.no_grad():
            model(torch.ones(3, 2))
        assert recorder.report()["variance"].isna().all()
        (model(torch.ones(3, 2)) * math.inf).sum().backward()
    assert recorder.report()["variance"].isna().all()
    with pytest.raises(ConfigError, match="no Conv2d or Linear"):
        GradientRecorder(nn.ReLU())


def report_by_hand() -> pd.DataFrame:
    """Three fully connected layers, 10 -> 20 -> 30 -> 5, in batches of 4."""
    return pd.DataFrame(
        {
            "name": ["a", "b", "c"],
            "fan_in": [10, 20, 30],
            "outputs": [20, 30, 5],
            "samples": [4, 4, 4],
            "weight_variance": [0.65, 0.65, 0.65],
            "variance": [math.nan, math.nan, 2.0],
        }
    )


def test_equation_6_by_hand() -> None:
    predicted = predict_variances(report_by_hand(), batchnorm=False)
    # K of the layers after: 5 units, then 30. 2 * (5 * 0.65 / 2), then * (30 * 0.65 / 2).
    assert predicted.tolist() == pytest.approx([2 * 1.625 * 9.75, 2 * 1.625, 2.0])


def test_equation_13_by_hand() -> None:
    predicted = predict_variances(report_by_hand(), batchnorm=True)
    # B = 4, V(s^2) = 2: (16 + 8 - 1 + 2) / 16 = 25 / 16; K_{l+1} / K_{l-1} = 5 / 20, then 30 / 10.
    middle = 2 * 25 / 16 * 5 / 20
    assert predicted.tolist() == pytest.approx([middle * 25 / 16 * 30 / 10, middle, 2.0])
    # Against (6), it does not depend on the weights' variance: "independent of the chosen threshold".
    other = report_by_hand().assign(weight_variance=0.01)
    assert predict_variances(other, batchnorm=True).tolist() == pytest.approx(predicted.tolist())


def test_prediction_can_start_in_the_middle() -> None:
    report = report_by_hand().assign(variance=[9.0, 3.0, 2.0])
    predicted = predict_variances(report, batchnorm=False, last="b")
    assert predicted.tolist()[:2] == pytest.approx([3.0 * 9.75, 3.0])
    assert math.isnan(predicted[2])
    for wrong in ("d", 3):
        with pytest.raises(ConfigError, match="is no layer of the report"):
            predict_variances(report, batchnorm=False, last=wrong)
    with pytest.raises(ConfigError, match="the report has no rows"):
        predict_variances(report.iloc[:0], batchnorm=False)


def wide_network(batchnorm: bool, threshold: str) -> pd.DataFrame:
    """Measure a chain of wide layers with ReLU and fresh weights, as the paper assumes it."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for k_in, k_out in ((64, 256), (256, 512), (512, 256), (256, 256), (256, 64)):
        norm = nn.BatchNorm1d(k_out) if batchnorm else nn.Identity()
        layers += [nn.Linear(k_in, k_out, bias=False), norm, nn.ReLU()]
    model = nn.Sequential(*layers[:-2]).train()
    initialise_uniform(model)
    quantize_network(model, TernaryWeight(threshold), first=True, last=True)
    with GradientRecorder(model) as recorder:
        logits = model(torch.randn(512, 64))
        (logits * torch.randn(logits.shape)).sum().backward()  # gradients that know nothing of the signals
    return recorder.report()


def test_equation_6_holds_for_ternary_weights() -> None:
    report = wide_network(batchnorm=False, threshold="twn")
    ratio = report["variance"] / predict_variances(report, batchnorm=False)
    assert ratio.between(0.9, 1.1).all(), ratio
    assert report["variance"].iloc[0] > 1e6 * report["variance"].iloc[-1]  # gradients explode


def test_equation_8_stops_the_explosion() -> None:
    variances = wide_network(batchnorm=False, threshold="variance")["variance"]
    assert variances.max() < 30 * variances.min()


def test_equation_13_is_low_by_the_mean_that_batchnorm_takes_off() -> None:
    report = wide_network(batchnorm=True, threshold="twn")
    ratio = report["variance"] / predict_variances(report, batchnorm=True)
    steps = ratio[1:4].to_numpy() / ratio[2:5].to_numpy()  # the first layer reads no ReLU's output
    assert steps == pytest.approx(math.pi / (math.pi - 1), rel=0.1)
    better = report["variance"] / predict_variances(report, batchnorm=True, centred=True)
    assert better[1:].between(0.9, 1.15).all(), better
    assert report["variance"].iloc[0] < 30 * report["variance"].iloc[-1]
