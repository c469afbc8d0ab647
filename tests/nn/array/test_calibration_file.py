"""Calibrations on disk: everything comes back, only into the network they were made with."""

import json

import numpy as np
import pytest
import torch

import sysmt
from sysmt.errors import CalibrationError, ConfigError
from sysmt.nn.array.calibration_file import load_calibration, save_calibration
from sysmt.nn.networks.models import build_model


def network(seed=0):
    torch.manual_seed(seed)
    return build_model("digits")


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(4, 1, 8, 8, generator=generator) for _ in range(2)]


@pytest.fixture
def saved(tmp_path):
    """A reordered, recalibrated calibration, the logits it leads to, and its path."""
    model = network()
    with sysmt.attach(model, sysmt.ArrayConfig(threads=4)) as sim:
        sim.calibrate(batches(), 8, reorder=True)
        sysmt.recalibrate_batchnorm(model, batches(), images=8)
        save_calibration(sim, tmp_path / "c.npz", {"recalibrated": "ema"})
        sim.reset()
        logits = model(batches()[0])
        return tmp_path / "c.npz", logits, sim.report()


def test_everything_comes_back(saved):
    path, logits, report = saved
    model = network()
    with sysmt.attach(model, sysmt.ArrayConfig(threads=4)) as sim:
        assert load_calibration(sim, path) == {"recalibrated": "ema"}
        assert sim.reorder
        assert torch.equal(model(batches()[0]), logits)
        assert sim.report().equals(report)


def test_other_layers_may_be_left_out_but_not_added(saved):
    path, *_ = saved
    with sysmt.attach(network(), first=True) as sim, pytest.raises(CalibrationError, match="'conv1'"):
        load_calibration(sim, path)
    with sysmt.attach(network(), exclude=["layer1.0.conv1"]) as sim:
        load_calibration(sim, path)
        assert "layer1.0.conv1" not in sim.ranges()


def test_other_weights_are_refused_and_nothing_changes(saved):
    path, *_ = saved
    model = network(seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with sysmt.attach(model) as sim:
        with pytest.raises(CalibrationError, match=r"belongs to [0-9a-f]{16}, the network has [0-9a-f]{16}"):
            load_calibration(sim, path)
        assert sim.ranges() == {}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def rewrite(path, change):
    """Save the file again after `change` has worked on its header and arrays."""
    with np.load(path) as content:
        arrays = dict(content)
    header = json.loads(str(arrays["header"]))
    change(header, arrays)
    arrays["header"] = np.array(json.dumps(header))
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, _: header.update(format="sysmt calibration 2"), "sysmt calibration 2"),
        (lambda header, _: header.pop("ranges"), "damaged"),
        (
            lambda _, arrays: arrays.update({"wide/layer1.0.conv1": np.zeros((1, 3))}),
            r"layer1\.0\.conv1",
        ),
        (lambda _, arrays: arrays.pop("statistics/bn1.running_var"), r"bn1\.running_var"),
        (lambda _, arrays: arrays["statistics/bn1.running_var"].fill(-1), "negative variance"),
        (
            lambda header, _: header["ranges"]["layer1.0.conv1"].update(signed="false"),
            "signed='false' must be",
        ),
        (
            lambda header, _: header["ranges"]["layer1.0.conv1"].update(scale="0.5"),
            "scale='0.5' has type str",
        ),
        (lambda header, _: header["ranges"]["layer1.0.conv1"].update(scale=True), "scale=True has type bool"),
        (lambda header, _: header.update(ranges=[1]), r"its ranges are \[1\], not names with values"),
        (lambda header, _: header.update(notes=None), "its notes are None"),
        (lambda header, _: header.update(first_convolution=3), "its first convolution is 3"),
        (
            lambda _, arrays: arrays.update({"wide/layer1.0.conv1": np.array([["many"]])}),
            r"wide/layer1\.0\.conv1 has <U4 values; counts",
        ),
        (
            lambda _, arrays: arrays.update({"statistics/bn1.running_var": np.array(["1"])}),
            r"statistics/bn1\.running_var has <U1 values",
        ),
    ],
)
def test_damage_is_named_and_changes_nothing(saved, change, message):
    path, *_ = saved
    rewrite(path, change)
    model = network()
    before = model.bn1.running_mean.clone()
    with sysmt.attach(model) as sim, pytest.raises(CalibrationError, match=message):
        load_calibration(sim, path)
    assert sim.ranges() == {}
    assert torch.equal(model.bn1.running_mean, before)


@pytest.mark.parametrize("keep", [0, 10, 300, -1])
def test_a_cut_file_is_damaged(saved, keep):
    path, *_ = saved
    path.write_bytes(path.read_bytes()[:keep])
    with sysmt.attach(network()) as sim, pytest.raises(CalibrationError, match="damaged"):
        load_calibration(sim, path)


def test_pickles_are_not_read(tmp_path):
    np.savez(tmp_path / "c.npz", header=np.array([print], dtype=object))
    with sysmt.attach(network()) as sim, pytest.raises(CalibrationError, match="damaged"):
        load_calibration(sim, tmp_path / "c.npz")


def test_there_must_be_something_to_save_and_a_name_for_it(tmp_path):
    with sysmt.attach(network()) as sim:
        with pytest.raises(CalibrationError, match="calibrate first"):
            save_calibration(sim, tmp_path / "c.npz")
        with pytest.raises(ConfigError, match=r"\.npz"):
            save_calibration(sim, tmp_path / "c.bin")
    assert not list(tmp_path.iterdir())


def test_one_flipped_bit_is_noticed(saved):
    path, *_ = saved
    whole = path.read_bytes()
    with np.load(path) as content:
        at = whole.find(content["statistics/bn1.running_var"].tobytes())
    path.write_bytes(whole[: at + 2] + bytes([whole[at + 2] ^ 1]) + whole[at + 3 :])
    with sysmt.attach(network()) as sim, pytest.raises(CalibrationError, match="Bad CRC-32.*running_var"):
        load_calibration(sim, path)
