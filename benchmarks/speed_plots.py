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
    by_m = rows[(rows["part"] == "scaling") & (rows["axis"] == "m")]
    peak = by_m.groupby(["name", "threads"], sort=False)["gmacs_per_second"].max()
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


LABELS = {
    "m": "M, rows (N = 128, K = 1152)",
    "n": "N, output channels (M = 1024, K = 1152)",
    "k": "K (M = 1024, N = 128)",
    "images": "images (64 channels, 28 x 28, 3 x 3)",
}


def draw_scaling(rows: pd.DataFrame, machine: str, path: Path) -> None:
    """Draw time against M (every path, logarithmic), N, K and images: straight lines mean linear cost."""
    figure, panels = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axes, (axis, label) in zip(panels.flat, LABELS.items(), strict=True):
        here = rows[rows["axis"] == axis]
        for (name, threads), group in here.groupby(["name", "threads"], sort=False):
            axes.plot(group["size"], 1e3 * group["seconds"], marker="o", label=f"{name} {threads}T")
        if axis == "m":
            axes.set(xscale="log", yscale="log")
        else:
            axes.set(xlim=(0, None), ylim=(0, None))
        axes.set(xlabel=label, ylabel="ms")
        axes.legend(fontsize=6)
    figure.suptitle(machine, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
