"""Plots are drawn, whole, without a display, for every shape of results."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sysmt.errors import ConfigError, OutputError
from sysmt.study.plots.run import COLOURS, draw_run, figure, plot_accuracy, plot_collisions


def summary(settings, with_float=True):
    rows = [("float", 0, False, 0.9, np.nan, np.nan)] if with_float else []
    rows += [(name, t, "recalibrated" in name, 0.9 - t / 100, 0.01, float(t)) for name, t in settings]
    columns = ["setting", "threads", "recalibrated", "top1", "top1_difference_se", "speedup"]
    return pd.DataFrame(rows, columns=columns)


def layers(settings, count):
    rows = [
        (name, f"layer{i}.0.conv1", t, 100, 0.0 if t == 1 else 0.2 + i / (2 * count))
        for name, t in settings
        for i in range(count)
    ]
    return pd.DataFrame(rows, columns=["setting", "name", "threads", "macs", "collision_rate"])


def darkness(path):
    """Share of pixels that are not white."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return float((np.asarray(image.convert("L")) < 250).mean())


SETTINGS = {
    "one thread": [("1T", 1)],
    "three": [("1T", 1), ("2T", 2), ("4T", 4)],
    "recalibrated": [("1T", 1), ("4T", 4), ("1T recalibrated", 1), ("4T recalibrated", 4)],
    "many": [(f"{t}T throttled {k}", t) for t in (2, 4) for k in range(1, 8)],
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("count", [1, 7, 150])
def test_every_shape_of_run_is_drawn(tmp_path, name, count):
    summary(SETTINGS[name]).to_csv(tmp_path / "summary.csv", index=False)
    layers(SETTINGS[name], count).to_csv(tmp_path / "layers.csv", index=False)
    drawn = draw_run(tmp_path, "title")
    assert [path.name for path in drawn] == ["accuracy.png", "collisions.png"]
    assert all(darkness(path) > 0.005 for path in drawn)


def test_an_interrupted_run_without_float_or_errors_is_drawn(tmp_path):
    table = summary([("2T", 2)], with_float=False).assign(top1_difference_se=np.nan)
    plot_accuracy(table, tmp_path / "a.png")
    assert darkness(tmp_path / "a.png") > 0.005


def test_nothing_to_plot_is_said(tmp_path):
    summary([]).to_csv(tmp_path / "summary.csv", index=False)
    with pytest.raises(ConfigError, match=r"layers\.csv is missing"):
        draw_run(tmp_path)
    layers([], 0).to_csv(tmp_path / "layers.csv", index=False)
    with pytest.raises(ConfigError, match="nothing to plot"):
        draw_run(tmp_path)


def test_a_plot_is_whole_or_absent_and_the_style_stays_inside(tmp_path):
    before = mpl.rcParams["font.size"]
    with pytest.raises(ZeroDivisionError), figure(tmp_path / "x.png"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    assert mpl.rcParams["font.size"] == before
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"x\.png"):
        plot_collisions(layers([("2T", 2)], 2), tmp_path / "file/x.png")


def test_colours_differ_in_grey_print_too():
    grey = [
        np.dot([int(colour[i : i + 2], 16) for i in (1, 3, 5)], [0.299, 0.587, 0.114]) for colour in COLOURS
    ]
    assert abs(grey[0] - grey[1]) > 20  # the two that every plot with two series uses
    assert len(set(COLOURS)) == len(COLOURS)
