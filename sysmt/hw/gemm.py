"""One GEMM on the array: the entry that checks its input and hands it to one of three engines."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sysmt.config import ArrayConfig, Engine, parse_count, parse_name
from sysmt.errors import ConfigError
from sysmt.hw import cycle, fast, reference
from sysmt.hw.kernels import active_path
from sysmt.hw.operands import apply_order, check_operands, check_order
from sysmt.hw.stats import Counters, GemmStats
from sysmt.hw.timing import gemm_cycles

if TYPE_CHECKING:
    from sysmt.hw.activity import Activity

__all__ = ["GemmResult", "gemm_stats", "simulate_gemm"]

MAX_CPU_THREADS = 1024
"""More make no sense; results never depend on them."""


@dataclasses.dataclass(frozen=True)
class GemmResult:
    """What a simulated GEMM gives.

    Attributes
    ----------
    out_mn : ndarray (M, N), int32
        The accumulators.
    stats : GemmStats
        Collisions, reductions, macs and cycles.
    activity : Activity or None
        Per-cycle and per-PE activity; from the cycle engine alone.
    """

    out_mn: np.ndarray
    stats: GemmStats
    activity: Activity | None = None


def gemm_stats(counters: Counters, m: int, n: int, k: int, config: ArrayConfig, count: int = 1) -> GemmStats:
    """Join the counters of `count` equal-sized M x N x K GEMMs with their work and cycles."""
    cycles, single_thread_cycles = _cycles(m, n, k, config)
    return GemmStats(
        counters.active,
        counters.reduced_activations,
        counters.reduced_weights,
        macs=count * m * n * k,
        cycles=count * cycles,
        single_thread_cycles=count * single_thread_cycles,
    )


@functools.lru_cache(maxsize=4096)
def _cycles(m: int, n: int, k: int, config: ArrayConfig) -> tuple[int, int]:
    """Cycles as configured and at T = 1; looked up, since networks ask for the same few at every forward."""
    return gemm_cycles(m, n, k, config), gemm_cycles(m, n, k, config.replace(threads=1))


def simulate_gemm(
    a_mk: npt.ArrayLike,
    b_kn: npt.ArrayLike,
    config: ArrayConfig | None = None,
    engine: Engine | str = Engine.FAST,
    *,
    order: npt.ArrayLike | None = None,
    cpu_threads: int = 1,
) -> GemmResult:
    """Multiply ``a_mk @ b_kn`` on the simulated array.

    Parameters
    ----------
    a_mk : array (M, K), uint8 or int8
        Activations, unsigned or signed; any strides.
    b_kn : array (K, N), int8
        Weights; any strides.
    config : ArrayConfig, optional
        The array; the default is 16 x 16 PEs of 2 threads, policy S+A.
    engine : {"fast", "cycle", "reference"}
        All give the same integers: kernels with counters from histograms, operands moving through
        the array cycle by cycle, or one PE worked through in Python.
    order : array of int, optional
        Permutation of 0..K-1, or of 0..T*ceil(K/T)-1 where indices >= K are padding, applied to the
        K axis of both operands before it is cut into threads.
    cpu_threads : int
        CPU threads of the fast engine; the result does not depend on it.

    Returns
    -------
    GemmResult

    Raises
    ------
    OperandError
        If dtypes, shapes or `order` do not fit, or K > 65,535.
    ConfigError
        If the engine is unknown or `config` is no `ArrayConfig`.
    PathError
        If SYSMT_PATH names a kernel path that is not available (fast engine).
    """
    config = ArrayConfig() if config is None else config
    if not isinstance(config, ArrayConfig):
        raise ConfigError(f"config has type {type(config).__name__}; an ArrayConfig is needed")
    engine = parse_name(Engine, engine, "engine")
    cpu_threads = min(parse_count(cpu_threads, "cpu_threads"), MAX_CPU_THREADS)
    a, b = check_operands(a_mk, b_kn)
    m, k = a.shape
    n = b.shape[1]
    if order is not None:
        check_order(order, k, config.threads)
    if engine is Engine.FAST:
        active_path()  # an unknown SYSMT_PATH is an error whatever the sizes
    if 0 in (m, n, k):
        return GemmResult(np.zeros((m, n), np.int32), GemmStats((0,) * (config.threads + 1)))
    activity = None
    if engine is Engine.FAST:
        out_mn, counters = fast.simulate(a, b, config, order=order, cpu_threads=cpu_threads)
    else:
        a, b = apply_order(a, b, order, config.threads)
        if engine is Engine.REFERENCE:
            out_mn, counters = reference.simulate(a, b, config)
        else:
            out_mn, counters, activity = cycle.simulate(a, b, config)
    return GemmResult(out_mn, gemm_stats(counters, m, n, k, config), activity)
