"""Does BatchNorm win back the SQNR that 8-bit convolutions lose?  Q format and squeezed threads together.

The article "Batch Normalization: A different perspective from Quantized Inference Model" quantises the
first convolution and BatchNorm of ResNet-50 and finds 25.58 dB at the input, -4.4 dB after the
convolution and 20.98 dB after BatchNorm. Here every convolution runs in Q format on the array, at one, two
and four threads and with formats of 8, 6 and 4 bits, and three ratios are told apart: of all values, of
each channel around its means (which a factor and an offset per channel cannot change), and of the
channels' means alone (the curves of the article's figures). BatchNorm's statistics are the float
network's, or regathered under the noise. The article's shifts round down; "rounded" runs round to nearest.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from common.command import OPTIONS, Out, Preset, Quick, main, numbers_in
from common.ledgers import open_ledger
from common.networks import Workload, workloads
from common.panels import legend_below, panels
from common.points import Key, compared, grid, measure_float, recalibrated, still_missing, those_of
from common.tables import give_or_take, markdown, percent, publish, signed
from matplotlib.axes import Axes

from sysmt.cli.options import takes
from sysmt.errors import ConfigError
from sysmt.files import read_csv
from sysmt.nn.low_bit.integer_network import QNetwork
from sysmt.progress import Bar, progress_bar
from sysmt.quant.error import sqnr_db
from sysmt.study.evaluate import paired_difference
from sysmt.study.ledger import Ledger
from sysmt.study.plots.style import COLOURS, FLOAT_GREY, MARKERS
from sysmt.study.workload import OpenWorkload

KEYS = ("network", "bits", "threads", "run")
FLOAT, PLAIN, RECALIBRATED, ISOLATED, ROUNDED = (
    "float",
    "as calibrated",
    "recalibrated",
    "isolated",
    "rounded",
)
BITS = (8, 6, 4)
THREADS = (1, 2, 4)
SHARED = ("resnet20",)
MODE = "cumulative"
COMPARED_IMAGES = 256
"""Test images (at most) that are compared value by value; accuracy is that of all of them."""

STAGES = {"input": "input", "conv": "convolution", "bn, exact": "BatchNorm in float", "bn": "BatchNorm"}
RATIOS = {
    "sqnr_db": "all values",
    "channel_sqnr_db": "around channel means",
    "curve_sqnr_db": "channel means",
}
ARTICLE = {"input": 25.58, "conv": -4.4, "bn": 20.98}
"""What the article measured, dB."""


@takes(*OPTIONS)
def sqnr(
    chosen: dict[str, Any],
    preset: Preset = None,
    bits: Annotated[
        str | None, typer.Option(help="Bits of the formats, 2 to 8.", metavar="LIST", show_default="8,6,4")
    ] = None,
    quick: Quick = False,
    out: Out = None,
) -> None:
    """Measure SQNR through input, convolution and BatchNorm of every layer, at 1T, 2T and 4T."""
    networks = workloads(chosen, preset, quick, SHARED)
    widths = _parse(bits) if bits else BITS[:1] if quick else BITS
    with open_ledger("sqnr", networks, KEYS, out, preset, quick, mode=MODE) as ledger:
        points = [point for network in networks for point in points_of(network.name, widths)]
        with progress_bar("sqnr", len(points), "points") as bar:
            for network in networks:
                measure(network, widths, ledger, bar)
        pairs = pd.concat([pairs_of(ledger, points, network.name) for network in networks], ignore_index=True)
        ledger.write("sqnr.csv", pairs)
        layout = functools.partial(layout_of, ledger=ledger, points=points)
        plot = functools.partial(draw, ledger=ledger, bits=widths[0])
        publish(ledger, "sqnr", networks, pairs, layout, plot)


def _parse(text: str) -> tuple[int, ...]:
    widths = tuple(sorted(set(numbers_in(text, "bits", int, "8,6,4")), reverse=True))
    if not 2 <= widths[-1] <= widths[0] <= 8:
        raise ConfigError(f"bits={text!r} must lie in 2 .. 8, what the array's operands hold")
    return widths


def points_of(network: str, widths: Sequence[int]) -> list[Key]:
    """Return the keys of all points of one network, the float network first."""
    runs = (PLAIN, RECALIBRATED, ISOLATED, ROUNDED)
    return grid(KEYS, [network], [0], [0], [FLOAT]) + grid(KEYS, [network], widths, THREADS, runs)


# -- the measurements --------------------------------------------------------------------------


def measure(network: Workload, widths: Sequence[int], ledger: Ledger, bar: Bar) -> None:
    """Measure what is missing of one network."""
    points = points_of(network.name, widths)
    missing = still_missing(points, ledger, bar)
    if not missing:
        return
    subject = network.open(ledger)
    measure_float(missing, subject, ledger, bar)
    reference = ledger.correct(**points[0])
    array = network.config.array().replace(threads=1)
    for width, rounding in itertools.product(widths, ("floor", "nearest")):
        runs = (ROUNDED,) if rounding == "nearest" else (PLAIN, RECALIBRATED, ISOLATED)
        here = [point for point in missing if point["bits"] == width and point["run"] in runs]
        if not here:
            continue
        with QNetwork(subject.model, array, bits=width, rounding=rounding) as q:
            loader = subject.training_images(network.config.calibration_images, network.config.seed)
            q.calibrate(loader, loader.images)
            for point in here:
                q.set_threads(point["threads"])
                _measure_point(point, q, subject, network, reference, ledger)
                bar.advance(1, f"{width} bits {point['threads']}T {point['run']}")


def _measure_point(
    point: Key,
    q: QNetwork,
    subject: OpenWorkload,
    network: Workload,
    reference: np.ndarray,
    ledger: Ledger,
) -> None:
    config = network.config
    images = min(COMPARED_IMAGES, config.images or COMPARED_IMAGES)
    test = subject.data.loader("test", images=min(images, subject.data.images("test")), batch_size=32)
    what = f"{point['bits']} bits {point['threads']}T"
    if point["run"] == ISOLATED:
        stages = q.compare(test, isolated=True)
        ledger.add(point, tables=_tables(q, stages))
        return
    again = point["run"] == RECALIBRATED
    with recalibrated(again, subject, MODE, config.recalibration_images, config.seed):
        stages, evaluation = q.compare(test), subject.evaluate(what)
    values = evaluation.to_record() | compared(evaluation.correct, reference)
    ledger.add(point | values, evaluation.correct, _tables(q, stages))


def _tables(q: QNetwork, stages: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the stages, and the channel means of all of them."""
    channels = []
    curve = []
    for layer, stage in stages[["layer", "stage"]].itertuples(index=False):
        means = q.channels(layer, stage)
        channels.append(means.assign(layer=layer, stage=stage))
        curve.append(sqnr_db(means["float"], means["quantized"]))
    tables = {"stages": stages.assign(curve_sqnr_db=curve)}
    return tables | {"channels": pd.concat(channels, ignore_index=True)}


# -- the results -------------------------------------------------------------------------------


def _table(ledger: Ledger, name: str) -> pd.DataFrame:
    return read_csv(ledger.path / f"{name}.csv")


def pairs_of(ledger: Ledger, points: Sequence[Key], network: str) -> pd.DataFrame:
    """Join each BatchNorm with the convolution it follows.

    Returns
    -------
    DataFrame
        A row per point, pair and ratio (one of `RATIOS`): ``input, conv, bn, bn, exact``, dB; the gains
        ``won`` = bn - conv and ``won_exact``; ``mean_error_conv`` and ``mean_error_bn`` in steps of their
        formats; ``collision_rate``; ``first``, whether it is the network's first pair.
    """
    stages = those_of(points, _table(ledger, "stages"))
    stages = stages[stages["network"] == network]
    rows = []
    for key, here in stages.groupby(list(KEYS), sort=False):
        by_stage = here.set_index(["layer", "stage"])
        followers = here[(here["stage"] == "bn") & here["follows"].notna()]
        for number, (layer, conv) in enumerate(followers[["layer", "follows"]].itertuples(index=False)):
            places = {"input": conv, "conv": conv, "bn": layer, "bn, exact": layer}
            for column, ratio in RATIOS.items():
                db = {stage: by_stage.loc[(where, stage), column] for stage, where in places.items()}
                errors = {
                    f"mean_error_{stage}": by_stage.loc[(places[stage], stage), "mean_error"]
                    / by_stage.loc[(places[stage], stage), "step"]
                    for stage in ("conv", "bn")
                }
                rows.append(
                    {
                        **dict(zip(KEYS, key, strict=True)),
                        "layer": layer,
                        "follows": conv,
                        "first": number == 0,
                        "ratio": ratio,
                        **db,
                        "won": db["bn"] - db["conv"],
                        "won_exact": db["bn, exact"] - db["conv"],
                        **errors,
                        "collision_rate": by_stage.loc[(conv, "conv"), "collision_rate"],
                    }
                )
    return pd.DataFrame(rows)


def layout_of(pairs: pd.DataFrame, network: str, ledger: Ledger, points: Sequence[Key]) -> str:
    """Lay out one network's results: the first pair by stages, all pairs by what BatchNorm won, accuracy."""
    here = pairs[pairs["network"] == network]
    measured = those_of(points, ledger.points()).set_index(list(KEYS))
    runs = list(dict.fromkeys(zip(here["bits"], here["threads"], strict=True)))

    first = here[here["first"] & here["run"].isin([PLAIN, RECALIBRATED])]
    cells = first.set_index(["bits", "threads", "run", "ratio"])
    header = [f"{network}: first pair, dB", *(f"{STAGES[stage]}" for stage in ("input", "conv", "bn"))]
    header += ["recalibrated", *(f"{ratio}: conv → BN" for ratio in list(RATIOS.values())[1:])]
    rows = []
    for bits, threads in runs:
        total = cells.loc[(bits, threads, PLAIN, RATIOS["sqnr_db"])]
        row = [f"{bits} bits, {threads}T", *(f"{total[stage]:.1f}" for stage in ("input", "conv", "bn"))]
        row.append(f"{cells.loc[(bits, threads, RECALIBRATED, RATIOS['sqnr_db']), 'bn']:.1f}")
        for ratio in list(RATIOS.values())[1:]:
            one = cells.loc[(bits, threads, PLAIN, ratio)]
            row.append(f"{one['conv']:.1f} → {one['bn']:.1f}")
        rows.append(row)
    stages = markdown(header, rows)

    header = [f"{network}: all pairs, dB won by BatchNorm", *RATIOS.values(), "all values, exact BatchNorm"]
    header += ["all values, recalibrated", "top-1, %", "recalibrated, %", "won back, points", "rounded, %"]
    rows = []
    for bits, threads in runs:
        row = [f"{bits} bits, {threads}T"]
        mine = here[(here["bits"] == bits) & (here["threads"] == threads)]
        isolated = mine[mine["run"] == ISOLATED]
        row += [_spread(isolated.loc[isolated["ratio"] == ratio, "won"]) for ratio in RATIOS.values()]
        total = mine[mine["ratio"] == RATIOS["sqnr_db"]]
        row.append(_spread(total.loc[total["run"] == ISOLATED, "won_exact"]))
        row.append(_spread(total.loc[total["run"] == RECALIBRATED, "won"]))
        keys = [(network, bits, threads, run) for run in (PLAIN, RECALIBRATED)]
        row += [f"{percent(measured.loc[key, 'top1'])}" for key in keys]
        plain, again = (ledger.correct(**dict(zip(KEYS, key, strict=True))) for key in keys)
        gain, error = paired_difference(again, plain)
        row.append(give_or_take(signed(gain), error))
        row.append(percent(measured.loc[(network, bits, threads, ROUNDED), "top1"]))
        rows.append(row)
    whole = markdown(header, rows)
    reference = measured.loc[(network, 0, 0, FLOAT)]
    note = (
        f"Float {percent(reference['top1'])} %, {int(reference['images']):,} test images; at most "
        f"{COMPARED_IMAGES} of them are compared value by value. The article: "
        f"{' → '.join(f'{value:g}' for value in ARTICLE.values())} dB. All pairs: mean ± standard deviation "
        "over the pairs, each convolution given the float network's input; recalibrated: in the running "
        "network. Exact: BatchNorm in float, of the quantised convolution. Around channel means: median over "
        "channels. Won back: by recalibration, ± one standard error, paired by image. Rounded: shifts round "
        "to nearest, not down; not recalibrated.\n"
    )
    return f"{stages}\n{whole}\n{note}"


def _spread(values: pd.Series) -> str:
    return f"{values.mean():+.1f} ± {values.std(ddof=0):.1f}"


def draw(pairs: pd.DataFrame, path: Path, title: str, ledger: Ledger, bits: int) -> None:
    """Draw the article's figures for the first pair, and what BatchNorm wins at every pair."""
    channels = _table(ledger, "channels")
    here = channels[
        (channels["network"] == pairs["network"].iloc[0])
        & (channels["bits"] == bits)
        & (channels["run"] == PLAIN)
    ]
    first = pairs[pairs["first"] & (pairs["bits"] == bits) & (pairs["run"] == PLAIN)]
    conv, bn = first[["follows", "layer"]].iloc[0]
    with panels(path, 11.5, 6.0, rows=2, columns=3, height_ratios=[3, 2]) as (drawing, (above, below)):
        for column, (layer, stage) in enumerate(((conv, "conv"), (bn, "bn"))):
            curves = here[(here["layer"] == layer) & (here["stage"] == stage)]
            _curves(above[column], below[column], curves)
            above[column].set_title(f"{title}: {layer}, {bits} bits" if not column else layer)
        above[0].set_ylabel("mean of each channel")
        below[0].set_ylabel("quantised minus float")
        _through_the_stages(above[2], first)
        _won(below[2], pairs, bits)
        legend_below(drawing, above[0], 4, "outside lower left")


def _curves(above: Axes, below: Axes, curves: pd.DataFrame) -> None:
    """Draw float against quantised channel means, and their differences with their mean."""
    float_ = curves[curves["threads"] == 1]
    above.plot(float_["channel"], float_["float"], color=FLOAT_GREY, linewidth=2.4, label="float")
    for index, threads in enumerate(THREADS):
        rows = curves[curves["threads"] == threads]
        # Where threads coincide, the larger marker below shows around the smaller.
        style = {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 6.5 - 2 * index}
        style["linewidth"] = 0.9
        above.plot(rows["channel"], rows["quantized"], label=f"{threads}T", **style)
        below.plot(rows["channel"], rows["difference"], **style)
        below.axhline(rows["difference"].mean(), color=COLOURS[index], linestyle="--", linewidth=0.8)
    for axes in (above, below):
        axes.xaxis.get_major_locator().set_params(integer=True)
    below.set_xlabel("channel (dashed: mean over channels)")


def _through_the_stages(axes: Axes, first: pd.DataFrame) -> None:
    """Draw SQNR at input, convolution and BatchNorm: all values, and around the channels' means."""
    names = ("input", "conv", "bn")
    lines = dict(zip(RATIOS.values(), ("-", ":", "--"), strict=True))
    for index, threads in enumerate(THREADS):
        for ratio, line in lines.items():
            row = first[(first["threads"] == threads) & (first["ratio"] == ratio)].iloc[0]
            axes.plot(
                range(3), [row[name] for name in names], color=COLOURS[index], marker=MARKERS[index],
                linestyle=line, label=ratio if not index else None,
            )  # fmt: skip
    axes.plot(range(3), list(ARTICLE.values()), color=FLOAT_GREY, marker="x", linestyle="-.", label="article")
    axes.set_xticks(range(3), [STAGES[name] for name in names])
    axes.set_ylabel("SQNR, dB")
    axes.set_title("first pair")
    axes.legend(fontsize=7, handlelength=4)


def _won(axes: Axes, pairs: pd.DataFrame, bits: int) -> None:
    """Draw BatchNorm's gain at every pair: in Q format, and the exact one."""
    rows = pairs[(pairs["bits"] == bits) & (pairs["run"] == ISOLATED)]
    rows = rows[rows["ratio"] == RATIOS["sqnr_db"]]
    axes.axhline(0, color=FLOAT_GREY, linewidth=1)
    for index, threads in enumerate(THREADS):
        here = rows[rows["threads"] == threads]
        places = np.arange(len(here)) + 0.15 * (index - 1)
        style = {"color": COLOURS[index], "marker": MARKERS[index], "linestyle": "none", "markersize": 4}
        axes.plot(places, here["won"], **style)
        axes.plot(places, here["won_exact"], markerfacecolor="white", **style)
    axes.set_xlabel("pair (white: BatchNorm in float)")
    axes.set_ylabel("won by BatchNorm, dB")


if __name__ == "__main__":
    main(sqnr)
