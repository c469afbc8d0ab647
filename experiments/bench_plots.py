"""Plots of the benchmarks: achieved GMAC/s, and time against size."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd

mpl.use("Agg")


def draw_roofline(rows: pd.DataFrame, machine: str, path: Path) -> None:
    """Draw GMAC/s of every path and thread count beside torch's two ways to multiply."""
    gemm = rows[rows["part"] == "gemm"]
    peak = rows[rows["part"] == "scaling"].groupby(["name", "threads"], sort=False)["gmacs_per_second"].max()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    labels = [f"{name}\n{threads}T" for name, threads in peak.index]
    axes.bar(
        labels,
        peak.to_numpy(),
        color=[
            f"C{list(dict.fromkeys(peak.index.get_level_values(0))).index(name)}" for name, _ in peak.index
        ],
    )
    for column, style, label in (
        ("int_mm_gmacs_per_second", "--", "torch._int_mm"),
        ("float_gmacs_per_second", ":", "torch float32 matmul"),
    ):
        axes.axhline(gemm[column].max(), linestyle=style, color="black", label=label)
    axes.set(yscale="log", ylabel="GMAC/s, one core, packing included", title=machine)
    axes.title.set_fontsize(8)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_scaling(rows: pd.DataFrame, machine: str, path: Path) -> None:
    """Draw time against M on logarithmic axes: straight lines of slope 1 mean linear cost."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (name, threads), group in rows.groupby(["name", "threads"], sort=False):
        axes.plot(group["m"], 1e3 * group["seconds"], marker="o", label=f"{name} {threads}T")
    axes.set(xscale="log", yscale="log", xlabel="M, rows (N = 128, K = 1152)", ylabel="ms", title=machine)
    axes.title.set_fontsize(8)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)
