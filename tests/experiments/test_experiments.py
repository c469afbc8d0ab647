"""Small versions of the experiments: what must hold whatever the network, and the paper's direction."""

import sys
import tomllib

import numpy as np
import pandas as pd
import policies
import pruning_collisions
import pytest
import recalibration
import table1
import torch
from common import preset
from common.command import main
from common.networks import workloads
from small_experiments import run, save_digits

from sysmt.config import Policy
from sysmt.errors import ConfigError, OutputError
from sysmt.nn.data.labelled_images import open_data
from sysmt.nn.networks.checkpoints import save_weights
from sysmt.nn.networks.models import build_model
from sysmt.study.ledger import Ledger
from sysmt.study.workload import OpenWorkload

IMAGES = 200


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_digits(tmp_path_factory.mktemp("weights"), epochs=5)


def small(weights, out, images=IMAGES):
    """The options of a small run."""
    return [
        *("--model", "digits", "--weights", weights, "--data", "digits", "--out", out),
        *("--images", images, "--calibration-images", 64),
    ]


# -- the experiments ---------------------------------------------------------------------------


def test_recalibration_wins_back_what_truncation_at_4t_costs(weights, tmp_path):
    """Table 1's direction, made safe for few images: cutting low bits off shifts every mean one way."""
    options = [*small(weights, tmp_path / "t", images=596), "--rounding", "truncate", "--policy", "A"]
    options += ["--seeds", 2]
    said = run(table1, *options, "--recalibration-images", 512)
    table = pd.read_csv(tmp_path / "t" / "table1.csv").set_index(["setting", "recalibrated"])
    plain = table.loc[("4T", False)]
    assert plain["difference"] < -4 * plain["difference_se"] < 0
    assert table.loc[("2T", False), "difference"] > plain["difference"]
    again = table.loc[("4T", True)]
    assert again["gain"] > 3 * again["gain_se"] > 0
    # The controls: without noise there is nothing to win back, and little to lose.
    assert abs(table.loc[("A8W8", False), "difference"]) < 0.03
    assert abs(table.loc[("FP32", True), "difference"]) < 0.1
    assert (table["images"] == 596).all()
    assert table.loc[("4T†", False), "speedup"] < table.loc[("4T", False), "speedup"] == 4
    assert isinstance(table.loc[("4T†", False), "throttled"], str)
    assert "4T w/o" in said
    # Per layer, how far the statistics moved: more under noise than without it.
    shifts = pd.read_csv(tmp_path / "t" / "shifts.csv")
    moved = shifts.groupby("setting")["mean_shift"].mean()
    assert moved["4T"] > moved["2T"] > moved["A8W8"]
    assert (tmp_path / "t" / "table1.png").stat().st_size > 1000


def test_policies_order_as_their_arithmetic_says(weights, tmp_path):
    run(policies, *small(weights, tmp_path / "p", images=20))
    points = pd.read_csv(tmp_path / "p" / "points.csv").set_index(["policy", "threads", "reorder"])
    assert len(points) == 2 + 4 * len(Policy)
    assert points.loc[("exact", 1, False), "mse"] == 0
    noise = points["mse"]
    for policy in Policy:
        assert noise[(policy.value, 4, False)] > noise[(policy.value, 2, False)] > 0
        if policy.skips_zeros and policy is not Policy.S:
            without = policy.value.removeprefix("S+")
            assert noise[(policy.value, 4, False)] < noise[(without, 4, False)]
    assert noise[("S+A", 2, False)] < noise[("S", 2, False)]
    # Where every slot is a full collision, it does not matter who meets whom.
    for threads in (2, 4):
        assert noise[("A", threads, False)] == pytest.approx(noise[("A", threads, True)], rel=1e-12)
    assert noise[("S+A", 4, False)] != noise[("S+A", 4, True)]
    layers = pd.read_csv(tmp_path / "p" / "layers.csv")
    assert set(layers["policy"]) == {"exact", *(policy.value for policy in Policy)}


def test_recalibration_counts_images_and_joins_seeds(weights, tmp_path):
    options = [*small(weights, tmp_path / "r", images=50), "--seeds", 2, "--counts", "32,100000"]
    run(recalibration, *options)
    table = pd.read_csv(tmp_path / "r" / "recalibration.csv")
    available = open_data("digits").images("train")
    assert set(table["recalibration_images"]) == {0, 32, available}
    assert len(table) == 1 + 2 * (1 + 3 * 2)
    assert set(table.loc[table["threads"] > 0, "seeds"]) == {2}
    one_batch = table[table["recalibration_images"] == 32].set_index(["threads", "mode"])["top1"]
    for threads in (2, 4):  # of a single batch, the pool of all and the last one are the same
        assert one_batch[(threads, "cumulative")] == one_batch[(threads, "final")]


def test_pruning_lowers_collisions_and_retraining_keeps_masks(weights, tmp_path):
    options = [*small(weights, tmp_path / "c"), "--sparsities", "0,0.4,0.8", "--schedule", "0.2,0.4"]
    run(pruning_collisions, *options, "--epochs", 1, "--recalibration-images", 256)
    points = pd.read_csv(tmp_path / "c" / "points.csv")
    plain = points[~points["recalibrated"] & (points["threads"] > 0)]
    for setting in ("2T", "4T"):
        for retrained in (False, True):
            rows = plain[(plain["setting"] == setting) & (plain["retrained"] == retrained)]
            rows = rows.sort_values("sparsity")
            assert rows["collision_rate"].is_monotonic_decreasing
            assert rows["utilization"].is_monotonic_decreasing
            assert np.allclose(rows["zero_weights"], rows["sparsity"], atol=1e-3)
    rates = plain.set_index(["retrained", "sparsity", "setting"])["collision_rate"].unstack("setting")
    assert (rates["4T"] > rates["2T"]).all()
    assert (plain.loc[plain["setting"] == "A8W8", "collision_rate"] == 0).all()
    kept = sorted(path.name for path in (tmp_path / "c").glob("*.pt"))
    assert kept == ["digits-pruned-20.pt", "digits-pruned-40.pt"]


def test_a_stopped_run_goes_on_and_ends_like_one_that_was_not(weights, tmp_path, monkeypatch):
    options = ["--seeds", 1, "--recalibration-images", 64]
    run(table1, *small(weights, tmp_path / "whole", images=20), *options)
    whole = pd.read_csv(tmp_path / "whole" / "points.csv").drop(columns="seconds")
    evaluations = []
    honest = OpenWorkload.evaluate

    def evaluate(self, what):
        evaluations.append(what)
        if len(evaluations) == 6:
            raise KeyboardInterrupt
        return honest(self, what)

    monkeypatch.setattr(OpenWorkload, "evaluate", evaluate)
    run(table1, *small(weights, tmp_path / "parts", images=20), *options, code=130)
    assert len(pd.read_csv(tmp_path / "parts" / "points.csv")) == 5
    status = tomllib.loads((tmp_path / "parts" / "config.toml").read_text())["outcome"]["status"]
    assert status == "interrupted"
    run(table1, *small(weights, tmp_path / "parts", images=20), *options)
    assert len(evaluations) == 6 + len(whole) - 5
    parts = pd.read_csv(tmp_path / "parts" / "points.csv").drop(columns="seconds")
    pd.testing.assert_frame_equal(whole, parts)
    for name in ("table1.md", "shifts.csv"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_another_configuration_is_refused(weights, tmp_path):
    options = ["--seeds", 1, "--recalibration-images", 64]
    run(table1, *small(weights, tmp_path, images=10), *options)
    before = (tmp_path / "config.toml").read_text()
    for changed, what in (
        ([*small(weights, tmp_path, images=11), *options], "images = 10, now it is 11"),
        (
            ["--model", "digits", "--weights", weights, "--data", "digits", "--out", tmp_path, *options],
            "images = 10",
        ),
        ([*small(weights, tmp_path, images=10), *options, "--mode", "final"], "mode = 'ema'"),
    ):
        with pytest.raises(OutputError, match=what):
            run(table1, *changed)
    assert (tmp_path / "config.toml").read_text() == before


def test_more_seeds_add_to_what_is_there(weights, tmp_path):
    options = [*small(weights, tmp_path, images=10), "--recalibration-images", 64]
    one = run(table1, *options, "--seeds", 1)
    first = pd.read_csv(tmp_path / "points.csv")
    run(table1, *options, "--seeds", 2)
    points = pd.read_csv(tmp_path / "points.csv")
    pd.testing.assert_frame_equal(points[: len(first)], first)  # times included: not measured again
    table = pd.read_csv(tmp_path / "table1.csv").set_index(["setting", "recalibrated"])
    assert table.loc[("4T", True), "seeds"] == 2
    rows = points[(points["setting"] == "4T") & points["recalibrated"]]
    assert table.loc[("4T", True), "top1"] == pytest.approx(rows["top1"].mean())
    again = run(table1, *options, "--seeds", 1)
    assert again.splitlines()[:-1] == one.splitlines()[:-1]  # the last line counts points and seconds


def test_other_weights_of_the_same_name_are_refused(tmp_path):
    path = tmp_path / "weights.pt"
    options = ["--seeds", 1, "--recalibration-images", 64]
    torch.manual_seed(0)
    save_weights(build_model("digits"), path)
    run(table1, *small(path, tmp_path / "out", images=10), *options)
    points = pd.read_csv(tmp_path / "out" / "points.csv")
    points[:-1].to_csv(tmp_path / "out" / "points.csv", index=False)  # something is left to do
    torch.manual_seed(1)
    save_weights(build_model("digits"), path)
    with pytest.raises(OutputError, match="weights_sha256"):
        run(table1, *small(path, tmp_path / "out", images=10), *options)


def test_wrong_choices_are_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path):
    for module, args, words in (
        (table1, ["--preset", "mine"], "allowed: shared"),
        (table1, ["--preset", "shared:resnet20-jepg"], "did you mean 'resnet20-jpeg'"),
        (table1, ["--preset", "shared", "--model", "resnet20"], "leave out --model"),
        (pruning_collisions, ["--sparsities", "0.4,0.2"], "ascend"),
        (recalibration, ["--counts", "1"], "a variance needs 2 images"),
    ):
        monkeypatch.setattr(sys, "argv", [module.__name__, *args, "--out", str(tmp_path / "none")])
        with pytest.raises(SystemExit) as ended:
            main(getattr(module, module.__name__))
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert words in said.replace("\n", " ")
        assert "Traceback" not in said
        assert not (tmp_path / "none").exists()


def test_the_preset_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("SYSMT_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match="needs cifar10/lossless.npz|needs weights/"):
        workloads({}, "shared:resnet20", False, ())


def test_the_preset_opens_each_network_that_needs_no_training(monkeypatch, tmp_path):
    monkeypatch.setenv("SYSMT_CACHE", str(tmp_path))
    try:
        for path in ("weights/resnet20-12fca82f.th", "cifar10/lossless.npz"):
            preset.shared(path)
    except ConfigError as error:
        pytest.skip(str(error))
    for network in workloads({}, "shared:resnet20,resnet32", False, ()):
        subject = OpenWorkload(network.config)
        assert subject.data.images("test") == 1000
        assert subject.data.preprocessing.pad_pixels == 4


def test_how_long_to_retrain_follows_from_the_training_images():
    assert [pruning_collisions.default_epochs(images) for images in (0, 1000, 20_000, 50_000, 10**6)] == [
        0, 5, 2, 1, 0,
    ]  # fmt: skip


# -- the ledger --------------------------------------------------------------------------------


def ledger(path, **changes):
    given = {"experiment": "one", "settings": {"seeds": 3}, "keys": ("name", "size")} | changes
    return Ledger(path, **given)


def test_a_ledger_gives_back_what_it_was_given(tmp_path):
    correct = np.arange(13) % 3 == 0
    layers = pd.DataFrame({"layer": ["a", "b"], "mse": [0.1, 1 / 3]})
    with ledger(tmp_path / "x") as book:
        book.add({"name": "n", "size": 0.1, "images": 13, "top1": 1 / 3}, correct, {"layers": layers})
        assert book.has(name="n", size=0.1)
        assert not book.has(name="n", size=0.2)
    with ledger(tmp_path / "x") as book:
        assert book.has(name="n", size=0.1)
        assert book.points()["top1"].tolist() == [1 / 3]
        assert book.correct(name="n", size=0.1).tolist() == correct.tolist()
        book.add({"name": "n", "size": 0.2, "images": 1, "top1": 1.0}, tables={"layers": layers[:1]})
    table = pd.read_csv(tmp_path / "x" / "layers.csv")
    assert table["size"].tolist() == [0.1, 0.1, 0.2]
    assert table["mse"].tolist() == [0.1, 1 / 3, 0.1]
    config = tomllib.loads((tmp_path / "x" / "config.toml").read_text())
    assert config["outcome"]["status"] == "complete"
    assert config["outcome"]["points"] == 2


def test_rows_of_a_point_that_was_killed_are_dropped(tmp_path):
    layers = pd.DataFrame({"layer": ["a"]})
    with ledger(tmp_path) as book:
        for name in ("first", "killed"):
            book.add({"name": name, "size": 1}, tables={"layers": layers})
    points = pd.read_csv(tmp_path / "points.csv")
    points[:1].to_csv(tmp_path / "points.csv", index=False)  # killed before its row was written
    with ledger(tmp_path) as book:
        assert not book.has(name="killed", size=1)
        book.add({"name": "killed", "size": 1}, tables={"layers": layers})
    assert pd.read_csv(tmp_path / "layers.csv")["name"].tolist() == ["first", "killed"]


def test_a_ledger_refuses_what_is_not_its_own(tmp_path):
    with ledger(tmp_path / "x") as book:
        book.identify("net", {"weights": "abc", "images": 10})
        book.add({"name": "n", "size": 1})
        with pytest.raises(OutputError, match="another process"):
            ledger(tmp_path / "x")
    with pytest.raises(OutputError, match="seeds = 3, now it is 4"):
        ledger(tmp_path / "x", settings={"seeds": 4})
    with pytest.raises(OutputError, match="'one', not 'two'"):
        ledger(tmp_path / "x", experiment="two")
    with pytest.raises(OutputError, match="images = 10, now it is 11"), ledger(tmp_path / "x") as book:
        book.identify("net", {"images": 11})
    with ledger(tmp_path / "x") as book:
        book.identify("net", {"weights": "abc"})
        book.identify("another net", {"weights": "def"})
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        ledger(tmp_path / "y")


def test_a_failure_is_noted(tmp_path):
    def measure():
        with ledger(tmp_path) as book:
            book.add({"name": "n", "size": 1})
            raise ZeroDivisionError("by nought")

    with pytest.raises(ZeroDivisionError):
        measure()
    outcome = tomllib.loads((tmp_path / "config.toml").read_text())["outcome"]
    assert outcome["status"] == "failed: by nought"
