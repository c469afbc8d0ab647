# cython: boundscheck=False, wraparound=False, cdivision=True
"""The array, cycle by cycle: operands really move from PE to PE, and accumulators really shift out.

Activations enter at the left edge and move right, weights enter at the top edge and move down, one PE
per cycle, all T threads' operands of a slot together. Line i of an edge starts i cycles late (the skew),
so PE (i, j) works on slot l at cycle i + j + l of its tile. A control word travels with each operand: VALID
where there is a slot to work on, LAST with the final slot of the line. Lines of an edge tile that have no
operands carry the LAST mark alone: the tile occupies the whole array, but those PEs are never busy.

Nothing here knows how long a tile takes: it is over when the LAST marks of both operands have
reached the bottom right PE, the farthest from both edges. Cycles are counted as they tick.

Drains:

- ``serial``: once the tile is over, the accumulators shift down, one row per cycle, zeros following
  from the top; what leaves the bottom edge is the output. The operand registers stand still.
- ``overlapped``: once the tile is over, the two accumulator banks swap roles at the clock edge. The
  full one shifts out during the first R cycles of the next tile, while the other, which is empty, fills.
  The next tile takes L + R + C - 2 >= R cycles (L, C >= 1), so a bank is always empty before it must
  take over again, and no tile ever waits. The last tile's bank needs R cycles of its own.
- ``none``: the accumulators are read where they are, in no time.

What the PEs compute in a cycle is in csrc/cycle_step.c. Each PE counts for itself.
"""

import numpy as np
from numpy.lib.stride_tricks import as_strided

from sysmt.config import Drain, Rounding
from sysmt.hw.activity import Activity
from sysmt.hw.operands import split_threads
from sysmt.hw.stats import Counters

from libc.stddef cimport size_t
from libc.stdint cimport int16_t, int32_t, int64_t, uint16_t
from libc.string cimport memcpy, memmove, memset

cdef extern from "cycle_step.h" nogil:
    enum:
        CYCLE_VALID
        CYCLE_LAST

    ctypedef struct cycle_port:
        const int16_t *values
        int16_t wide_offset
        uint16_t narrow_limit
        int16_t ceiling
        uint16_t *reduced

    ctypedef struct cycle_array:
        size_t pes
        int threads
        cycle_port x
        cycle_port y
        int16_t half
        int16_t tie_to_even
        uint16_t every_slot
        uint16_t x_alone
        int32_t *accumulators
        uint16_t *busy
        uint16_t *at_least

    ctypedef struct cycle_load:
        int64_t busy
        int64_t active

    ctypedef cycle_load (*cycle_stepper)(const cycle_array *) noexcept

    cycle_stepper cycle_choose_stepper()


cdef class SystolicArray:
    """Registers, accumulators and clock of R x C PEs.

    Parameters
    ----------
    config : ArrayConfig
    signed : bool
        Whether the activations are int8.
    """

    cdef Py_ssize_t threads, rows, cols
    cdef object drain
    # Planes (T + 1, R, C): the T operands that each PE holds, and their control word.
    cdef int16_t[:, :, ::1] activations, weights
    # Two banks (2, R, C) of accumulators; only overlapped drains use the second.
    cdef int32_t[:, :, ::1] banks
    cdef Py_ssize_t filling, leaving  # which bank computes, and which one shifts out
    cdef Py_ssize_t rows_left         # rows that have yet to leave
    cdef int32_t[:, :] target         # where they go: that tile's part of the outputs
    # Counts of the running tile and of all tiles before, (T + 3, R, C): busy, at least 1..T active
    # threads, reduced activations, reduced weights.
    cdef uint16_t[:, :, ::1] counts
    cdef object totals
    cdef object log                   # arrays (2, cycles): busy and active PEs
    cdef cycle_array pes
    cdef cycle_stepper work

    def __cinit__(self, config, bint signed):
        policy = config.policy
        shape = (config.rows, config.cols)
        self.threads, self.rows, self.cols = config.threads, config.rows, config.cols
        self.drain = config.drain
        self.activations = np.zeros((self.threads + 1, *shape), np.int16)
        self.weights = np.zeros((self.threads + 1, *shape), np.int16)
        self.banks = np.zeros((2, *shape), np.int32)
        self.counts = np.zeros((self.threads + 3, *shape), np.uint16)
        self.totals = np.zeros((self.threads + 3, *shape), np.int64)
        self.log = []

        cdef bint to_nearest = config.rounding is Rounding.NEAREST_EVEN
        cdef bint saturate = config.saturate and to_nearest
        cdef cycle_port activation_port, weight_port
        activation_port.values = &self.activations[0, 0, 0]
        activation_port.reduced = &self.counts[self.threads + 1, 0, 0]
        activation_port.wide_offset = 8 if signed else 0
        activation_port.ceiling = (112 if signed else 240) if saturate else 256
        weight_port.values = &self.weights[0, 0, 0]
        weight_port.reduced = &self.counts[self.threads + 2, 0, 0]
        weight_port.wide_offset = 8
        weight_port.ceiling = 112 if saturate else 128
        activation_port.narrow_limit = weight_port.narrow_limit = 15
        if policy.reduces_always:  # every non-zero value passes for wide
            activation_port.wide_offset = weight_port.wide_offset = 0
            activation_port.narrow_limit = weight_port.narrow_limit = 0

        self.pes.pes = self.rows * self.cols
        self.pes.threads = self.threads
        if policy.reduced_operand == "activation":
            self.pes.x, self.pes.y = activation_port, weight_port
        else:
            self.pes.x, self.pes.y = weight_port, activation_port
        self.pes.half = 7 if to_nearest else 0
        self.pes.tie_to_even = to_nearest
        self.pes.every_slot = not policy.skips_zeros
        self.pes.x_alone = not policy.needs_both_wide
        self.pes.busy = &self.counts[0, 0, 0]
        self.pes.at_least = &self.counts[1, 0, 0]
        self.work = cycle_choose_stepper()

    def compute(self, const int16_t[:, :, ::1] left, const int16_t[:, :, ::1] top):
        """Work on one tile until it is over; `left` and `top` are what `skewed` made for the two edges."""
        cdef Py_ssize_t cycle = 0, left_end = left.shape[0] - 1, top_end = top.shape[0] - 1
        cdef cycle_load load
        tile_log = np.empty((2, left.shape[0] + top.shape[0]), np.int64)
        cdef int64_t[:, ::1] seen = tile_log
        self.pes.accumulators = &self.banks[self.filling, 0, 0]
        with nogil:
            while True:
                self.move_right(&left[min(cycle, left_end), 0, 0])
                self.move_down(&top[min(cycle, top_end), 0, 0])
                load = self.work(&self.pes)
                seen[0, cycle] = load.busy
                seen[1, cycle] = load.active
                if self.rows_left:
                    self.shift_out()
                cycle += 1
                if self.corner_is_done():
                    break
        self.log.append(tile_log[:, :cycle].copy())
        self.totals += self.counts
        self.counts[...] = 0

    def finish(self, int32_t[:, :] target):
        """Send the tile's accumulators to `target`, its part of the outputs, as the drain says."""
        if self.drain is Drain.NONE:
            target[...] = self.banks[0, : target.shape[0], : target.shape[1]]
            self.banks[0] = 0
            return
        self.target = target
        self.leaving = self.filling
        self.rows_left = self.rows
        if self.drain is Drain.OVERLAPPED:
            self.filling = 1 - self.filling
        else:
            self.shift_out_rest()

    def shift_out_rest(self):
        """Tick, without computing, until no row is left to leave."""
        cdef Py_ssize_t cycles = 0
        while self.rows_left:
            self.shift_out()
            cycles += 1
        self.log.append(np.zeros((2, cycles), np.int64))

    cdef void move_right(self, const int16_t *entering) noexcept nogil:
        # All registers at once: what leaves the right end of a row lands in the next row's first PE, and
        # there the operand that enters at the left edge replaces it.
        cdef int16_t *registers = &self.activations[0, 0, 0]
        cdef Py_ssize_t line, lines = (self.threads + 1) * self.rows
        memmove(registers + 1, registers, (lines * self.cols - 1) * sizeof(int16_t))
        for line in range(lines):
            registers[line * self.cols] = entering[line]

    cdef void move_down(self, const int16_t *entering) noexcept nogil:
        # Likewise: what leaves the bottom row of a plane lands in the top row of the next one.
        cdef int16_t *registers = &self.weights[0, 0, 0]
        cdef Py_ssize_t plane, plane_size = self.rows * self.cols
        memmove(registers + self.cols, registers,
                ((self.threads + 1) * plane_size - self.cols) * sizeof(int16_t))
        for plane in range(self.threads + 1):
            memcpy(registers + plane * plane_size, entering + plane * self.cols, self.cols * sizeof(int16_t))

    cdef bint corner_is_done(self) noexcept nogil:
        cdef Py_ssize_t control = self.threads, row = self.rows - 1, col = self.cols - 1
        return (self.activations[control, row, col] & self.weights[control, row, col] & CYCLE_LAST) != 0

    cdef void shift_out(self) noexcept nogil:
        # One cycle of the drain. Rows leave from the bottom; those below an edge tile's outputs are dropped.
        cdef int32_t *bank = &self.banks[self.leaving, 0, 0]
        cdef Py_ssize_t others = (self.rows - 1) * self.cols
        self.rows_left -= 1
        if self.rows_left < self.target.shape[0]:
            memcpy(&self.target[self.rows_left, 0], bank + others, self.target.shape[1] * sizeof(int32_t))
        memmove(bank + self.cols, bank, others * sizeof(int32_t))
        memset(bank, 0, self.cols * sizeof(int32_t))

    def counters(self):
        """Sum the counts of all PEs."""
        busy, *at_least, activations, weights = self.totals.sum(axis=(1, 2)).tolist()
        at_least = [busy, *at_least, 0]
        return Counters(
            tuple(at_least[c] - at_least[c + 1] for c in range(self.threads + 1)), activations, weights
        )

    def activity(self):
        """Join what was logged per cycle with what was counted per PE."""
        busy_pes, active_pes = np.concatenate([np.empty((2, 0), np.int64), *self.log], axis=1)
        collisions_rc = self.totals[2] if self.threads > 1 else np.zeros_like(self.totals[0])
        return Activity(busy_pes.size, busy_pes, active_pes, self.totals[0], self.totals[1], collisions_rc)


def skewed(operands, edge):
    """Lay out what enters an edge of the array, cycle by cycle.

    Parameters
    ----------
    operands : ndarray (lines, T, L), uint8 or int8
        What the tile's rows (or columns) of PEs receive, L slots of T operands each.
    edge : int
        Rows (or columns) of the array, at least `lines`.

    Returns
    -------
    ndarray (L + edge, T + 1, edge), int16
        T operands and a control word per line; line i starts i cycles late. The last cycle, and
        so all that follow, brings nothing.
    """
    lines, threads, slots = operands.shape
    stream = np.zeros((slots + edge, threads + 1, edge), np.int16)
    in_cycle, in_plane, in_line = stream.strides
    # A view in which a step to the next line is also a step to the next cycle.
    lines_view = as_strided(stream, (edge, threads + 1, slots), (in_line + in_cycle, in_plane, in_cycle))
    lines_view[:lines, :threads] = operands
    lines_view[:lines, threads] = CYCLE_VALID
    lines_view[:, threads, slots - 1] |= CYCLE_LAST
    return stream


def simulate(a, b, config):
    """Compute ``a @ b`` on the array, cycle by cycle.

    Parameters
    ----------
    a : ndarray (M, K), uint8 or int8
        Activations, checked and reordered; any strides.
    b : ndarray (K, N), int8
        Weights, checked and reordered; any strides.
    config : ArrayConfig

    Returns
    -------
    out_mn : ndarray (M, N), int32
    counters : Counters
    activity : Activity
    """
    rows, cols = config.rows, config.cols
    out_mn = np.zeros((a.shape[0], b.shape[1]), np.int32)
    array = SystolicArray(config, a.dtype == np.int8)
    if out_mn.size and a.shape[1]:
        a_mtl, b_tln = split_threads(a, b, config.threads)
        b_ntl = b_tln.transpose(2, 0, 1)
        tops = [skewed(b_ntl[n : n + cols], cols) for n in range(0, len(b_ntl), cols)]
        for m in range(0, len(a_mtl), rows):
            left = skewed(a_mtl[m : m + rows], rows)
            for tile, top in enumerate(tops):
                array.compute(left, top)
                array.finish(out_mn[m : m + rows, tile * cols : (tile + 1) * cols])
        array.shift_out_rest()
    return out_mn, array.counters(), array.activity()
