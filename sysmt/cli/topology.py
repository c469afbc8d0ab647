"""`sysmt topology`: SCALE-Sim's files in, SCALE-Sim's reports out; or a network's topology file."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sysmt.cli.app import print_table, say
from sysmt.cli.options import takes
from sysmt.config import ArrayConfig, Drain, parse_count, parse_threads
from sysmt.errors import ConfigError

if TYPE_CHECKING:
    from sysmt.scalesim.simulate import LayerResult

__all__ = ["topology"]

_FILES, _OPERANDS, _MACHINE, _EXPORT = "SCALE-Sim files", "Operands", "Memory and energy", "Export"
_SMT, _COUNTS = "SMT_REPORT.csv", "action_counts.yaml"


def _option(panel: str, help: str, **more: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=panel, **more)


@takes("policy", "saturate", "rounding")
def topology(
    chosen: dict[str, Any],
    out: Annotated[
        Path | None,
        _option(
            _FILES,
            "Directory for the reports, which go to DIR/<run_name>; with --export the file to write.",
            metavar="DIR",
            show_default="scalesim; with --export stdout",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        _option(_FILES, "SCALE-Sim configuration, v2 or v3.", metavar="FILE.cfg", show_default="none"),
    ] = None,
    topology: Annotated[
        Path | None,
        _option(
            _FILES,
            "SCALE-Sim topology, convolutions or GEMMs.",
            metavar="FILE.csv",
            show_default="none",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace earlier reports.", rich_help_panel=_FILES)
    ] = False,
    threads: Annotated[int, _option("The array", "Threads per PE T: 1, 2 or 4.")] = 1,
    drain: Annotated[
        Drain, _option("The array", "How accumulators leave between tiles; none is SCALE-Sim's.")
    ] = Drain.NONE,
    activation_density: Annotated[
        float, _option(_OPERANDS, "Share of non-zero input pixels, in [0, 1]; half-normal, as after a ReLU.")
    ] = 0.5,
    weight_density: Annotated[
        float, _option(_OPERANDS, "Share of non-zero weights, in [0, 1]; normal. N:M sparsity comes on top.")
    ] = 1.0,
    seed: Annotated[int, _option(_OPERANDS, "Draws the operands.")] = 0,
    operands: Annotated[
        Path | None,
        _option(
            _OPERANDS,
            "Take LAYER.a_mk.npy (M, K; uint8 or int8) and LAYER.b_kn.npy (K, N; int8) from here.",
            metavar="DIR",
            show_default="drawn",
        ),
    ] = None,
    output_bytes: Annotated[int, _option(_MACHINE, "Bytes of an output as written to memory, 1 to 4.")] = 1,
    energy: Annotated[
        str, _option(_MACHINE, "Energy table: 45nm, sysmt-micro2020, sysmt-rtl, or a TOML file of your own.")
    ] = "45nm",
    accelergy: Annotated[
        bool,
        typer.Option("--accelergy", help=f"Also write {_COUNTS} for Accelergy.", rich_help_panel=_MACHINE),
    ] = False,
    cpu_threads: Annotated[
        int | None, _option("This machine", "CPU threads.", show_default="all CPUs")
    ] = None,
    export: Annotated[
        str | None,
        _option(
            _EXPORT,
            "Write this network's topology (names as in sysmt run) instead of simulating one.",
            metavar="MODEL",
            show_default="none",
        ),
    ] = None,
    image_size: Annotated[
        int | None, _option(_EXPORT, "Side of the input, pixels.", show_default="the network's own")
    ] = None,
) -> None:
    """Run a SCALE-Sim topology on the array, or export a network as one.

    Writes SCALE-Sim's COMPUTE_REPORT, BANDWIDTH_REPORT and DETAILED_ACCESS_REPORT, and SMT_REPORT with
    collisions, events, needed bandwidth, energy and area. docs/reports.md defines every column.
    """
    if export is not None:
        if config is not None or topology is not None:
            raise ConfigError("--export writes a topology; it excludes --config and --topology")
        _export(export, image_size, out)
        return
    if config is None or topology is None:
        missing = "--config" if config is None else "--topology"
        raise ConfigError(f"{missing} is missing; --config and --topology are needed (or --export MODEL)")
    if image_size is not None:
        raise ConfigError("--image-size is for --export; a topology has its own sizes")
    import dataclasses
    import os

    from sysmt.cost.energy import accelergy_yaml, load_table
    from sysmt.cost.events import EventCounts
    from sysmt.progress import progress_bar
    from sysmt.scalesim.config_file import read_config
    from sysmt.scalesim.reports import REPORTS, smt_report
    from sysmt.scalesim.simulate import draw_operands, read_operands, simulate_layer
    from sysmt.scalesim.topology_file import read_topology
    from sysmt.study.run_directory import RunDirectory

    machine = read_config(config)
    network = read_topology(topology)
    network.check_values()
    layers = network.layers
    table = load_table(energy)
    memory = dataclasses.replace(machine.memory, output_bytes=output_bytes)
    array = ArrayConfig(machine.rows, machine.cols, parse_threads(threads), drain=drain, **chosen)
    workers = (os.cpu_count() or 1) if cpu_threads is None else parse_count(cpu_threads, "cpu_threads")
    for note in (*machine.notes, *network.notes):
        say(note, "dim")
    where = (out or Path("scalesim")) / machine.run_name
    directory = RunDirectory(where, overwrite=overwrite, stale=(*REPORTS, _SMT, _COUNTS))
    results = []
    try:
        with progress_bar("simulating", len(layers), "layers") as bar:
            for index, layer in enumerate(layers):
                if operands is None:
                    pair = draw_operands(layer, activation_density, weight_density, (seed, index))
                else:
                    pair = read_operands(layer, operands)
                results.append(simulate_layer(layer, pair, array, memory, table, workers))
                bar.advance()
        texts = {name: report(results) for name, report in REPORTS.items()}
        texts[_SMT] = smt_report(results, table.unit)
        if accelergy:
            total = sum((result.events for result in results), EventCounts())
            texts[_COUNTS] = accelergy_yaml(total, array)
        for name, text in texts.items():
            with directory.file(name) as temporary:
                temporary.write_text(text, encoding="utf-8")
    finally:
        directory.remove_if_empty()
    _print_results(results, table.unit)
    say(f"reports are in {directory.path}")


def _export(model: str, image_size: int | None, out: Path | None) -> None:
    from sysmt.nn.array.topology_export import export_named

    exported = export_named(model, image_size)
    for note in exported.notes:
        say(note, "yellow")
    if out is None:
        print(exported.csv, end="")
        return
    from sysmt.files import written_whole

    with written_whole(out) as temporary:
        temporary.write_text(exported.csv, encoding="utf-8")
    say(f"{exported.csv.count(chr(10)) - 1} lines are in {out}")


def _print_results(results: list[LayerResult], unit: str) -> None:
    """Print a row for each layer: depthwise channels, groups and images of a batch are added up."""
    from sysmt.scalesim.topology_file import whole_name

    energy_title = "energy\nuJ" if unit == "pj" else f"energy\n{unit}"
    stalls = results[0].memory.bandwidth is not None
    header = ["layer", "M\n", "N\n", "K\n", "cycles\n", "stall\ncycles", "speedup\n"]
    header += ["speedup without\nstalls"] if stalls else []
    header += ["collisions\n%", "utilization\n%", "DRAM\nbytes", energy_title]
    scale = 1e-6 if unit == "pj" else 1.0

    def row(name: str, sizes: list[str], some: list[LayerResult]) -> list[str]:
        stats = sum((result.stats for result in some[1:]), some[0].stats)
        moved = sum(result.events.dram_reads + result.events.dram_writes for result in some)
        cycles, compute_cycles, stall_cycles = (
            sum(getattr(result.traffic, name) for result in some)
            for name in ("cycles", "compute_cycles", "stall_cycles")
        )
        before = [result.single_thread_traffic for result in some]
        speedups = [sum(traffic.cycles for traffic in before) / cycles]
        if stalls:
            speedups.append(sum(traffic.compute_cycles for traffic in before) / compute_cycles)
        return [
            name,
            *sizes,
            f"{cycles:,}",
            f"{stall_cycles:,}",
            *(f"{speedup:.2f}x" for speedup in speedups),
            f"{100 * stats.collision_rate:.1f}",
            f"{100 * stats.utilization:.1f}",
            f"{moved:,}",
            f"{scale * sum(result.total_energy for result in some):,.4g}",
        ]

    def parts(result: LayerResult) -> tuple[str, int, int, int]:
        layer = result.layer
        return whole_name(layer.name)[0], layer.m, layer.n, layer.k

    rows = []
    for (name, *shape), group in itertools.groupby(results, parts):
        some = list(group)
        many = f"{name} ({len(some)} {whole_name(some[0].layer.name)[1]})".replace(" )", ")")
        title = some[0].layer.name if len(some) == 1 else many
        rows.append(row(title, [f"{size:,}" for size in shape], some))
    print_table(header, [*rows, row("all", ["", "", ""], results)])
