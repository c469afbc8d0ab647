"""What the wires of a synthesised PE do: proof that the gates compute the slot, and an estimate of energy.

The estimate is relative and rough: every change of a wire costs the area of the gate that drives it, every
register pays for its clock in every cycle. No delays, hence no glitches, and no wires between PEs.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from netlist import GATE_EQUIVALENTS, REGISTER, Netlist
from twin import Kind, slot_values

from sysmt.hw.operands import split_threads

__all__ = [
    "PAPER_ENERGY_RATIO",
    "Operands",
    "energy_ge",
    "load_operands",
    "synthetic_operands",
    "wrong_slots",
]

PAPER_ENERGY_RATIO = {1: 1.0, 2: 0.67, 4: 0.61}
"""Energies over a conventional array's for the same network: abstract of the NB-SMT paper (2004.09309)."""

CLOCK_GE = 1.0
"""What one clock edge costs a register, in the unit of `energy_ge`: about one inverter pair."""

SAMPLED_OUTPUTS = 64


class Operands(NamedTuple):
    """Operands of one layer: activations (M, K) uint8 and weights (K, N) int8."""

    a: np.ndarray
    b: np.ndarray


def synthetic_operands(seed: int) -> Operands:
    """Stand-in for a layer after ReLU: half the activations zero, the rest and the weights bell-shaped."""
    rng = np.random.default_rng(seed)
    a = np.abs(rng.normal(0, 60, (64, 576))) * (rng.random((64, 576)) < 0.5)
    b = rng.normal(0, 32, (576, 64))
    return Operands(np.rint(a).clip(0, 255).astype(np.uint8), np.rint(b).clip(-127, 127).astype(np.int8))


def load_operands(path: Path) -> Operands:
    """Read a layer's operands from an .npz: a_mk (M, K) uint8, b_kn (K, N) int8 and, if given, order.

    The names are those of what the simulator captures of a layer.
    """
    with np.load(path) as stored:
        a, b = stored["a_mk"], stored["b_kn"]
        order = stored["order"] if "order" in stored and stored["order"].ndim else None
    if a.dtype != np.uint8 or b.dtype != np.int8 or a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"{path}: a_mk is {a.dtype} {a.shape}, b_kn {b.dtype} {b.shape}; "
            f"uint8 (M, K) and int8 (K, N) are needed"
        )
    if order is not None and (order.size != a.shape[1] or order.max() >= a.shape[1]):
        raise ValueError(
            f"{path}: order has {order.size} elements; only a permutation of K={a.shape[1]} can be used here"
        )
    return Operands(a, b) if order is None else Operands(a[:, order], b[order])


def bits_of(port: Iterable[object], values: np.ndarray) -> dict[object, int]:
    """Spread values over the wires of a port: per wire an integer whose bit t is cycle t."""
    return {
        wire: int.from_bytes(
            np.packbits((values >> position & 1).astype(np.uint8), bitorder="little").tobytes(), "little"
        )
        for position, wire in enumerate(port)
    }


def pe_wires(
    pe: Netlist, kind: Kind, activations: np.ndarray, weights: np.ndarray, accumulators: np.ndarray
) -> dict[object, int]:
    """Values of all wires of a PE whose registers hold these operands and accumulators, cycle by cycle.

    Parameters
    ----------
    activations, weights : ndarray (cycles, threads), uint8
        Operand bytes; those on the input ports are the next cycle's.
    accumulators : ndarray (cycles,), int64
        What is in the accumulator before the slot is added.
    """

    def words(operands: np.ndarray) -> np.ndarray:
        packed: np.ndarray = (operands.astype(np.int64) << (8 * np.arange(kind.threads))).sum(axis=1)
        return packed

    cycles = len(activations)
    a, w = words(activations), words(weights)
    known = {wire: 0 for name in ("clk", "drain", "acc_in") for wire in pe.ports[name]}
    for name, values in (
        ("a_out", a), ("a_in", np.roll(a, -1)), ("w_out", w), ("w_in", np.roll(w, -1)),
        ("acc_out", accumulators),
    ):  # fmt: skip
        known |= bits_of(pe.ports[name], values)
    return pe.evaluate(known, cycles)


def wrong_sums(pe: Netlist, wires: dict[object, int], sums: np.ndarray) -> int:
    """In how many cycles the gates would not load these sums (int64) into the accumulator."""
    next_of = {output: data for data, output in pe.registers}
    differ = 0
    for wire, wanted in bits_of(pe.ports["acc_out"], sums).items():
        differ |= wires[next_of[wire]] ^ wanted
    return differ.bit_count()


def wrong_slots(pe: Netlist, kind: Kind, chunks: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[int, int]:
    """Compare the gates of a PE with the twin; how many slots were worked off, how many came out wrong."""
    slots = wrong = 0
    for a, w in chunks:
        # A mixed accumulator makes every carry matter.
        before = (np.arange(len(a)) * 0x9E3779B1) & 0xFFFFFFFF
        wires = pe_wires(pe, kind, a[:, : kind.threads], w[:, : kind.threads], before)
        wrong += wrong_sums(pe, wires, before + slot_values(a, w, kind))
        slots += len(a)
    return slots, wrong


def energy_ge(pe: Netlist, kind: Kind, operands: Operands, seed: int) -> float:
    """Energy of one PE for a sample of the layer's outputs, in changes times gate equivalents.

    Draining is left out: it is short, and the same for every T.
    """
    rng = np.random.default_rng(seed)
    a_mtl, b_tln = split_threads(operands.a, operands.b, kind.threads)
    rows = rng.integers(0, a_mtl.shape[0], SAMPLED_OUTPUTS)
    cols = rng.integers(0, b_tln.shape[2], SAMPLED_OUTPUTS)
    a = a_mtl[rows].transpose(0, 2, 1).reshape(-1, kind.threads)
    w = b_tln[:, :, cols].transpose(2, 1, 0).reshape(-1, kind.threads).view(np.uint8)
    products = slot_values(a, w, kind).astype(np.int64).reshape(SAMPLED_OUTPUTS, -1)
    before = (np.cumsum(products, axis=1) - products).reshape(-1)
    wires = pe_wires(pe, kind, a, w, before)
    assert wrong_sums(pe, wires, before + products.reshape(-1)) == 0, "the gates do not compute these slots"

    def changes(wire: object) -> int:
        return ((wires[wire] ^ (wires[wire] >> 1)) & ((1 << (len(a) - 1)) - 1)).bit_count()

    gates = sum(GATE_EQUIVALENTS[gate] * changes(output) for gate, _, output in pe.cells)
    registers = sum(GATE_EQUIVALENTS[REGISTER] * changes(output) for _, output in pe.registers)
    return gates + registers + 2 * CLOCK_GE * len(a) * len(pe.registers)
