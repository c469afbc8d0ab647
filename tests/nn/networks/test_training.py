"""The training loop and evaluation: exact figures, repeatable and resumable runs, and honest refusals."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from places import REPOSITORY
from torch import nn
from torch.nn.utils import prune

import sysmt.progress
from sysmt.errors import ConfigError, DataError, DivergedError, WeightsError
from sysmt.nn.data.labelled_images import ImageData, open_data
from sysmt.nn.networks import digits
from sysmt.nn.networks.checkpoints import weights_hash
from sysmt.nn.networks.digits import trained_digits
from sysmt.nn.networks.models import build_model
from sysmt.nn.networks.training import History, evaluate, train


class FixedLogits(nn.Module):
    """Returns its inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def colours(path: Path, count: int = 65) -> ImageData:
    """Images whose strongest colour is their class; one more than fills the batches of 16."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    pixels = rng.integers(0, 160, (count, 8, 8, 3), dtype=np.uint8)
    pixels[np.arange(count), :, :, labels] += 60
    np.savez(path, x_train=pixels, y_train=labels, x_test=pixels[:30], y_test=labels[:30])
    return open_data(f"npz:{path}", preprocessing="small")


@pytest.fixture
def data(tmp_path: Path) -> ImageData:
    return colours(tmp_path / "colours.npz")


OPTIONS = {"epochs": 4, "lr": 0.05, "batch_size": 16, "progress": False}


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (
            network(),
            (2, 1, 8, 8),
            r"Sequential does not take images of shape \(1, 8, 8\).*expected input\[2, 1, 8, 8\]",
        ),
        (build_model("alexnet", 3), (2, 3, 32, 32), r"AlexNet does not take images of shape \(3, 32, 32\)"),
        (nn.Flatten(0), (2, 3, 8, 8), r"Flatten gives an output of shape \(384,\) for 2 images; logits"),
    ],
)
def test_images_that_the_network_does_not_take_are_named(
    model: nn.Module, shape: tuple[int, ...], message: str
) -> None:
    batches = [(torch.zeros(shape), torch.zeros(len(torch.zeros(shape)), dtype=torch.long))]
    with pytest.raises(DataError, match=message):
        evaluate(model, batches, progress=False)
    if list(model.parameters()):
        with pytest.raises(DataError, match=message):
            train(model, batches, 1, progress=False)


def test_errors_of_an_attached_network_pass_through() -> None:
    model = network()
    model[0].forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluate(model, [(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))], progress=False)
    model[0].forward = lambda x: torch.zeros(1) @ torch.zeros(2)
    with pytest.raises(RuntimeError, match="size"):
        evaluate(model, [(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))], progress=False)


def test_folders_of_some_classes_are_told_to_name_them_all(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    data = open_data(f"imagefolder:{tmp_path}", preprocessing="small")
    message = (
        r"2 classes, the network 3.*classes\.txt beside the folders, or open_data\(\.\.\., classes=FILE\)"
    )
    with pytest.raises(DataError, match=message):
        evaluate(network(), data.loader("test"), progress=False)
    (tmp_path / "classes.txt").write_text("c\nb\na\n")
    named = open_data(f"imagefolder:{tmp_path}", preprocessing="small")
    assert evaluate(network(), named.loader("test"), progress=False).images == 2
    assert next(iter(named.loader("test")))[1].tolist() == [2, 1]


# -- evaluation --------------------------------------------------------------------------------


def test_hand_worked_evaluation() -> None:
    logits = torch.tensor([[9.0, 1, 2, 3, 4, 5], [1, 9, 2, 3, 4, 5], [0, 5, 4, 3, 2, 9], [5, 4, 3, 2, 1, 0]])
    labels = torch.tensor([0, 2, 0, 4])  # right; not first but among five; the smallest; fifth
    result = evaluate(FixedLogits(), [(logits[:3], labels[:3]), (logits[3:], labels[3:])], progress=False)
    assert (result.top1, result.top5, result.images) == (0.25, 0.75, 4)
    assert result.correct.tolist() == [True, False, False, False]
    probabilities = torch.exp(logits)[range(4), labels] / torch.exp(logits).sum(1)
    assert result.loss == pytest.approx(float(-probabilities.log().mean()), rel=1e-6)
    assert result.to_record()["top1"] == 0.25


def test_fewer_than_five_classes() -> None:
    result = evaluate(FixedLogits(), [(torch.eye(3), torch.tensor([1, 1, 1]))], progress=False)
    assert result.top5 == 1.0


def test_evaluation_leaves_modes_and_weights_alone(data: ImageData) -> None:
    model = network()
    model[1].eval()
    model[3].train()
    before, buffers = weights_hash(model), weights_hash(model, "buffers")
    loader = data.loader("test", batch_size=7)
    one, two = evaluate(model, loader, progress=False), evaluate(model, loader, progress=False)
    assert one == two  # dropout is off
    assert (model[1].training, model[3].training) == (False, True)
    assert (weights_hash(model), weights_hash(model, "buffers")) == (before, buffers)


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
def test_labels_without_a_logit(labels: list[int]) -> None:
    with pytest.raises(DataError, match="the network has 3 classes"):
        evaluate(FixedLogits(), [(torch.zeros(2, 3), torch.tensor(labels))], progress=False)


def test_named_classes_must_be_the_networks() -> None:
    loader = open_data("digits").loader("test", images=4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 12))
    with pytest.raises(DataError, match="10 classes, the network 12"):
        evaluate(model, loader, progress=False)


def test_nothing_to_evaluate() -> None:
    with pytest.raises(DataError, match="no images"):
        evaluate(FixedLogits(), [], progress=False)


# -- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_learns(schedule: str, optimizer: str, data: ImageData) -> None:
    model = network()
    test = data.loader("test")
    options = OPTIONS | {"epochs": 12}
    history = train(model, data, schedule=schedule, optimizer=optimizer, test=test, **options)
    assert len(history.epochs) == 12
    assert history.epochs[-1]["loss"] < 0.7 * history.epochs[0]["loss"]
    assert history.epochs[-1]["test_top1"] == evaluate(model, test, progress=False).top1 > 0.8
    falls = history.epochs[-1]["lr"] < 0.05 * OPTIONS["lr"]
    assert falls == (schedule != "constant")


def test_same_seed_same_weights(data: ImageData) -> None:
    models = [network(), network(), network()]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        train(model, data, seed=seed, **OPTIONS)
    assert weights_hash(models[0]) == weights_hash(models[1]) != weights_hash(models[2])


def test_modes_and_global_randomness_are_left_alone(data: ImageData) -> None:
    model = network().eval()
    state = torch.get_rng_state()
    train(model, data, **OPTIONS)
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_plain_batches_and_after_step(data: ImageData) -> None:
    model = network()
    batches = list(data.loader("train", batch_size=32))
    steps: list[int] = []

    def pin(step: int) -> None:
        steps.append(step)
        with torch.no_grad():
            model[6].weight[0] = 0

    train(model, batches, after_step=pin, **OPTIONS)
    assert steps == list(range(1, 4 * 2 + 1))  # 65 images: two batches, and one image that is left out
    assert not model[6].weight[0].any()
    assert model[6].weight[1].any()


def test_prune_masks_survive(data: ImageData) -> None:
    model = network()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    zeros = model[0].weight == 0
    train(model, data, **OPTIONS)
    model.eval()(torch.zeros(1, 3, 8, 8))
    assert torch.equal(model[0].weight == 0, zeros)


def test_the_rate_falls_to_a_tenth_at_each_milestone(data: ImageData) -> None:
    options = OPTIONS | {"epochs": 4, "lr": 0.5, "schedule": "step", "milestones": (0.5, 0.75)}
    history = train(network(), data, **options)
    assert [record["lr"] for record in history.epochs] == pytest.approx([0.5, 0.05, 0.005, 0.005])


def test_tests_fall_due_after_steps(data: ImageData) -> None:
    model = network()
    test = data.loader("test")
    history = train(model, data, test=test, test_every=3, **OPTIONS)
    assert [record["step"] for record in history.tests] == [3, 6, 9, 12, 15]  # 16 steps, 4 in an epoch
    assert [record["epochs"] for record in history.tests] == [0.75, 1.5, 2.25, 3.0, 3.75]
    assert all(0 <= record["test_top1"] <= 1 for record in history.tests)
    assert "test_top1" not in history.epochs[0]
    same = network()
    train(same, data, **OPTIONS)
    assert weights_hash(model) == weights_hash(same)  # looking does not change anything


def test_channels_last_is_for_the_time_of_training_alone(data: ImageData) -> None:
    def layout(model: nn.Module) -> list[bool]:
        return [tensor.is_contiguous() for tensor in model.state_dict().values()]

    models = [network() for _ in range(3)]
    models[2].to(memory_format=torch.channels_last)
    for model in models:
        model[3] = nn.Identity()  # dropout draws in the order of memory
    before = [layout(model) for model in models]
    seen: list[bool] = []
    for model, channels_last in zip(models, (True, False, True), strict=True):
        train(
            model,
            data,
            channels_last=channels_last,
            after_step=lambda _, model=model: seen.append(model[0].weight.is_contiguous()),
            **OPTIONS,
        )
    assert [layout(model) for model in models] == before
    assert set(seen[:16]) == {False}
    assert set(seen[16:32]) == {True}
    assert weights_hash(models[0]) == weights_hash(models[2])
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-2)


def test_no_epochs_change_nothing(data: ImageData) -> None:
    model = network()
    before = weights_hash(model)
    assert train(model, data, **OPTIONS | {"epochs": 0}) == History(())
    assert weights_hash(model) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer": "adma"}, "optimizer='adma'"),
        ({"schedule": "steps"}, "schedule='steps'"),
        ({"schedule": "step", "milestones": (0.8, 0.4)}, r"milestones=\(0.8, 0.4\) must ascend"),
        ({"schedule": "step", "milestones": (0.5, 1.0)}, "milestones="),
        ({"statistics": "populaton"}, "did you mean 'population'"),
        ({"statistics": "frozen"}, "freeze_after=None do not go together"),
        ({"statistics": "final", "freeze_after": 3}, "statistics='final' and freeze_after=3"),
        ({"freeze_after": 3}, "statistics=None and freeze_after=3"),
        ({"statistics": "frozen", "freeze_after": 0}, "freeze_after=0"),
        ({"test_every": 2}, "test_every=2 is without use"),
        ({"test_every": 0}, "test_every=0"),
        ({"lr": 0}, "lr=0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"epochs": -1}, "epochs=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"data": iter([])}, "no length"),
        ({"device": "gpu"}, "device='gpu' is not possible here"),
    ],
)
def test_impossible_training(change: dict, words: str, data: ImageData) -> None:
    with pytest.raises(ConfigError, match=words):
        train(network(), **{"data": data, **OPTIONS, **change})


def test_a_batch_without_images_is_named() -> None:
    loader = [
        (torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)),
        (torch.zeros(0, 3, 8, 8), torch.zeros(0)),
    ]
    with pytest.raises(DataError, match="a batch without images"):
        train(network(), loader, **OPTIONS)


def test_divergence_is_an_error(data: ImageData) -> None:
    with pytest.raises(DivergedError, match="lr=1e\\+30 is too large"):
        train(network(), data, **OPTIONS | {"lr": 1e30, "momentum": 0.0, "schedule": "constant"})


# -- checkpoints -------------------------------------------------------------------------------


class StopHere(Exception):  # noqa: N818
    pass


def stop_at(step: int):
    def after_step(done: int) -> None:
        if done == step:
            raise StopHere

    return after_step


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("step", [2, 10, 16])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    step: int, pruned: bool, data: ImageData, tmp_path: Path
) -> None:
    def fresh(seed: int) -> nn.Module:
        model = network(seed)
        if pruned:
            prune.random_unstructured(model[0], "weight", amount=0.3)
        return model

    options = OPTIONS | {"checkpoint": tmp_path / "run.pt", "optimizer": "adamw"}
    whole = fresh(0)
    expected = train(whole, data, **options | {"checkpoint": None})
    with pytest.raises(StopHere):
        train(fresh(0), data, after_step=stop_at(step), **options)
    assert (tmp_path / "run.pt").exists() == (step > 4)  # an epoch has four steps
    resumed = fresh(0) if step == 2 else fresh(9)  # what it starts from no longer matters
    history = train(resumed, data, **options)
    assert (weights_hash(resumed), weights_hash(resumed, "buffers")) == (
        weights_hash(whole), weights_hash(whole, "buffers"),
    )  # fmt: skip
    assert [(e["loss"], e["lr"]) for e in history.epochs] == [(e["loss"], e["lr"]) for e in expected.epochs]
    finished = fresh(5)
    assert train(finished, data, after_step=stop_at(1), **options) == history  # nothing left to do
    assert weights_hash(finished) == weights_hash(whole)


@pytest.mark.parametrize("statistics", ["final", "frozen"])
def test_tests_and_statistics_are_resumed_too(statistics: str, data: ImageData, tmp_path: Path) -> None:
    options = OPTIONS | {"test": data.loader("test"), "test_every": 3, "statistics": statistics}
    options |= {"freeze_after": 9} if statistics == "frozen" else {}
    whole, resumed = network(), network(4)
    expected = train(whole, data, **options)
    with pytest.raises(StopHere):
        train(network(), data, after_step=stop_at(14), checkpoint=tmp_path / "run.pt", **options)
    history = train(resumed, data, checkpoint=tmp_path / "run.pt", **options)
    assert history.tests == expected.tests
    assert weights_hash(resumed, "buffers") == weights_hash(whole, "buffers")
    changed = options | {"statistics": "population", "freeze_after": None}
    with pytest.raises(WeightsError, match=f"statistics was '{statistics}' and is now 'population'"):
        train(network(), data, checkpoint=tmp_path / "run.pt", **changed)


def test_kill_9_leaves_a_checkpoint_that_can_be_resumed(tmp_path: Path) -> None:
    colours(tmp_path / "colours.npz")
    code = f"""
import os, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(REPOSITORY / "tests" / "support")!r}]
from pathlib import Path
from test_training import OPTIONS, colours, network, train
def kill(step):
    if step == 10:
        os.kill(os.getpid(), 9)
train(network(), colours(Path({str(tmp_path / "colours.npz")!r})), after_step=kill,
      checkpoint={str(tmp_path / "run.pt")!r}, **OPTIONS)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    data = colours(tmp_path / "colours.npz")
    resumed, whole = network(9), network()
    history = train(resumed, data, checkpoint=tmp_path / "run.pt", **OPTIONS)
    train(whole, data, **OPTIONS)
    assert len(history.epochs) == 4
    assert sorted(os.listdir(tmp_path)) == ["colours.npz", "run.pt"]
    # The killed process may have used another number of threads, which changes the last bits.
    for one, two in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


def test_foreign_and_damaged_checkpoints(data: ImageData, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    train(network(), data, checkpoint=path, **OPTIONS)
    with pytest.raises(WeightsError, match=r"lr was 0\.05 and is now 0\.1"):
        train(network(), data, checkpoint=path, **OPTIONS | {"lr": 0.1})
    other = colours(tmp_path / "other.npz", count=33)
    with pytest.raises(WeightsError, match="data was"):
        train(network(), other, checkpoint=path, **OPTIONS)
    with pytest.raises(WeightsError, match="no checkpoint of this network"):
        train(network()[4:], data, checkpoint=path, **OPTIONS)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"run\.pt"):
        train(network(), data, checkpoint=path, **OPTIONS)
    torch.save(network().state_dict(), path)
    with pytest.raises(WeightsError, match="no checkpoint of a training"):
        train(network(), data, checkpoint=path, **OPTIONS)


# -- the digits network ------------------------------------------------------------------------


def test_digits_are_kept_and_made_again_when_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(digits.RECIPE, "epochs", 1)
    threads = torch.get_num_threads()
    first = trained_digits(tmp_path, progress=False)
    assert torch.get_num_threads() == threads
    (kept,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(digits, "train", lambda *_, **__: pytest.fail("trained again"))
        again = trained_digits(tmp_path, progress=False)
    assert not again.training
    assert weights_hash(first) == weights_hash(again)
    assert weights_hash(first, "buffers") == weights_hash(again, "buffers")
    kept.write_bytes(kept.read_bytes()[:500])
    with pytest.warns(UserWarning, match="training the digits network again"):
        third = trained_digits(tmp_path, progress=False)
    assert weights_hash(third) == weights_hash(first)
    with pytest.warns(UserWarning, match="not kept"):
        trained_digits(kept, progress=False)  # a file where a directory is needed
    assert weights_hash(trained_digits(tmp_path, seed=1, progress=False)) != weights_hash(first)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_digits_reach_their_accuracy(tmp_path: Path) -> None:
    model = trained_digits(tmp_path, progress=False)
    assert evaluate(model, open_data("digits").loader("test"), progress=False).top1 > 0.97


@pytest.mark.slow
def test_digits32_lose_accuracy_at_four_threads_and_recalibration_wins_some_back(tmp_path: Path) -> None:
    model = trained_digits(tmp_path, name="digits32", progress=False)
    data = open_data("digits32")
    training, test = data.loader("train", augment=True), data.loader("test")
    as_float = evaluate(model, test, progress=False).top1
    with sysmt.attach(model, sysmt.ArrayConfig(threads=4)) as sim:
        sim.calibrate(training, images=training.images)
        squeezed = evaluate(model, test, progress=False).top1
        sysmt.recalibrate_batchnorm(model, training, images=training.images)
        recalibrated = evaluate(model, test, progress=False).top1
    assert as_float > 0.9
    assert squeezed < as_float - 0.02
    assert recalibrated > squeezed + 0.005


# -- progress ----------------------------------------------------------------------------------


def test_progress_prints_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(sysmt.progress.time, "monotonic", lambda: clock[0])
    with sysmt.progress.progress_bar("training", 1000) as bar:
        for _ in range(100):
            clock[0] += 1
            bar.advance(10, "loss 1")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training: 100 of 1000 images, 10 images/s, 1:30 left, loss 1"
    assert [line.split()[1] for line in lines] == ["100", "400", "700", "1000"]
    with sysmt.progress.progress_bar("training", 1000, enabled=False) as bar:
        clock[0] += 1000
        bar.advance(10)
    assert capsys.readouterr().err == ""


def test_bars_nest_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with sysmt.progress.progress_bar("outer", 2, "runs") as outer:
        for _ in range(2):
            with sysmt.progress.progress_bar("inner", 3) as inner:
                inner.advance(3, "note")
            outer.advance()
    assert (outer.done, inner.done) == (2, 3)
    assert sysmt.progress._TERMINAL._display is None


def test_batches_of_one_image_are_all_learned():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    batches = [(torch.randn(1, 1, 2, 2), torch.tensor([i % 3])) for i in range(6)]
    steps = []
    train(model, batches, 2, after_step=steps.append, progress=False)
    assert steps == list(range(1, 13))


def test_numpy_numbers_make_a_checkpoint_that_can_be_read(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    batches = [(torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 2, 0]))]
    options = {"lr": np.float64(0.05), "momentum": np.float32(0.5), "checkpoint": tmp_path / "c.pt"}
    first = train(model, batches, 2, progress=False, **options)
    again = train(model, batches, 2, progress=False, **options)
    assert again.to_records() == first.to_records()


def test_a_refused_checkpoint_changes_no_weights(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    batches = [(torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 2, 0]))]
    path = tmp_path / "c.pt"
    train(model, batches, 1, progress=False, checkpoint=path)
    content = torch.load(path)
    for state in ({"state": {}, "param_groups": []}, 3):
        torch.save(content | {"optimizer": state}, path)
        with torch.no_grad():
            model[1].weight.fill_(7.0)
        with pytest.raises(WeightsError, match="no checkpoint of this network"):
            train(model, batches, 1, progress=False, checkpoint=path)
        assert (model[1].weight == 7).all()


@pytest.mark.parametrize("option", [{"lr": "fast"}, {"lr": None}, {"weight_decay": math.inf}])
def test_options_that_are_no_numbers_are_refused(option):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ConfigError, match=next(iter(option))):
        train(model, [(torch.randn(4, 1, 2, 2), torch.zeros(4).long())], 1, progress=False, **option)
