"""Traffic, bandwidth and stalls: conservation laws, a slow pixel-by-pixel model, and cases worked by hand."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sysmt.config import ArrayConfig, Drain
from sysmt.cost.layer_shape import Layer
from sysmt.cost.memory import Bandwidth, Memory, Prefetch, TileOrder, layer_traffic
from sysmt.cost.shared_pixels import Windows
from sysmt.errors import ConfigError
from sysmt.hw.timing import gemm_cycles


@st.composite
def layers(draw):
    r, s, stride_h, stride_w, down, across = (draw(st.integers(1, 3)) for _ in range(6))
    height = down * (r - 1) + 1 + draw(st.integers(0, 8))
    width = across * (s - 1) + 1 + draw(st.integers(0, 8))
    channels, filters = draw(st.sampled_from([1, 3, 64, 200])), draw(st.sampled_from([1, 5, 16, 40]))
    return Layer("x", height, width, r, s, channels, filters, stride_h, stride_w, down, across)


configs = st.builds(
    ArrayConfig,
    rows=st.integers(1, 6),
    cols=st.integers(1, 6),
    threads=st.sampled_from([1, 2, 4]),
    drain=st.sampled_from(Drain),
)
memories = st.builds(
    Memory,
    ifmap_kib=st.sampled_from([1, 2, 4, 64]),
    filter_kib=st.sampled_from([1, 2, 8, 64]),
    bandwidth=st.one_of(st.none(), st.builds(Bandwidth, *[st.sampled_from([0.3, 1, 7, 100])] * 3)),
    tile_order=st.sampled_from(TileOrder),
    output_bytes=st.sampled_from([1, 4]),
)


def strips_of_pixels(layer, rows):
    """Input pixels that each tile row touches, as sets, from the definition of a convolution."""
    (_, out_cols), strips = layer.ofmap, []
    for m in range(layer.m):
        if m % rows == 0:
            strips.append(set())
        for kr in range(layer.filter_height):
            for kc in range(layer.filter_width):
                y = m // out_cols * layer.stride_height + kr * layer.dilation_height
                x = m % out_cols * layer.stride_width + kc * layer.dilation_width
                if y < layer.ifmap_height and x < layer.ifmap_width:
                    strips[-1].add((y, x))
    return strips


def slow_fetches(strips, capacity):
    """Pixels fetched for each strip of one sweep, by keeping the newest strips that fit together."""
    fetched = []
    kept: list[set] = []
    for strip in strips:
        kept.append(strip)
        while kept and len(set().union(*kept)) > capacity:
            kept.pop(0)
        held = set().union(*kept[:-1]) if kept else set()
        fetched.append(len(strip - held))
    return fetched


def slow_reads(layer, config, memory):
    """Bytes from DRAM for both operands, by walking through all tiles."""
    rows = strips_of_pixels(layer, config.rows)
    cols = [{(n, k) for n in range(j, min(j + config.cols, layer.n)) for k in range(layer.k)}
            for j in range(0, layer.n, config.cols)]  # fmt: skip
    order = [(i, j) for i in range(len(rows)) for j in range(len(cols))]
    if memory.tile_order is TileOrder.COLUMNS_OUTER:
        order.sort(key=lambda tile: (tile[1], tile[0]))
    total = []
    for which, strips, capacity, size in (
        (0, rows, memory.ifmap_kib * 512 // layer.channels, layer.channels),
        (1, cols, memory.filter_kib * 512, 1),
    ):
        sweep = slow_fetches(strips, capacity)
        whole = len(set().union(*strips)) <= capacity
        seen, last, bytes_read = set(), None, 0
        for tile in order:
            strip = tile[which]
            if strip == last and len(strips[strip]) <= capacity:
                continue  # still there
            if whole and strip in seen:
                continue
            bytes_read += size * (len(strips[strip]) if strip == last else sweep[strip])
            seen.add(strip)
            last = strip
        total.append(bytes_read)
    return tuple(total)


@settings(max_examples=150, deadline=None)
@given(layers(), configs, memories)
def test_dram_reads_equal_a_walk_through_all_tiles(layer, config, memory):
    traffic = layer_traffic(layer, config, memory)
    assert (traffic.dram_ifmap_bytes, traffic.dram_filter_bytes) == slow_reads(layer, config, memory)


@settings(max_examples=300, deadline=None)
@given(layers(), st.data())
def test_pixels_that_windows_share_are_counted_once(layer, data):
    first = data.draw(st.integers(0, layer.m - 1))
    last = data.draw(st.integers(first - 1, layer.m - 1))
    one_by_one = strips_of_pixels(layer, 1)
    touched = len(set().union(*one_by_one[first : last + 1]))
    assert Windows(layer).pixels(np.array([first]), np.array([last])).tolist() == [touched]


def test_the_first_layer_of_a_4k_image():
    """69,120 tiles: 7 x 7 windows two pixels apart, over 2160 x 3840 pixels and their padding."""
    layer = Layer("conv1", 2165, 3845, 7, 7, 3, 64, 2, 2)
    config = ArrayConfig(60, 32, 1, drain="none")
    assert -(-layer.m // 60) * 2 == 69_120
    whole = layer_traffic(layer, config, Memory(ifmap_kib=2**17))
    assert whole.dram_ifmap_bytes == 3 * 2165 * 3845  # every pixel once
    # 60 windows side by side touch 7 x 125 pixels; 512 bytes hold none of such strips.
    nothing = layer_traffic(layer, config, Memory(ifmap_kib=1))
    assert nothing.dram_ifmap_bytes == 69_120 * 3 * 7 * 125
    # Half of 512 KiB holds the 7 rows of pixels that a row of windows touches, so that the next one, two rows
    # further down, fetches two new rows (3,845 pixels wide): all pixels once in each of the two sweeps.
    rows = layer_traffic(layer, config, Memory(ifmap_kib=512))
    assert rows.dram_ifmap_bytes == 2 * 3 * 2165 * 3845


@settings(max_examples=200, deadline=None)
@given(layers(), configs, memories)
def test_conservation(layer, config, memory):
    traffic = layer_traffic(layer, config, memory)
    row_tiles, col_tiles = -(-layer.m // config.rows), -(-layer.n // config.cols)
    assert traffic.sram_ifmap_reads == layer.m * layer.k * col_tiles
    assert traffic.sram_filter_reads == layer.n * layer.k * row_tiles
    assert traffic.sram_ofmap_writes == layer.m * layer.n
    # Every byte that is needed comes once at least; nothing comes that is not read.
    touched = len(set().union(*strips_of_pixels(layer, config.rows))) * layer.channels
    assert touched <= traffic.dram_ifmap_bytes <= traffic.sram_ifmap_reads
    assert layer.n * layer.k <= traffic.dram_filter_bytes <= traffic.sram_filter_reads
    assert traffic.dram_ofmap_bytes == layer.m * layer.n * memory.output_bytes
    assert traffic.compute_cycles == gemm_cycles(layer.m, layer.n, layer.k, config)
    assert traffic.stall_cycles >= 0
    if memory.bandwidth is None:
        assert traffic.stall_cycles == 0
    else:  # no interface moves more than it can
        before, cycles = traffic.prefetch_cycles, traffic.cycles
        assert traffic.dram_ifmap_bytes <= memory.bandwidth.ifmap * (before.ifmap + cycles) + 1e-6
        assert traffic.dram_filter_bytes <= memory.bandwidth.filter * (before.filter + cycles) + 1e-6
        assert traffic.dram_ofmap_bytes <= memory.bandwidth.ofmap * (cycles + traffic.writeback_cycles) + 1e-6
    assert traffic.overall_cycles >= traffic.cycles
    assert traffic.last_tile_start < traffic.cycles
    assert traffic.ifmap_fetch_end < max(1, traffic.last_tile_start)
    assert traffic.filter_fetch_end < max(1, traffic.last_tile_start)


@settings(max_examples=100, deadline=None)
@given(layers(), configs, memories)
def test_more_is_never_worse(layer, config, memory):
    traffic = layer_traffic(layer, config, memory)
    for field in ("ifmap_kib", "filter_kib"):
        larger = dataclasses.replace(memory, **{field: 2 * getattr(memory, field)})
        better = layer_traffic(layer, config, larger)
        assert better.dram_ifmap_bytes <= traffic.dram_ifmap_bytes
        assert better.dram_filter_bytes <= traffic.dram_filter_bytes
    if memory.bandwidth is not None:
        faster = dataclasses.replace(memory, bandwidth=Bandwidth(*(2 * b for b in memory.bandwidth)))
        assert layer_traffic(layer, config, faster).stall_cycles <= traffic.stall_cycles
        enough = Bandwidth(*(max(b, 1e-9) * (1 + 1e-9) for b in traffic.required))
        satisfied = dataclasses.replace(memory, bandwidth=enough)
        assert layer_traffic(layer, config, satisfied).stall_cycles == 0


@settings(max_examples=50, deadline=None)
@given(layers(), configs, memories)
def test_threads_move_the_same_in_less_time(layer, config, memory):
    one, four = (layer_traffic(layer, config.replace(threads=t), memory) for t in (1, 4))
    for field in ("sram_ifmap_reads", "sram_filter_reads", "sram_ofmap_writes", "dram_ifmap_bytes"):
        assert getattr(one, field) == getattr(four, field)
    assert four.cycles <= one.cycles
    assert all(needs >= needed for needs, needed in zip(four.required, one.required, strict=True))
    assert four.sram_peak_words == min(4, layer.k) * one.sram_peak_words


def test_a_case_worked_by_hand():
    # 4 x 2 tiles of 2 x 2, K = 1,000: a strip is 2,000 bytes. 1 KiB halves hold 512 bytes: nothing stays.
    layer, config = Layer.gemm("x", 8, 4, 1000), ArrayConfig(2, 2, 2, drain="none")
    tile_cycles = 500 + 2
    small = layer_traffic(layer, config, Memory(1, 1, 1, Bandwidth(2, 4, 1), "rows-outer"))
    assert small.dram_ifmap_bytes == 8 * 2000
    assert small.dram_filter_bytes == 8 * 2000
    # ifmap: 2,000 bytes at 2 a cycle are 1,000 cycles, 498 more than a tile computes; 7 tiles wait so.
    assert small.stall_cycles == 7 * (1000 - tile_cycles)
    assert small.prefetch_cycles == Prefetch(1000, 500)
    assert small.required == Bandwidth(2000 / tile_cycles, 2000 / tile_cycles, 4 / tile_cycles)
    assert small.writeback_cycles == 4
    # Halves of 2,048 bytes: the outer operand's strip stays, the inner one passes again and again.
    outer = layer_traffic(layer, config, Memory(4, 4, 1, None, "rows-outer"))
    assert (outer.dram_ifmap_bytes, outer.dram_filter_bytes) == (4 * 2000, 4 * 4000)
    outer = layer_traffic(layer, config, Memory(4, 4, 1, None, "columns-outer"))
    assert (outer.dram_ifmap_bytes, outer.dram_filter_bytes) == (2 * 8000, 2 * 2000)
    # Halves of 4,096 hold all weights.
    outer = layer_traffic(layer, config, Memory(4, 8, 1, None, "rows-outer"))
    assert (outer.dram_ifmap_bytes, outer.dram_filter_bytes) == (8000, 4000)
    assert outer.required.ifmap == 2000 / tile_cycles


def test_windows_share_their_pixels():
    # A 3 x 3 convolution over 6 x 6 pixels of 100 channels, two output pixels a strip: rows of 4.
    layer, config = Layer("x", 6, 6, 3, 3, 100, 1), ArrayConfig(2, 1, 1)
    everything = layer_traffic(layer, config, Memory(64, 64, 64))
    assert everything.dram_ifmap_bytes == 3600
    # 512 bytes are 5 pixels, fewer than a strip's 12: each strip comes whole.
    nothing = layer_traffic(layer, config, Memory(1, 64, 64))
    assert nothing.dram_ifmap_bytes == 8 * 12 * 100
    # 2,048 bytes are 20 pixels: a strip and the one before it fit. Neighbours share 6 of 12 pixels; the
    # first of a row shares 4 with the last of the row above.
    some = layer_traffic(layer, config, Memory(4, 64, 64))
    assert some.dram_ifmap_bytes == (12 + 6 + 3 * (8 + 6)) * 100
    # 1,536 bytes are 15 pixels: a strip fits, but nothing beside it.
    assert layer_traffic(layer, config, Memory(3, 64, 64)).dram_ifmap_bytes == 8 * 12 * 100


def test_overlapped_drain_ends_late():
    layer = Layer.gemm("x", 4, 4, 10)
    traffic = layer_traffic(layer, ArrayConfig(4, 4, 1, drain="overlapped"), Memory())
    assert traffic.compute_cycles == 10 + 6 + 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"ifmap_kib": 0},
        {"filter_kib": -1},
        {"ofmap_kib": 1.5},
        {"output_bytes": 5},
        {"tile_order": "diagonal"},
        {"bandwidth": (1, 0, 1)},
        {"bandwidth": (1, 1, -2)},
        {"bandwidth": (1, math.inf, 1)},
        {"bandwidth": (1, math.nan, 1)},
    ],
)
def test_wrong_memories(wrong):
    with pytest.raises(ConfigError):
        Memory(**wrong)


@pytest.mark.parametrize(
    "sizes",
    [(0, 1, 1, 1, 1, 1), (3, 3, 4, 1, 1, 1), (3, 3, 1, 4, 1, 1), (3, 3, 1, 1, -1, 1), (3, 3, 1, 1, 1, 1.5)],
)
def test_wrong_layers(sizes):
    with pytest.raises(ConfigError, match="'x'"):
        Layer("x", *sizes)
    with pytest.raises(ConfigError, match="'x'"):
        Layer("x", 5, 5, 3, 3, 1, 1, dilation_height=3)


def test_many_tiles_are_quick_enough_to_count():
    traffic = layer_traffic(Layer("x", 226, 226, 3, 3, 64, 64), ArrayConfig(), Memory())
    assert traffic.sram_ofmap_writes == 224 * 224 * 64
    assert np.isfinite(traffic.required).all()
