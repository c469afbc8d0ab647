"""`sysmt trace`: one tile of one layer, every PE in every cycle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sysmt.cli.app import print_table, say
from sysmt.cli.options import ARRAY, CALIBRATION, LAYERS, MACHINE, NETWORK, takes
from sysmt.config import ArrayConfig, parse_count, parse_threads
from sysmt.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from sysmt.study.run_config import RunConfig

__all__ = ["trace"]

_FILES = ("trace.csv", "pes.csv", "trace.vcd", "collisions.png", "utilization.png", "trace.toml")
_WHAT, _RESULTS = "What to trace", "Results"


def _option(panel: str, help: str, **more: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=panel, **more)


@takes(*NETWORK, *CALIBRATION, "calibration", *LAYERS, *ARRAY, *MACHINE)
def trace(
    chosen: dict[str, Any],
    layer: Annotated[
        str | None,
        _option(
            _WHAT, "Layer of the network, by its name in layers.csv.", show_default="none", metavar="NAME"
        ),
    ] = None,
    a: Annotated[
        Path | None,
        _option(
            _WHAT, "Instead: activations (M, K), uint8 or int8.", metavar="FILE.npy", show_default="none"
        ),
    ] = None,
    b: Annotated[
        Path | None,
        _option(_WHAT, "and weights (K, N), int8.", metavar="FILE.npy", show_default="none"),
    ] = None,
    tile: Annotated[
        str, _option(_WHAT, "Row and column of tiles: output pixels, output channels.", metavar="ROW,COL")
    ] = "0,0",
    image: Annotated[int, _option(_WHAT, "Which test image, from 0.")] = 0,
    group: Annotated[int, _option(_WHAT, "Which group of a grouped convolution, from 0.")] = 0,
    threads: Annotated[
        int, typer.Option(help="Threads per PE T: 1, 2 or 4.", rich_help_panel="The array")
    ] = 2,
    out: Annotated[
        Path | None,
        _option(
            _RESULTS,
            "Directory for the results; new or empty.",
            metavar="DIR",
            show_default="results/trace-n",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the results in --out.", rich_help_panel=_RESULTS)
    ] = False,
    cycles: Annotated[
        str | None,
        _option(
            _RESULTS,
            "Cycles that the waveform shows, both included.",
            metavar="FIRST,LAST",
            show_default="all",
        ),
    ] = None,
    vcd: Annotated[bool, _option(_RESULTS, "Write the waveform.")] = True,
    plots: Annotated[bool, _option(_RESULTS, "Draw the plots.")] = True,
) -> None:
    """Trace one tile of a layer through the cycle engine.

    Writes trace.csv (a line per cycle), pes.csv (a line per PE), trace.vcd (a waveform for GTKWave: slot
    register, active threads, collision and reduce flags and accumulator of each PE), collisions.png (a map
    of the array) and utilization.png (over time). docs/reports.md defines every column.
    """
    from sysmt.files import read_csv
    from sysmt.hw.trace import trace_tile
    from sysmt.progress import progress_bar
    from sysmt.study.run_config import RunConfig
    from sysmt.study.run_directory import RunDirectory

    row, col = _pair(tile, "tile")
    shown = None if cycles is None else _pair(cycles, "cycles")
    config = RunConfig.from_record(chosen | {"threads": (parse_threads(threads),)})
    if (layer is None) == (a is None and b is None) or (a is None) != (b is None):
        raise ConfigError("either --layer NAME or both --a FILE.npy and --b FILE.npy are needed")
    directory = RunDirectory(out, name="trace", overwrite=overwrite, stale=_FILES)
    try:
        if layer is not None:
            what = layer
            a_mk, b_kn, array, order = _captured(config, layer, image, group)
        else:
            from sysmt.scalesim.simulate import read_matrix

            assert a is not None
            assert b is not None
            what = f"{a.name} by {b.name}"
            array = config.array().replace(threads=threads)
            a_mk, b_kn, order = read_matrix(a), read_matrix(b), None
        seen = trace_tile(a_mk, b_kn, array, (row, col), order)
        record = {"what": what, "tile": [row, col], **array.to_record(), "cycles": seen.cycles}
        record |= {"M": a_mk.shape[0], "N": b_kn.shape[1], "K": a_mk.shape[1]}
        with directory.file("trace.csv") as temporary, temporary.open("w", encoding="utf-8") as file:
            seen.write_csv(file)
        if vcd:
            with (
                directory.file("trace.vcd") as temporary,
                temporary.open("w", encoding="utf-8") as file,
                progress_bar("waveform", seen.cycles, "cycles") as bar,
            ):
                first, last = shown or (0, None)
                seen.write_vcd(file, first, last, bar.advance)
        from sysmt.study.plots.trace import pe_table, plot_pe_collisions, plot_utilization

        table, pes = read_csv(directory.path / "trace.csv"), pe_table(seen.activity)
        directory.write_csv("pes.csv", pes)
        directory.write_toml("trace.toml", record)
        if plots:
            title = f"{what}, tile {row},{col}, {array.threads}T {array.policy.value}"
            plot_pe_collisions(pes, directory.path / "collisions.png", title)
            plot_utilization(table, array.rows * array.cols, directory.path / "utilization.png", title)
    finally:
        directory.remove_if_empty()
    slots = int(pes["slots"].sum())
    facts = {
        "GEMM": f"{a_mk.shape[0]} x {b_kn.shape[1]} x {a_mk.shape[1]}",
        "cycles": f"{seen.cycles:,}",
        "slots": f"{slots:,}",
        "active slots, %": f"{100 * pes['active_slots'].sum() / slots:.1f}",
        "collisions, %": f"{100 * pes['collisions'].sum() / slots:.1f}",
        "reduced activations": f"{table['reduced_activations'].sum():,}",
        "reduced weights": f"{table['reduced_weights'].sum():,}",
    }
    print_table([f"{what}, tile {row},{col}", ""], [[name, value] for name, value in facts.items()])
    say(f"results are in {directory.path}")


def _pair(text: str, field: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"{field}={text!r} is no pair of numbers from 0, such as 0,3")
    return int(parts[0]), int(parts[1])


def _captured(
    config: RunConfig, layer: str, image: int, group: int
) -> tuple[np.ndarray, np.ndarray, ArrayConfig, np.ndarray | None]:
    """Run one test image through the network, and return the layer's operands as the array sees them."""
    import torch

    from sysmt.study.evaluate import Job

    image = parse_count(image, "image", minimum=0)
    job = Job(config)
    there = job.data.images("test")
    if image >= there:
        raise ConfigError(f"image={image} is not there: {job.data.name} has {there} test images")
    captured = job.sim.capture(layer, 0, group)  # known before the long work, filled after it
    job.calibrate()
    for note in job.notes:
        say(note, "dim")
    job.sim.set_threads({layer: config.threads[0]})
    at = 0
    with torch.no_grad():
        for images, _ in job.data.loader("test", images=image + 1, batch_size=config.batch_size):
            if at <= image < at + len(images):
                job.model(images[image - at :][:1])
            at += len(images)
    if captured.a_mk is None or captured.b_kn is None:
        raise ConfigError(f"layer {layer!r} was not reached by a forward of the network")
    return captured.a_mk, captured.b_kn, captured.config, captured.order
