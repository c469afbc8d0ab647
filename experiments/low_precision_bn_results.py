"""Tables and figures of `low_precision_bn.py`, from its points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common.panels import legend_below, markers, panels
from common.points import joined_seeds, mean_correct, those_of
from common.tables import give_or_take, markdown, percent, signed

from sysmt.quant.logscale import FORMATS
from sysmt.study.ledger import Ledger
from sysmt.study.plots.style import COLOURS, FLOAT_GREY, MARKERS, figure

KEYS = ("part", "network", "format", "width", "where", "state", "seed")
FLOAT, ALL, NOWHERE = "float", "all", "nowhere"
TRAINED, RAW, RECALIBRATED, FINE_TUNED = "trained", "raw", "recalibrated", "fine-tuned"

LOOK = dict(zip(FORMATS, zip((*COLOURS, FLOAT_GREY), (*MARKERS, "*"), strict=True), strict=True))


def report(ledger: Ledger, points: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write and print what follows from the points asked for; the ledger may hold others."""
    everything = ledger.points()
    layouts = []
    for part, keys in points.items():
        rows = those_of(keys, everything).dropna(axis="columns", how="all")  # networks may share some
        table = memory_table(rows) if part == "memory" else accuracy_table(rows, ledger)
        ledger.write(f"{part}.csv", table)
        layout, draw = RESULTS[part]
        layouts.append(layout(table))
        draw(table, ledger.path / f"{part}.png")
    text = "\n".join(layouts)
    ledger.write_text("low_precision_bn.md", text)
    print(text)


def accuracy_table(rows: pd.DataFrame, ledger: Ledger) -> pd.DataFrame:
    """Join the seeds, and compare with the float network of the same seed, image by image.

    Returns
    -------
    DataFrame
        ``top1``, mean over the seeds, and ``top1_seed_sd``; ``difference`` to float and
        ``difference_se``, each image counting with its mean over the seeds; likewise ``train_top1`` and
        ``train_difference`` where training accuracy was measured.
    """
    joined = []
    for key, group in rows.groupby(list(KEYS[:-1]), sort=False):
        first = dict(zip(KEYS, key, strict=False))
        reference = first | {"format": FLOAT}
        seeds = [int(seed) for seed in group["seed"]]
        references = [reference | {"seed": seed} for seed in seeds]
        if first["part"] == "retrofit":  # compared with the network as it came
            references = [reference | {"where": NOWHERE, "state": RAW, "seed": 0}] * len(seeds)
        row = first | joined_seeds(group, KEYS, ledger, mean_correct(references, ledger))
        row["diverged"] = int(group["diverged"].astype(bool).sum())
        row["epochs"] = int(group["epochs"].max())
        if "train_top1" in group:
            same = rows.merge(pd.DataFrame(references), on=list(KEYS))
            row["train_top1"] = group["train_top1"].mean()
            row["train_difference"] = row["train_top1"] - same["train_top1"].mean()
        joined.append(row)
    return pd.DataFrame(joined)


def memory_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the share of the float network's bytes: of the layers alone, and with recomputed activations."""
    for name in ("layers_alone", "recomputed"):
        rows[f"share_{name}"] = rows[f"saved_bytes_{name}"] / rows["saved_bytes_float"]
    return rows.drop(columns=["width", "where", "seed"])


def _error(row: pd.Series) -> str:
    cell = percent(1 - row["top1"])
    if row["difference_se"] > 0:
        cell += f" ({give_or_take(signed(-row['difference']), row['difference_se'])})"
    return cell + (" diverged" if row["diverged"] else "")


def layout_figure2(table: pd.DataFrame) -> str:
    """Lay out the changes in accuracy: formats down, widths across."""
    text = ""
    for network, here in table.groupby("network", sort=False):
        widths = sorted(here["width"].unique())
        floats = here[here["format"] == FLOAT].set_index("width")
        for what, column in (("test", "difference"), ("training", "train_difference")):
            accuracy = "top1" if what == "test" else "train_top1"
            cells = here.set_index(["format", "width"])[column]
            rows = [[f"{FLOAT}, %", *(percent(floats.loc[width, accuracy], 1) for width in widths)]]
            rows += [
                [fmt, *(signed(cells[(fmt, width)]) for width in widths)]
                for fmt in here["format"].unique()
                if fmt != FLOAT
            ]
            text += markdown([f"{network}: {what}, by width", *map(str, widths)], rows) + "\n"
    one = table.iloc[0]
    return text + (
        f"Figure 2. Change of accuracy against float BatchNorm, points; means over {one['seeds']} seed(s), "
        f"{one['epochs']} epochs, {one['images']:,} test images. Standard errors of the test changes, paired "
        f"by image, are at most {percent(table['difference_se'].max())} points.\n"
    )


def layout_table3(table: pd.DataFrame) -> str:
    """Lay out test errors: formats down, networks across."""
    networks = list(table["network"].unique())
    cells = {(row["format"], row["network"]): _error(row) for _, row in table.iterrows()}
    rows = [[fmt, *(cells[(fmt, network)] for network in networks)] for fmt in table["format"].unique()]
    one = table.iloc[0]
    note = (
        "Table 3 in small. Test error in %, and difference to float ± one standard error, paired by image; "
        f"means over {one['seeds']} seed(s), {one['epochs']} epochs, {one['images']:,} test images.\n"
    )
    return f"{markdown(['trained from scratch', *networks], rows)}\n{note}"


def layout_retrofit(table: pd.DataFrame) -> str:
    """Lay out test errors: what is quantised down, what was done about it across."""
    text = ""
    for network, here in table.groupby("network", sort=False):
        states = [state for state in (RAW, RECALIBRATED, FINE_TUNED) if (here["state"] == state).any()]
        cells = {(row["format"], row["where"], row["state"]): _error(row) for _, row in here.iterrows()}
        places = dict.fromkeys((row["format"], row["where"]) for _, row in here.iterrows())
        rows = [
            [
                f"{fmt}, {where}" if fmt != FLOAT else FLOAT,
                *(cells.get((fmt, where, state), "-") for state in states),
            ]
            for fmt, where in places
        ]
        text += markdown([str(network), *(f"{state}, %" for state in states)], rows) + "\n"
    epochs = table[table["state"] == FINE_TUNED].groupby("format", sort=False)["epochs"].first()
    told = ", ".join(f"{fmt} {count}" for fmt, count in epochs.items())
    return text + (
        "Tables 5 and 6. Test error in % of a trained network retrofitted, and difference to the float one "
        f"± one standard error, paired by image; {table['images'].max():,} test images. Epochs of "
        f"fine-tuning: {told}.\n"
    )


def layout_memory(table: pd.DataFrame) -> str:
    """Lay out shares of the float network's bytes: formats down, networks across."""
    networks = list(table["network"].unique())
    indexed = table.set_index(["format", "network"])

    def cell(fmt: str, network: str) -> str:
        row = indexed.loc[(fmt, network)]
        alone, recomputed = percent(row["share_layers_alone"], 1), percent(row["share_recomputed"], 1)
        return recomputed if alone == recomputed else f"{alone} / {recomputed}"

    rows = [[fmt, *(cell(fmt, network) for network in networks)] for fmt in table["format"].unique()]
    note = (
        "Bytes kept for the backward pass, in % of those with float BatchNorm (16 images of 32 x 32 pixels): "
        "of the layers alone / with what follows from them computed again, and max pooling keeping places.\n"
    )
    return f"{markdown(['kept in training', *networks], rows)}\n{note}"


def draw_figure2(table: pd.DataFrame, path: Path) -> None:
    """Draw the changes in training and test accuracy against the width."""
    with panels(path, 9.0, 3.8, columns=2) as (drawing, (both,)):
        sides = (("training", "train_difference"), ("test", "difference"))
        for panel, (what, column) in zip(both, sides, strict=True):
            panel.axhline(0, color=FLOAT_GREY, linestyle="--", linewidth=1)
            for (_, fmt), rows in table.groupby(["network", "format"], sort=False):
                if fmt != FLOAT:
                    rows = rows.sort_values("width")
                    colour, marker = LOOK[fmt]
                    panel.plot(rows["width"], 100 * rows[column], color=colour, marker=marker, label=fmt)
            panel.set_xscale("log", base=2)
            widths = sorted(table["width"].unique())
            panel.set_xticks(widths, [str(width) for width in widths])
            panel.set_xlabel("width of the two hidden layers")
            panel.set_title(f"{what} accuracy against float BatchNorm")
        both[0].set_ylabel("change, points")
        legend_below(drawing, both[0])


def draw_table3(table: pd.DataFrame, path: Path) -> None:
    """Draw each format's test error, with the standard error of its difference to float."""
    networks = list(table["network"].unique())
    formats = list(table["format"].unique())
    with figure(path, width_in=7.0, height_in=3.6) as (drawing, axes):
        for index, network in enumerate(networks):
            rows = table[table["network"] == network]
            places = [formats.index(fmt) + 0.14 * (index - (len(networks) - 1) / 2) for fmt in rows["format"]]
            markers(axes, places, 1 - rows["top1"], rows["difference_se"], index, label=network)
            floats = 100 * (1 - float(rows.loc[rows["format"] == FLOAT, "top1"].iloc[0]))
            axes.axhline(floats, color=COLOURS[index], linestyle="--", linewidth=0.8)
        axes.set_yscale("log")
        for axis_format in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_format("{x:g}")
        axes.set_xticks(range(len(formats)), [fmt.replace(", ", ",\n") for fmt in formats])
        axes.set_ylabel("test error, %\n(bars: s.e. of the difference to float)")
        drawing.legend(loc="outside lower center", ncols=2)


def draw_retrofit(table: pd.DataFrame, path: Path) -> None:
    """Draw what retrofitting adds to the error, a panel per network."""
    networks = list(table["network"].unique())
    width_in = max(5.5, 4.5 * len(networks))
    with panels(path, width_in, 3.8, columns=len(networks)) as (drawing, (row,)):
        for panel, network in zip(row, networks, strict=True):
            here = table[(table["network"] == network) & (table["format"] != FLOAT)]
            places = list(dict.fromkeys(zip(here["format"], here["where"], strict=True)))
            panel.axhline(0, color=FLOAT_GREY, linestyle="--", linewidth=1, label="float")
            floats = table[(table["network"] == network) & (table["format"] == FLOAT)]
            tuned = -100 * float(floats.loc[floats["state"] == FINE_TUNED, "difference"].iloc[0])
            panel.axhline(tuned, color=COLOURS[2], linestyle=":", label="float, fine-tuned")
            for index, state in enumerate((RAW, RECALIBRATED, FINE_TUNED)):
                rows = here[here["state"] == state]
                spots = [places.index(spot) for spot in zip(rows["format"], rows["where"], strict=True)]
                shifted = np.array(spots) + 0.15 * (index - 1)
                markers(panel, shifted, -rows["difference"], rows["difference_se"], index, label=state)
            panel.set_xticks(
                range(len(places)),
                [f"{fmt}\n{where.replace(' ', chr(10), 1)}" for fmt, where in places],
                fontsize=7,
            )
            panel.set_title(network)
        row[0].set_ylabel("added test error, points (± s.e.)")
        legend_below(drawing, row[0], 3)


def draw_memory(table: pd.DataFrame, path: Path) -> None:
    """Draw the share of the float network's bytes by format."""
    formats = list(table["format"].unique())
    with figure(path, width_in=7.0, height_in=3.6) as (drawing, axes):
        networks = list(table["network"].unique())
        for index, network in enumerate(networks):
            rows = table[table["network"] == network]
            places = np.arange(len(formats)) + 0.2 * (index - (len(networks) - 1) / 2)
            axes.bar(places, 100 * rows["share_recomputed"], 0.18, color=COLOURS[index], label=network)
        axes.set_xticks(range(len(formats)), [f"{fmt}\n{FORMATS[fmt].bits} bits" for fmt in formats])
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("kept for the backward pass,\n% of float BatchNorm's bytes")
        drawing.legend(loc="outside lower center", ncols=2)


RESULTS: dict[str, tuple[Callable[[pd.DataFrame], str], Callable[[pd.DataFrame, Path], None]]] = {
    "figure2": (layout_figure2, draw_figure2),
    "table3": (layout_table3, draw_table3),
    "retrofit": (layout_retrofit, draw_retrofit),
    "memory": (layout_memory, draw_memory),
}
