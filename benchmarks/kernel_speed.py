"""Benchmarks of the kernels alone: GEMMs against torch._int_mm, what counting costs, cost against size."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from turns import take_turns

from sysmt.config import ArrayConfig, Policy
from sysmt.hw.kernels import PackedConv, PackedGemm, available_paths

Row = dict[str, Any]

GEMMS = ((3136, 64, 576), (784, 128, 1152), (196, 256, 2304), (49, 512, 4608))
"""(M, N, K) of ResNet-18's four stages, one image."""

TARGETS = {(1, 0.02): 0.9, (2, 0.02): 0.5, (2, 0.4): 0.5, (4, 0.02): 0.35, (4, 0.4): 0.2}
"""Speed relative to torch._int_mm, by (threads, share of zero weights)."""


def draw_operands(m: int, n: int, k: int, zeros: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw half-normal activations, half of them zero, and normal weights of which a share is zero."""
    rng = np.random.default_rng(0)
    a = np.clip(rng.normal(0, 60, (m, k)), 0, 255).astype(np.uint8)
    b = np.clip(np.rint(rng.normal(0, 36, (k, n))), -127, 127).astype(np.int8)
    b[b == 0] = 1
    b[rng.random(b.shape) < zeros] = 0
    return a, b


def gemm_rows() -> Iterator[Row]:
    """Compare GEMMs with operands packed beforehand, one CPU thread, to torch._int_mm as it is called.

    "Packed beforehand" counts the products and the storing of outputs; the whole call, packing
    included, is in the rows as well.
    """
    torch.set_num_threads(1)
    for m, n, k in GEMMS:
        gmacs = m * n * k / 1e9
        for threads, zeros in TARGETS:
            for policy in (Policy.SA, Policy.SAW) if threads > 1 else (Policy.SA,):
                a, b = draw_operands(m, n, k, zeros)
                gemm = PackedGemm(b, ArrayConfig(threads=threads, policy=policy))
                parts: list[dict[str, float]] = []
                a_torch, b_torch = torch.from_numpy(a.view(np.int8)), torch.from_numpy(b)
                seconds = take_turns(
                    {
                        "int_mm": partial(torch._int_mm, a_torch, b_torch),
                        "float": partial(torch.matmul, a_torch.float(), b_torch.float()),
                        "ours": lambda g=gemm, x=a, to=parts: to.append(g.profile(x, count=False)),
                    },
                    rounds=9,
                )
                multiply, store, pack, stage = (
                    float(np.median([part[name] for part in parts]))
                    for name in ("multiply", "store", "pack", "stage")
                )
                packed = multiply + store
                yield {
                    "part": "gemm",
                    "name": f"{m} x {n} x {k}",
                    "threads": threads,
                    "policy": policy.value,
                    "zeros": zeros,
                    "seconds": packed,
                    "ratio": seconds["int_mm"] / packed,
                    "target": TARGETS[threads, zeros],
                    "gmacs_per_second": gmacs / packed,
                    "pack_seconds": pack + stage,
                    "whole_call_ratio": seconds["int_mm"] / seconds["ours"],
                    "int_mm_gmacs_per_second": gmacs / seconds["int_mm"],
                    "float_gmacs_per_second": gmacs / seconds["float"],
                }


def counting_rows() -> Iterator[Row]:
    """What the counters cost: whole layers with and without them, one CPU thread."""
    rng = np.random.default_rng(0)
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        x = np.maximum(rng.normal(0, 60, (8, channels, size, size)), 0).astype(np.float32)
        weight = draw_operands(1, channels, 9 * channels, 0.02)[1].T.reshape(channels, channels, 3, 3)
        scale = np.ones(channels, np.float32)
        for threads in (1, 2, 4):
            conv = PackedConv(
                np.ascontiguousarray(weight), ArrayConfig(threads=threads), padding=((1, 1), (1, 1))
            )
            out = np.empty(conv.output_shape(x.shape), np.float32)
            forward = partial(conv.forward, x, 1.0, scale, out=out)
            seconds = take_turns(
                {"counted": partial(forward, count=True), "plain": partial(forward, count=False)}
            )
            yield {
                "part": "counters",
                "name": f"{channels} channels, {size} x {size}",
                "threads": threads,
                "seconds": seconds["counted"],
                "ratio": seconds["counted"] / seconds["plain"] - 1,
                "target": 0.05,
            }


SIZES = {"m": 1024, "n": 128, "k": 1152, "images": 8}
"""The GEMM, and the batch of 64-channel 28 x 28 images, of which one size at a time is varied."""

MULTIPLES = (0.125, 0.25, 0.5, 1, 2, 4)


def scaling_rows() -> Iterator[Row]:
    """Time against M, per path and thread count, and on the best path against N, K and images: all linear."""
    for path in available_paths():
        sizes = [int(multiple * SIZES["m"]) for multiple in MULTIPLES] if path != "scalar" else [16, 32, 64]
        a, b = draw_operands(max(sizes), SIZES["n"], SIZES["k"], 0.02)
        for threads in (1, 2, 4):
            gemm = PackedGemm(b, ArrayConfig(threads=threads), path=path)
            runs = {m: partial(gemm.run, a[:m], count=False) for m in sizes}
            yield from _scaling("m", path, threads, runs, SIZES["n"] * SIZES["k"])
    for axis in ("n", "k", "images"):
        sizes = [max(1, int(multiple * SIZES[axis])) for multiple in MULTIPLES]
        for threads in (1, 2, 4):
            make = _forward_of_images if axis == "images" else partial(_gemm_of_size, axis)
            per_size = (
                64 * 64 * 9 * 28 * 28 if axis == "images" else SIZES["m"] * SIZES["k" if axis == "n" else "n"]
            )
            runs = {size: make(size, threads) for size in sizes}
            yield from _scaling(axis, available_paths()[0], threads, runs, per_size)


def _gemm_of_size(axis: str, size: int, threads: int) -> partial[Any]:
    m, n, k = ({**SIZES, axis: size}[name] for name in ("m", "n", "k"))
    a, b = draw_operands(m, n, k, 0.02)
    return partial(PackedGemm(b, ArrayConfig(threads=threads)).run, a, count=False)


def _forward_of_images(images: int, threads: int) -> partial[Any]:
    weight = draw_operands(1, 64, 576, 0.02)[1].T.reshape(64, 64, 3, 3)
    conv = PackedConv(np.ascontiguousarray(weight), ArrayConfig(threads=threads), padding=((1, 1), (1, 1)))
    x = np.maximum(np.random.default_rng(0).normal(0, 60, (images, 64, 28, 28)), 0).astype(np.float32)
    return partial(conv.forward, x, 1.0, np.ones(64, np.float32), out=np.empty_like(x))


def _scaling(
    axis: str, path: str, threads: int, runs: dict[int, partial[Any]], macs_per_size: int
) -> Iterator[Row]:
    seconds = take_turns({str(size): run for size, run in runs.items()}, rounds=5)
    for size in runs:
        yield {
            "part": "scaling",
            "name": path,
            "threads": threads,
            "axis": axis,
            "size": size,
            "seconds": seconds[str(size)],
            "gmacs_per_second": size * macs_per_size / 1e9 / seconds[str(size)],
        }
