"""The main job in Python: paired differences, throttling, threads maps, run configurations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CLASSES, write_images

import sysmt
from sysmt.errors import CalibrationError, ConfigError
from sysmt.nn.networks.models import build_model
from sysmt.study.evaluate import Job, array_facts, layer_table, paired_difference, summary_table
from sysmt.study.run_config import RunConfig
from sysmt.study.thread_maps import measure_errors, read_threads_map, throttle, write_threads_map


def test_paired_difference_by_hand():
    reference = np.array([1, 1, 1, 0], bool)
    correct = np.array([1, 0, 1, 0], bool)
    difference, standard_error = paired_difference(correct, reference)
    assert difference == -0.25
    # differences 0, -1, 0, 0: variance (3 * 0.25**2 + 0.75**2) / 3 = 0.25
    assert standard_error == pytest.approx(math.sqrt(0.25 / 4))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2))
def test_paired_difference_follows_from_the_disagreements(pairs):
    correct, reference = (np.array(column) for column in zip(*pairs, strict=True))
    difference, standard_error = paired_difference(correct, reference)
    n, won, lost = len(pairs), int((correct & ~reference).sum()), int((~correct & reference).sum())
    assert difference == pytest.approx((won - lost) / n)
    variance = (won + lost - (won - lost) ** 2 / n) / (n - 1)
    assert standard_error == pytest.approx(math.sqrt(max(0, variance) / n), abs=1e-12)


def test_one_image_has_no_standard_error():
    difference, standard_error = paired_difference(np.array([True]), np.array([False]))
    assert difference == 1
    assert math.isnan(standard_error)


@pytest.fixture
def job(tmp_path):
    path = write_images(tmp_path / "tiny.npz")
    return Job(RunConfig(weights="random", data=f"npz:{path}", batch_size=8, threads=(1, 4)))


def test_measuring_leaves_the_network_as_it_was(job):
    before = {key: value.clone() for key, value in job.model.state_dict().items()}
    recalibrating = RunConfig.from_record(job.config.to_record() | {"recalibrate": "ema"})
    job.config = recalibrating
    measured = list(job.run())
    assert [one.name for one in measured] == ["float", "1T", "4T", "1T recalibrated", "4T recalibrated"]
    assert [one.recalibrated for one in measured] == [False, False, False, True, True]
    for key, value in job.model.state_dict().items():
        assert torch.equal(value, before[key]), key
    job.sim.detach()
    assert all("forward" not in module.__dict__ for module in job.model.modules())


def test_the_tables_compare_with_the_float_network(job):
    measured = list(job.run())
    summary = summary_table(measured)
    correct = [one.evaluation.correct for one in measured]
    for i in (1, 2):
        assert summary["top1_difference"][i] == pytest.approx(correct[i].mean() - correct[0].mean())
    assert summary["top1_difference"].isna().tolist() == [True, False, False]
    layers = layer_table(measured)
    assert list(layers["setting"].unique()) == ["1T", "4T"]
    assert layers[layers["setting"] == "4T"]["cycles"].sum() == summary["cycles"][2]


def test_facts_of_the_array_by_hand(job):
    job.calibrate()
    job.sim.set_threads({"layer1.0.conv1": 1})
    job.sim.reset()
    with torch.no_grad():
        job.model(torch.rand(3, 1, 8, 8))
    facts, report = array_facts(job.sim, clock_mhz=2), job.sim.report()
    simulated = report[report["threads"] > 0]
    assert facts["speedup"] == pytest.approx(
        simulated["macs"].sum() / (simulated["macs"] / simulated["threads"]).sum()
    )
    assert facts["cycles"] == report["cycles"].sum()
    assert facts["macs"] == report["macs"].sum()
    assert facts["latency_ms"] == pytest.approx(facts["cycles"] / 3 / 2e6 * 1e3)


# -- throttling and maps -----------------------------------------------------------------------


@pytest.fixture
def sim():
    torch.manual_seed(0)
    with sysmt.attach(build_model("digits", CLASSES), sysmt.ArrayConfig(threads=4)) as simulation:
        simulation.calibrate([torch.rand(8, 1, 8, 8)], 8)
        yield simulation


def test_throttle_lowers_the_worst_layers(sim):
    measure_errors(sim, [torch.rand(8, 1, 8, 8)], 8)
    assert not sim.errors
    mse = {layer.name: layer.counts.mse for layer in sim.simulated()}
    worst = sorted(mse, key=mse.__getitem__)[-2:]
    assert throttle(sim, 2, 2) == {name: 2 if name in worst else 4 for name in mse}
    with pytest.raises(CalibrationError, match="measure_errors"):
        throttle(sim, 1)


def test_throttling_passes_over_layers_that_are_low_already(sim):
    names = list(sim.threads())
    sim.set_threads({names[0]: 1})
    measure_errors(sim, [torch.rand(8, 1, 8, 8)], 8)
    assert throttle(sim, 100, 1) == dict.fromkeys(names, 1)
    assert throttle(sim, 1, 1) == dict.fromkeys(names, 1)  # nothing left to lower


def test_maps_come_back(tmp_path):
    threads = {"layer1.0.conv1": 2, "features.0": 1, "plain": 4}
    write_threads_map(tmp_path / "m.toml", threads)
    assert read_threads_map(tmp_path / "m.toml") == threads
    (tmp_path / "m.toml").write_text("layer1.0.conv1 = 2\nfeatures.0 = 1\nplain = 4\n")
    assert read_threads_map(tmp_path / "m.toml") == threads


# -- configurations ----------------------------------------------------------------------------


def test_settings_in_order():
    config = RunConfig(
        threads=(1, 2, 4), threads_map={"a": 1, "default": 2}, throttle=3, throttle_to=2, recalibrate="final"
    )
    settings = config.settings()
    assert [one.name for one in settings[:5]] == ["1T", "2T", "4T", "map", "4T throttled 3"]
    assert [one.name for one in settings[5:]] == [f"{one.name} recalibrated" for one in settings[:5]]
    assert (settings[3].threads, settings[3].threads_map) == (2, {"a": 1})
    assert RunConfig(threads=(1, 2), threads_map={"a": 1}).settings()[-1].threads == 2


def test_a_configuration_comes_back_from_its_record(tmp_path):
    config = RunConfig(
        model="resnet20",
        weights=str(tmp_path / "w"),
        data=f"npz:{tmp_path / 'd'}",
        threads=(2,),
        threads_map={"a.b": 4},
        percentile=99,
        saturate=True,
        policy="A",
        images=7,
    )
    assert RunConfig.from_record(config.to_record()) == config
    assert RunConfig.from_record(RunConfig().to_record()) == RunConfig()


def test_records_work_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = RunConfig(weights="w.pt", data="npz:d.npz", calibration="c.npz").to_record()
    assert record["weights"] == str(tmp_path / "w.pt")
    assert record["data"] == f"npz:{tmp_path / 'd.npz'}"
    assert record["calibration"] == str(tmp_path / "c.npz")
    record = RunConfig(weights="torchvision:DEFAULT", data="digits").to_record()
    assert (record["weights"], record["data"]) == ("torchvision:DEFAULT", "digits")
    assert RunConfig(weights="random").to_record()["weights"] == "random"


@pytest.mark.parametrize(
    "values",
    [
        {"batch_size": 2.5},
        {"threads": 2},
        {"threads": ()},
        {"percentile": True},
        {"weights": 3},
        {"first": 1},
    ],
    ids=str,
)
def test_impossible_configurations(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        RunConfig(**values)
