"""`sysmt gemm`: one matrix product on the array."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sysmt.cli.app import print_table, say
from sysmt.cli.options import ARRAY, takes
from sysmt.config import ArrayConfig, Engine, parse_threads

if TYPE_CHECKING:
    from sysmt.hw.stats import GemmStats

__all__ = ["gemm"]

_OPERANDS, _RESULTS = "Operands", "Results"


def _operand(help: str, **more: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=_OPERANDS, **more)


@takes(*ARRAY)
def gemm(
    chosen: dict[str, Any],
    threads: Annotated[
        int, typer.Option(help="Threads per PE T: 1, 2 or 4.", rich_help_panel="The array")
    ] = 2,
    engine: Annotated[
        Engine,
        typer.Option(
            help="fast, cycle by cycle, or the reference; all give the same.", rich_help_panel="The array"
        ),
    ] = Engine.FAST,
    m: Annotated[int, _operand("Rows M of the activations.")] = 256,
    n: Annotated[int, _operand("Columns N of the weights.")] = 64,
    k: Annotated[int, _operand("Inner dimension K, at most 65,535.")] = 576,
    activation_density: Annotated[
        float, _operand("Share of non-zero activations, in [0, 1]; half-normal, as after a ReLU.")
    ] = 0.5,
    weight_density: Annotated[float, _operand("Share of non-zero weights, in [0, 1]; normal.")] = 1.0,
    seed: Annotated[int, _operand("Draws the operands.")] = 0,
    a: Annotated[
        Path | None,
        _operand("Activations instead: (M, K) uint8 or int8.", metavar="FILE.npy", show_default="random"),
    ] = None,
    b: Annotated[
        Path | None, _operand("Weights instead: (K, N) int8.", metavar="FILE.npy", show_default="random")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write gemm.csv, gemm.json and the int32 product.npy into this new or empty directory.",
            rich_help_panel=_RESULTS,
            metavar="DIR",
            show_default="nothing is written",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the results in --out.", rich_help_panel=_RESULTS)
    ] = False,
) -> None:
    """Multiply two matrices on the array: counters, cycles and tiles.

    The operands are random, or come from .npy files; sizes are then those of the files.
    """
    import numpy as np

    from sysmt.hw.gemm import simulate_gemm
    from sysmt.hw.timing import slot_count, tile_count
    from sysmt.scalesim.simulate import draw_matrices, read_matrix

    config = ArrayConfig(threads=parse_threads(threads), **chosen)
    directory = None
    if out is not None:
        from sysmt.study.run_directory import RunDirectory

        directory = RunDirectory(out, overwrite=overwrite, stale=("gemm.csv", "gemm.json", "product.npy"))
    try:
        a_mk = read_matrix(a) if a is not None else None
        b_kn = read_matrix(b) if b is not None else None
        if a_mk is not None:
            m, k = a_mk.shape
        if b_kn is not None:
            n, k = b_kn.shape[1], b_kn.shape[0] if a_mk is None else k
        drawn = draw_matrices(m, n, k, activation_density, weight_density, seed)
        a_mk, b_kn = drawn[0] if a_mk is None else a_mk, drawn[1] if b_kn is None else b_kn
        result = simulate_gemm(a_mk, b_kn, config, engine)
        record = {
            "M": m,
            "N": n,
            "K": k,
            **config.to_record(),
            "engine": engine.value,
            "tiles": tile_count(m, n, config),
            "slots_per_output": slot_count(k, config.threads),
            **result.stats.to_record(),
            **_energy(result.stats, config, m, n, k),
        }
        print_table(["quantity", "value"], [[name, _shown(value)] for name, value in record.items()])
        if directory is not None:
            import pandas as pd

            directory.write_csv("gemm.csv", pd.DataFrame([record]))
            directory.write_json("gemm.json", record)
            with directory.file("product.npy") as temporary:
                np.save(temporary, result.out_mn)
            say(f"results are in {directory.path}")
    finally:
        if directory is not None:
            directory.remove_if_empty()


def _energy(stats: GemmStats, config: ArrayConfig, m: int, n: int, k: int) -> dict[str, float]:
    """Price the GEMM by the 45 nm table, with the memories' defaults."""
    from sysmt.cost.energy import load_table
    from sysmt.cost.events import count_events
    from sysmt.cost.layer_shape import Layer
    from sysmt.cost.memory import Memory

    if not stats.macs:
        return {"energy_pj": 0.0, "energy_delay_pj_cycles": 0.0}
    memory = Memory()
    events = count_events(stats, {Layer.gemm("gemm", m, n, k): 1}, config, memory)
    energy_pj = sum(load_table().energy(events, config, memory).values())
    return {"energy_pj": energy_pj, "energy_delay_pj_cycles": energy_pj * events.cycles}


def _shown(value: Any) -> str:
    if isinstance(value, bool | str):
        return str(value).lower() if isinstance(value, bool) else value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
