"""Benchmarks of the kernels alone: GEMMs against torch._int_mm, what counting costs, cost against size."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from bench_clock import take_turns

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


def scaling_rows() -> Iterator[Row]:
    """Time against M, per path and thread count: the cost is linear."""
    for path in available_paths():
        sizes = (64, 128, 256, 512, 1024, 2048, 4096) if path != "scalar" else (16, 32, 64)
        a, b = draw_operands(max(sizes), 128, 1152, 0.02)
        for threads in (1, 2, 4):
            gemm = PackedGemm(b, ArrayConfig(threads=threads), path=path)
            seconds = take_turns({str(m): partial(gemm.run, a[:m], count=False) for m in sizes}, rounds=5)
            for m in sizes:
                yield {
                    "part": "scaling",
                    "name": path,
                    "threads": threads,
                    "m": m,
                    "seconds": seconds[str(m)],
                    "gmacs_per_second": m * 128 * 1152 / 1e9 / seconds[str(m)],
                }
