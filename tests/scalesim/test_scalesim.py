"""SCALE-Sim's files and figures: read as it does, equal to it where both model the same, clear where not."""

import csv
import io
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import RECORDED_SCALESIM as DATA

from sysmt.config import ArrayConfig
from sysmt.cost.energy import load_table
from sysmt.cost.layer_shape import Layer
from sysmt.cost.memory import Bandwidth, Memory, TileOrder
from sysmt.errors import ConfigError, OperandError
from sysmt.hw.timing import tile_count
from sysmt.scalesim.config_file import read_config
from sysmt.scalesim.reports import REPORTS, smt_report, smt_row
from sysmt.scalesim.simulate import draw_operands, read_matrix, read_operands, simulate_layer
from sysmt.scalesim.topology_file import read_topology, topology_csv, whole_name


def simulate(layers, config, memory, table="45nm"):
    return [
        simulate_layer(layer, draw_operands(layer, 0.5, 1.0, (0, index)), config, memory, load_table(table))
        for index, layer in enumerate(layers)
    ]


def read_report(text):
    """Read a report as SCALE-Sim's users do: blanks around commas, a comma at the end of each line."""
    header, *rows = ([cell.strip() for cell in line.split(",")] for line in text.splitlines())
    assert header[-1] == ""
    return [dict(zip(header[:-1], map(float, row[:-1]), strict=True)) for row in rows]


def assert_agrees(layers, config_path, directory):
    """Hold all that both model against reports that SCALE-Sim wrote."""
    machine = read_config(config_path)
    config = ArrayConfig(machine.rows, machine.cols, threads=1, drain="none")
    results = simulate(layers, config, machine.memory)
    ours = {name: read_report(report(results)) for name, report in REPORTS.items()}
    theirs = {name: read_report((directory / name).read_text()) for name in REPORTS}
    for name in REPORTS:
        assert list(ours[name][0]) == list(theirs[name][0])
        assert len(ours[name]) == len(theirs[name]) == len(layers)
    for index, (layer, result) in enumerate(zip(layers, results, strict=True)):
        mine, other = ours["COMPUTE_REPORT.csv"][index], theirs["COMPUTE_REPORT.csv"][index]
        cycles = mine["Total Cycles"]
        assert other["Total Cycles"] == cycles - 1  # the last cycle's number, not how many there are
        assert cycles == result.stats.cycles
        assert other["Stall Cycles"] == mine["Stall Cycles"] == 0
        assert other["Mapping Efficiency %"] == pytest.approx(mine["Mapping Efficiency %"], rel=1e-12)
        assert other["Compute Util %"] == pytest.approx(mine["Compute Util %"], rel=1e-12)
        assert other["Overall Util %"] == pytest.approx(
            mine["Overall Util %"] * cycles / (cycles - 1), rel=1e-12
        )
        mine, other = ours["DETAILED_ACCESS_REPORT.csv"][index], theirs["DETAILED_ACCESS_REPORT.csv"][index]
        partial = any(
            (size - span) % stride
            for size, span, stride in zip(
                layer.ifmap, layer.span, (layer.stride_height, layer.stride_width), strict=True
            )
        )
        for column, value in mine.items():
            if column == "SRAM OFMAP Writes":  # SCALE-Sim adds R + C for each tile
                tiles = tile_count(layer.m, layer.n, config)
                assert other[column] == value + tiles * (config.rows + config.cols)
            elif column == "SRAM IFMAP Stop Cycle" and partial:  # it skips pixels outside of the input
                assert other[column] <= value
            elif column.startswith("SRAM") or column.endswith(("Reads", "Writes")):
                assert other[column] == value, (layer, column)
        mine, other = ours["BANDWIDTH_REPORT.csv"][index], theirs["BANDWIDTH_REPORT.csv"][index]
        for column in ("Avg IFMAP SRAM BW", "Avg FILTER SRAM BW"):
            assert other[column] == pytest.approx(mine[column] * cycles / (cycles - 1), rel=1e-12)


@pytest.mark.parametrize("array", ["8x8", "4x16"])
@pytest.mark.parametrize("kind", ["conv", "gemm"])
def test_equals_recorded_figures(array, kind):
    layers = read_topology(DATA / f"{kind}.csv").layers
    assert_agrees(layers, DATA / f"{array}.cfg", DATA / "recorded" / kind / array)


@pytest.fixture(scope="session")
def scalesim_python():
    """An environment with SCALE-Sim 3.0.0, kept in the cache; skips where pip cannot make it."""
    home = Path(os.environ.get("SYSMT_CACHE") or "~/.cache/sysmt").expanduser() / "scalesim-3.0.0"
    python = home / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_CONSTRAINT")}
    probe = [python, "-c", "import scalesim.scale_sim"]
    if not python.exists() or subprocess.run(probe, check=False, capture_output=True).returncode:
        for command in (
            [sys.executable, "-m", "venv", "--clear", home],
            [python, "-m", "pip", "install", "--quiet", "scalesim==3.0.0", "numpy<2.2"],
        ):
            done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
            if done.returncode:
                pytest.skip(f"SCALE-Sim 3.0.0 cannot be installed: {done.stderr.strip()[-300:]}")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["conv", "gemm"])
def test_equals_scalesim_live(scalesim_python, kind, tmp_path):
    """Layers and arrays that no recording has, through SCALE-Sim itself."""
    rng = np.random.default_rng(11)
    layers = []
    for index in range(8):
        if kind == "gemm":
            layers.append(Layer.gemm(f"g{index}", *(int(size) for size in rng.integers(1, 60, 3))))
        else:
            height, width = (int(size) for size in rng.integers(5, 15, 2))
            r, s, stride, channels, filters = (int(rng.integers(1, top)) for top in (5, 5, 4, 6, 20))
            layers.append(Layer(f"c{index}", height, width, r, s, channels, filters, stride, stride))
    if kind == "conv":
        text = topology_csv((layer, 1) for layer in layers)
    else:
        text = "Layer, M, N, K,\n" + "".join(f"{x.name}, {x.m}, {x.n}, {x.k},\n" for x in layers)
    topology, config = tmp_path / "layers.csv", tmp_path / "machine.cfg"
    topology.write_text(text)
    assert list(read_topology(topology).layers) == layers
    recorded = (DATA / "8x8.cfg").read_text()
    for rows, cols in ((5, 3), (16, 16), (1, 7)):
        config.write_text(
            recorded.replace("ArrayHeight:    8", f"ArrayHeight: {rows}")
            .replace("ArrayWidth:     8", f"ArrayWidth: {cols}")
            .replace("= 8x8", f"= {rows}x{cols}")
        )
        subprocess.run(
            [scalesim_python, DATA / "record.py", config, topology, tmp_path, kind],
            check=True,
            capture_output=True,
            cwd=tmp_path,
        )
        assert_agrees(layers, config, tmp_path / f"{rows}x{cols}")


# -- layers ------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_im2col_multiplies_to_the_convolution(data):
    r, s, stride_h, stride_w, channels = (data.draw(st.integers(1, 3)) for _ in range(5))
    height, width = r + data.draw(st.integers(0, 5)), s + data.draw(st.integers(0, 5))
    layer = Layer("x", height, width, r, s, channels, 2, stride_h, stride_w)
    rng = np.random.default_rng(0)
    ifmap = rng.integers(0, 256, (channels, height, width))
    weights = rng.integers(-127, 128, (2, channels, r, s))
    out = layer.im2col(ifmap) @ weights.reshape(2, -1).T
    assert layer.ofmap == (-(-(height - r + stride_h) // stride_h), -(-(width - s + stride_w) // stride_w))
    assert out.shape == (layer.m, layer.n)
    padded = np.pad(ifmap, ((0, 0), (0, 9), (0, 9)))
    for m, n in np.ndindex(out.shape):
        y, x = (m // layer.ofmap[1]) * stride_h, (m % layer.ofmap[1]) * stride_w
        assert out[m, n] == (padded[:, y : y + r, x : x + s] * weights[n]).sum()


def test_export_and_reading_are_inverse(tmp_path):
    layers = [
        (Layer("conv1", 229, 229, 7, 7, 3, 64, 2, 2), 1),
        (Layer("DP_conv2", 58, 58, 3, 3, 1, 1), 4),
        (Layer("grouped", 9, 9, 3, 3, 2, 5), 2),
        (Layer("fc", 1, 1, 1, 1, 512, 10), 1),
    ]
    path = tmp_path / "net.csv"
    path.write_text(topology_csv(layers))
    read = read_topology(path).layers
    names = ["conv1", *(f"DP_conv2Channel_{i}" for i in range(4)), "grouped_group0", "grouped_group1", "fc"]
    assert [layer.name for layer in read] == names
    shapes = [layer.renamed("") for layer, groups in layers for _ in range(groups)]
    assert [layer.renamed("") for layer in read] == shapes
    for bad in (
        Layer("a,b", 1, 1, 1, 1, 1, 1),
        Layer("aDP", 3, 3, 1, 1, 2, 1),
        Layer("x", 3, 3, 1, 1, 1, 1, 2, 1),
    ):
        with pytest.raises(ConfigError, match=bad.name):
            topology_csv([(bad, 1)])


# -- files -------------------------------------------------------------------------------------------

CONV = "Layer name, IFMAP Height, IFMAP Width, Filter Height, Filter Width, Channels, Num Filter, Strides,\n"


def write(tmp_path, text, name="net.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_topology_variants(tmp_path):
    layer = Layer("a", 8, 9, 3, 2, 4, 5, 2, 2)
    same = [
        CONV + "a, 8, 9, 3, 2, 4, 5, 2,\n",
        CONV.replace(",\n", "\n") + "\n a,8,9,3,2,4,5,2\n\n  \n",
        "\ufeff" + CONV.upper() + "a,8,9,3,2,4,5,2,\n",
        "Strides,Layer,IFMAP Width,IFMAP Height,Filter Height,Filter Width,Num_Filter,Channels\n"
        "2,a,9,8,3,2,5,4\n",
        CONV.replace("Strides", "Stride height, Stride width") + "a, 8, 9, 3, 2, 4, 5, 2, 2,\n",
        CONV.replace("Strides,", "Strides, Sparsity,") + "a, 8, 9, 3, 2, 4, 5, 2,\n",
        CONV.replace("Strides,", "Strides, Sparsity,") + "a, 8, 9, 3, 2, 4, 5, 2, 1:1,\n",
    ]
    for text in same:
        assert read_topology(write(tmp_path, text)).layers == (layer,), text
    sparse = read_topology(
        write(tmp_path, CONV.replace("Strides,", "Strides,Sparsity,") + "a,8,9,3,2,4,5,2,2:4\n")
    ).layers
    assert sparse[0].density == (2, 4)
    gemm = read_topology(write(tmp_path, "Layer, M, N, K, Sparsity\nfc, 3, 4, 5, 1:2,\nb, 1, 1, 1,\n")).layers
    assert gemm == (Layer.gemm("fc", 3, 4, 5, (1, 2)), Layer.gemm("b", 1, 1, 1))
    assert (gemm[0].m, gemm[0].n, gemm[0].k) == (3, 4, 5)


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("", "line 1, column 1", "empty"),
        (CONV, "line 1, column 1", "no layer"),
        (CONV.replace("Channels, ", "") + "a,1,1,1,1,1,1\n", "line 1, column 88", "'channels' is missing"),
        (CONV.replace("Channels", "Chanels"), "line 1, column 69", "column 'Chanels' is unknown"),
        (CONV.replace("Channels", "IFMAP Width"), "line 1, column 69", "twice"),
        ("Layer, M, N, Strides, K\na,1,1,1,1\n", "line 1, column 14", "does not belong to a GEMM"),
        ("a, 8, 9, 3, 2, 4, 5, 2,\n", "line 1, column 1", "column 'a' is unknown"),
        (
            CONV + "a, 8, 9, 3, 2, 4, -5, 2,\n",
            "line 2, column 19",
            "-5 is too small; it must be at least 1 (num filter)",
        ),
        (CONV + "a, 8, 9, 3, 2, 4, 0, 2,\n", "line 2, column 19", "at least 1"),
        (CONV + "a, 8, 9, 3, 2, 4, 5.5, 2,\n", "line 2, column 19", "'5.5' is no integer"),
        (CONV + "a, 8, 9, 3, 2, , 5, 2,\n", "line 2, column 16", "nothing is no integer"),
        (CONV + "\na, 8, 9, 3, 2, 4, 5,\n", "line 3, column 20", "7 values; 8 are needed"),
        (CONV + "a, 8, 9, 3, 2, 4, 5, 2, 7,\n", "line 2, column 25", "one value too many"),
        (CONV + ", 8, 9, 3, 2, 4, 5, 2,\n", "line 2, column 1", "no name"),
        (CONV + "a, 8, 9, 9, 2, 4, 5, 2,\n", "line 2, column 10", "larger than the input's 8"),
        (CONV + "a, 8, 9, 3, 2, 4,\r 5, 2,\r\n", "line 2, column 18", "in the middle of a line"),
        (CONV.encode() + b"caf\xe9, 8, 9, 3, 2, 4, 5, 2,\n", "line 2, column 4", "0xe9 is not UTF-8"),
        (CONV.encode("utf-16"), "line 1, column 1", "not UTF-8"),
        ("Layer, M, N, K, Sparsity\nfc, 3, 4, 5, half\n", "line 2, column 14", "no N:M"),
        ("Layer, M, N, K, Sparsity\nfc, 3, 4, 5, 4:2\n", "line 2, column 14", "impossible"),
        (
            CONV + f"a, {10**19}, 9, 3, 2, 4, 5, 2,\n",
            "line 2, column 4",
            "is too large; it must be at most 2,147",
        ),
        (
            CONV + f"a, 8, 9, 3, 2, 4, 5, {10**20},\n",
            "line 2, column 22",
            "a number of 21 digits is out of range",
        ),
        (CONV + f"a, 8, 9, 3, 2, 4, 5, {'9' * 5000},\n", "line 2, column 22", "a number of 5000 digits"),
        (CONV + "a, 8, 9, 3, 2, 4, 1_0, 2,\n", "line 2, column 19", "'1_0' is no integer"),
        (CONV + "aDP, 8, 9, 3, 2, 65537, 5, 2,\n", "line 2, column 18", "at most 65,536"),
        ("Layer, M, N, K\na, 2147483647, 2147483647, 2,\n", "line 2, column 1", "more than 2^62 MACs"),
        (f"Layer, M, N, K, Sparsity\na, 1, 1, 1, 1:{10**20}\n", "line 2, column 15", "out of range"),
        ("Layer, M, N, K, Sparsity\na, 1, 1, 1, 1:1025\n", "line 2, column 15", "at most 1,024"),
        ("Layer, M, N, K, Batch\na, 1, 1, 1, 65537\n", "line 2, column 13", "at most 65,536"),
        (CONV[:-2] + ",,,Eh,\na, 8, 9, 3, 2, 4, 5, 2,,,6,\n", "line 1, column 99", "this column is empty"),
        (CONV + "a, 8, 9, 3, 2, 4, 5, 2,,,6,\n", "line 2, column 24", "11 cells, this one empty"),
        (CONV.replace(",", "\t"), "line 1, column 11", "separated by tabs; commas are needed"),
        (CONV + "a;8;9;3;2;4;5;2\n", "line 2, column 2", "separated by semicolons"),
        ("Layer, M, N, K\na,\n", "line 2, column 2", "1 values; 4 are needed"),
        ("Layer, M, N, K\n,\n", "line 1, column 1", "no layer follows"),
    ],
)
def test_bad_topologies_are_named_by_place(tmp_path, text, place, what):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        read_topology(path)
    assert f"{path}, {place}: " in str(raised.value)
    assert what in str(raised.value)


@pytest.mark.parametrize(
    ("text", "layers", "note"),
    [
        (CONV.replace("\n", "\r\n") + "a, 8, 9, 3, 2, 4, 5, 2,\r\n\r\n", 1, None),
        (CONV + "a, 8, 9, 3, 2, 4, 5, 2,,,\n", 1, "line 2: empty cells at the end are dropped"),
        (CONV + "a, 8, 9, 3, 2, 4, 5, 2,\n,,,,,,,,\n", 1, "line 3: a line of commas is a blank line"),
        (
            CONV + "# one, two\na, 8, 9, 3, 2, 4, 5, 2, # 3, 4\n",
            1,
            "lines 2, 3: what follows a # is a comment",
        ),
        (CONV + "a, 8, 9, 3, 2, 4, 5, 2 #3\n", 1, "line 2: what follows a # is a comment"),
        (
            CONV.replace("Height", "Width", 1) + "a, 8, 9, 3, 2, 4, 5, 2,\n",
            1,
            "line 1: ifmap width is there twice",
        ),
        (CONV.replace("Layer name", "L") + "a, 8, 9, 3, 2, 4, 5, 2,\n", 1, None),
        (CONV.replace(",\n", ", batch size\n") + "a, 8, 9, 3, 2, 4, 5, 2, 3\n", 3, None),
        (
            CONV.replace(",\n", ", batch size\n") + "a, 8, 9, 3, 2, 4, 5, 2,\n",
            1,
            "line 2: batch size is missing; 1 ",
        ),
        (
            "Strides," + CONV.replace("Strides,", "") + "2, a, 8, 9, 3, 2, 4, 5\n",
            1,
            "line 1: columns are read by",
        ),
    ],
)
def test_what_spreadsheets_and_people_add_is_read_over_with_a_note(tmp_path, text, layers, note):
    path = write(tmp_path, text)
    read = read_topology(path)
    assert [layer.renamed("a") for layer in read.layers] == [Layer("a", 8, 9, 3, 2, 4, 5, 2, 2)] * layers
    assert len({layer.name for layer in read.layers}) == layers
    assert len(read.notes) == (note is not None)
    assert all(line.startswith(f"{path}, {note}") for line in read.notes)


def test_a_sign_of_a_comment_in_a_name_belongs_to_the_name(tmp_path):
    assert read_topology(write(tmp_path, "Layer, M, N, K\nfc #1, 2, 3, 4\n")).layers[0].name == "fc #1"


def test_a_layer_of_too_deep_sums_is_named_by_place_before_any_layer_runs(tmp_path):
    path = write(tmp_path, "Layer, M, N, K,\nfc1, 4, 16, 256,\ndeep, 1, 8, 65536,\nfc3, 4, 8, 64,\n")
    with pytest.raises(ConfigError, match=r"line 3, column 13: K=65536, could .* at most 65535 \(k\)"):
        read_topology(path).check_values()
    path = write(tmp_path, CONV + "a, 8, 9, 3, 2, 10923, 5, 2,\n")
    with pytest.raises(ConfigError, match=r"column 16: K=65538, channels times filter: 10923 x 3 x 2, could"):
        read_topology(path).check_values()
    path = write(tmp_path, CONV + "a, 2147483647, 2147483647, 1, 1, 1, 1, 1,\n")
    with pytest.raises(ConfigError, match=r"line 2, column 1: operands and results of layer 'a' .* GiB"):
        read_topology(path).check_values()
    read_topology(write(tmp_path, "Layer, M, N, K,\na, 1, 8, 65535,\n")).check_values()


def test_missing_file(tmp_path):
    for read in (read_topology, read_config):
        with pytest.raises(ConfigError, match=r"nowhere.* cannot be read: No such file"):
            read(tmp_path / "nowhere")


V2 = """\
[general]
run_name = "tpu v2"
; a comment
[architecture_presets]
ArrayHeight = 32
ArrayWidth = 16
IfmapSramSzkB = 64
FilterSramSzkB = 32
OfmapSramSzkB = 8
IfmapOffset = 0
Bandwidth = 10
Dataflow = os
MemoryBanks = 1
[run_presets]
InterfaceBandwidth = USER
"""


def test_v2_and_v3_configs(tmp_path):
    read = read_config(write(tmp_path, V2))
    assert (read.run_name, read.rows, read.cols) == ("tpu v2", 32, 16)
    assert read.memory == Memory(64, 32, 8, Bandwidth(10, 10, 10), TileOrder.COLUMNS_OUTER)
    assert "IfmapOffset (line 10), MemoryBanks (line 13)" in read.notes[1]
    calc = read_config(write(tmp_path, V2.replace("USER", "calc").replace("os", "OS")))
    assert calc.memory.bandwidth is None
    three = read_config(write(tmp_path, V2.replace("= 10", "= 10, 20,30").replace("[general]", "[General]")))
    assert three.memory.bandwidth == Bandwidth(10, 20, 30)
    strange = read_config(write(tmp_path, V2 + "Novelty = 3\n"))
    assert strange.notes[2].endswith("unknown, and so without effect: Novelty (line 16)")
    v3 = read_config(DATA / "8x8.cfg")
    assert (v3.run_name, v3.rows, v3.cols, v3.memory.bandwidth) == ("8x8", 8, 8, None)


V1 = """\
[general]
run_name = "MLPERF_32x32_os"\t; a comment
[architecture_presets]
ArrayHeight:    32   # rows
ArrayWidth:     16
IfmapSramSz:    512
FilterSramSz:   64
OfmapSramSz:    8
Dataflow:       os
"""


def test_v1_configs_have_other_names_quotes_and_no_bandwidth(tmp_path):
    for text in (V1, V1.replace("\n", "\r\n")):
        read = read_config(write(tmp_path, text))
        assert (read.run_name, read.rows, read.cols) == ("MLPERF_32x32_os", 32, 16)
        assert read.memory == Memory(512, 64, 8)
        for note in (
            "'; a comment' (line 2) is read as a comment",
            "'# rows' (line 4) is read as a comment",
            "the quotes around 'MLPERF_32x32_os' (line 2) are dropped",
            "IfmapSramSz (line 6) is read as IfmapSramSzkB, KiB",
            "[run_presets] is missing, as in files of v1: InterfaceBandwidth is CALC, and nothing stalls",
        ):
            assert any(line.endswith(note) for line in read.notes), note


@pytest.mark.parametrize(
    ("old", "new", "place", "what"),
    [
        ("= os", "= ws", "line 12, column 12", "weight-stationary; this array is output-stationary only"),
        ("= os", "= is", "line 12, column 12", "input-stationary"),
        ("= os", "= rs", "line 12, column 12", "'rs' is no dataflow"),
        ("= os", "=", "line 12, column 11", "no value"),
        ("Bandwidth = 10", "Bandwidth = 0", "line 11, column 13", "0 is too small"),
        ("Bandwidth = 10", "Bandwidth = 10, 0, 3", "line 11, column 17", "0 is too small"),
        ("Bandwidth = 10", "Bandwidth = 10, 3", "line 11, column 13", "2 bandwidths"),
        ("Bandwidth = 10\n", "", "line 4, column 1", "lacks the key Bandwidth"),
        ("ArrayHeight = 32", "ArrayHeight = -32", "line 5, column 15", "-32 is too small"),
        (
            "Bandwidth = 10",
            f"Bandwidth = 1{'0' * 400}",
            "line 11, column 13",
            "a number of 401 digits is out of range",
        ),
        ("ArrayHeight = 32", f"ArrayHeight = {10**19}", "line 5, column 15", "at most 65,536"),
        ("IfmapSramSzkB = 64", f"IfmapSramSzkB = {2**24 + 1}", "line 7, column 17", "at most 16,777,216"),
        ("IfmapOffset = 0", "IfmapSramSz = 1", "line 10, column 1", "twice"),
        ("ArrayHeight = 32", "ArrayHeight = 3.2", "line 5, column 15", "'3.2' is no integer"),
        ("ArrayHeight = 32", "ArayHeight = 32", "line 4, column 1", "lacks the key ArrayHeight"),
        ("ArrayWidth = 16", "ArrayHeight = 16", "line 6, column 1", "twice"),
        ("IfmapSramSzkB = 64", "IfmapSramSzkB = 0", "line 7, column 17", "at least 1"),
        ("IfmapOffset = 0", "IfmapOffset = low", "line 10, column 15", "'low' is no integer"),
        ("= USER", "= FREE", "line 15, column 22", "CALC"),
        ("[run_presets]", "[runs]", "line 16, column 1", "[run_presets] is missing"),
        ("; a comment", "nonsense", "line 3, column 1", "neither [section] nor key"),
        ("[general]\n", "", "line 1, column 1", "before the first [section]"),
        ('"tpu v2"', "../up", "line 2, column 12", "cannot name a directory"),
        (
            "InterfaceBandwidth = USER",
            "InterfaceBandwidth = USER\nUseRamulatorTrace = True",
            "line 16, column 21",
            "Ram",
        ),
        (
            "[run_presets]",
            "[sparsity]\nSparsitySupport = true\n[run_presets]",
            "line 15, column 19",
            "K is never",
        ),
        ("[run_presets]", "[layout]\nIfmapCustomLayout = yes\n[run_presets]", "line 15, column 21", "banked"),
        (
            "[run_presets]",
            "[layout]\nIfmapCustomLayout = so\n[run_presets]",
            "line 15, column 21",
            "neither true",
        ),
        ("[run_presets]", "[general]", "line 14, column 1", "twice"),
        ("ArrayWidth = 16\n", "ArrayWidth = 1\r6\n", "line 6, column 15", "in the middle of a line"),
    ],
)
def test_bad_configs_are_named_by_place(tmp_path, old, new, place, what):
    assert old in V2
    path = write(tmp_path, V2.replace(old, new), "machine.cfg")
    with pytest.raises(ConfigError) as raised:
        read_config(path)
    assert f"{path}, {place}: " in str(raised.value)
    assert what in str(raised.value)


def pickled():
    """A .npy file of Python objects, which only unpickling reads."""
    file = io.BytesIO()
    np.save(file, np.array([{}], object), allow_pickle=True)
    return file.getvalue()


# -- operands and reports ----------------------------------------------------------------------------


def test_drawn_operands_have_the_densities():
    layer = Layer("x", 40, 40, 1, 1, 32, 50, density=(2, 4))
    a, b = draw_operands(layer, 0.3, 1.0, 7)
    assert a.shape == (layer.m, layer.k)
    assert abs((a != 0).mean() - 0.3) < 0.01
    kept = (b.reshape(-1, 4, layer.n) != 0).sum(axis=1)
    assert (kept == 2).all()
    full, _ = draw_operands(layer, 1.0, 1.0, 7)
    assert (full != 0).all()
    again, _ = draw_operands(layer, 0.3, 1.0, 7)
    np.testing.assert_array_equal(a, again)
    for wrong in ((-0.1, 1.0, 0), (0.5, 1.5, 0), (0.5, float("nan"), 0), (0.5, 0.5, -1)):
        with pytest.raises(ConfigError):
            draw_operands(layer, *wrong)
    odd = draw_operands(Layer.gemm("x", 3, 40, 7, (1, 3)), 1.0, 1.0)[1]
    assert ((odd[:6].reshape(2, 3, 40) != 0).sum(axis=1) == 1).all()


def test_operands_are_drawn_block_by_block_and_the_same(monkeypatch):
    layers = [
        Layer("x", 9, 10, 3, 3, 17, 33),
        Layer.gemm("y", 30, 20, 71, (1, 3)),
        Layer("z", 9, 9, 1, 1, 8, 5),
    ]
    whole = [draw_operands(layer, 0.3, 0.6, 3) for layer in layers]
    monkeypatch.setattr("sysmt.scalesim.simulate.DRAWN_AT_ONCE", 100)
    for layer, (a, b) in zip(layers, whole, strict=True):
        again = draw_operands(layer, 0.3, 0.6, 3)
        np.testing.assert_array_equal(again[0], a)
        np.testing.assert_array_equal(again[1], b)


def test_drawing_takes_little_more_than_the_operands():
    tracemalloc.start()
    try:
        a, b = draw_operands(Layer.gemm("x", 4000, 500, 4000, (2, 4)), 0.5, 1.0)
        assert tracemalloc.get_traced_memory()[1] < 4 * (a.size + b.size) + 2**26
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"1,2,3\n4,5,6\n", "is no .npy file; save one matrix of integers with numpy.save"),
        (b"", "is no .npy file"),
        (b"PK\x03\x04rest", "is a .npz archive"),
        (b"\x93NUMPY\x01\x00", "holds Python objects or is damaged"),
        (pickled(), "holds Python objects or is damaged"),
    ],
)
def test_what_is_no_matrix_is_named_and_nobody_is_told_to_unpickle_it(tmp_path, content, what):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(OperandError) as raised:
        read_matrix(path)
    assert str(raised.value).startswith(f"{path} {what}")
    assert "pickle" not in str(raised.value)


def test_operands_from_files(tmp_path):
    layer = Layer.gemm("fc", 3, 4, 5)
    a, b = draw_operands(layer, 0.5, 0.5)
    np.save(tmp_path / "fc.a_mk.npy", a)
    with pytest.raises(OperandError, match=r"fc\.b_kn\.npy cannot be read"):
        read_operands(layer, tmp_path)
    np.save(tmp_path / "fc.b_kn.npy", b[:3])
    with pytest.raises(OperandError, match=r"'fc'.*\(3, 5\) and \(5, 4\) are needed"):
        simulate_layer(layer, read_operands(layer, tmp_path), ArrayConfig(), Memory(), load_table())
    np.save(tmp_path / "fc.b_kn.npy", b)
    result = simulate_layer(layer, read_operands(layer, tmp_path), ArrayConfig(), Memory(), load_table())
    assert result.stats.macs == 60
    np.save(tmp_path / "fc.b_kn.npy", b[0])
    with pytest.raises(OperandError, match="a matrix is needed"):
        read_operands(layer, tmp_path)
    deep = Layer.gemm("deep", 1, 1, 70_000)
    with pytest.raises(OperandError, match="layer 'deep': K=70000"):
        simulate_layer(deep, draw_operands(deep, 1.0, 1.0), ArrayConfig(), Memory(), load_table())


def test_speedup_counts_the_stalls_and_the_compute_cycles_have_one_of_their_own():
    # 2 x 8 tiles; each next tile needs 8 rows of 8,192 activations at one byte per cycle beside 8 + 8 - 2
    # cycles and 8,192 / T slots of computing, and the last tile waits for nothing.
    layers = [Layer.gemm("llama_ffn", 16, 64, 8192)]
    starved = Memory(1, 1, 1, Bandwidth(1, 1, 1))
    (result,) = simulate(layers, ArrayConfig(8, 8, 4, drain="none"), starved)
    row = smt_row(result, "pj")
    assert row["compute_cycles"] == 16 * (2048 + 14)
    assert row["cycles"] == 15 * 65_536 + 2048 + 14
    assert row["stall_cycles"] == row["cycles"] - row["compute_cycles"]
    assert row["speedup_cycles"] == (15 * 65_536 + 8192 + 14) / (15 * 65_536 + 2048 + 14)
    assert row["speedup_compute_cycles"] == (8192 + 14) / (2048 + 14) == result.stats.speedup_cycles
    (result,) = simulate(layers, ArrayConfig(8, 8, 4, drain="none"), Memory(1, 1, 1))
    assert result.speedup_cycles == result.speedup_compute_cycles == (8192 + 14) / (2048 + 14)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("drain", ["serial", "overlapped", "none"])
def test_reports_keep_their_ranges(threads, drain):
    layers = [Layer("a", 9, 9, 3, 3, 5, 7, 2, 2), Layer.gemm("b", 40, 9, 3), Layer.gemm("one", 1, 1, 1)]
    config = ArrayConfig(4, 8, threads, drain=drain)
    results = simulate(layers, config, Memory(1, 1, 1, Bandwidth(2, 2, 2), "columns-outer"))
    for row, result in zip(read_report(REPORTS["COMPUTE_REPORT.csv"](results)), results, strict=True):
        assert row["Total Cycles"] == result.stats.cycles + row["Stall Cycles"]
        assert row["Total Cycles (incl. prefetch)"] > row["Total Cycles"]
        assert (
            0
            < row["Overall Util %"]
            <= row["Compute Util %"] + 1e-9
            <= row["Mapping Efficiency %"] + 1e-9
            <= 100
        )
    for row in read_report(REPORTS["DETAILED_ACCESS_REPORT.csv"](results)):
        for operand in ("SRAM IFMAP", "SRAM Filter", "SRAM OFMAP", "DRAM IFMAP", "DRAM Filter", "DRAM OFMAP"):
            assert row[f"{operand} Start Cycle"] <= row[f"{operand} Stop Cycle"]
    for row in read_report(REPORTS["BANDWIDTH_REPORT.csv"](results)):
        assert row["Avg IFMAP SRAM BW"] <= threads * 4
        assert row["Avg FILTER SRAM BW"] <= threads * 8
        assert all(0 < row[f"Avg {operand} DRAM BW"] <= 2 for operand in ("IFMAP", "FILTER", "OFMAP"))
    rows = list(csv.DictReader(smt_report(results, "pj").splitlines()))
    for row, result in zip(rows, results, strict=True):
        assert sum(int(row[f"active_{c}"]) for c in range(5)) == result.stats.slots
        assert float(row["energy_pj"]) == pytest.approx(sum(result.energy.values()))
        assert float(row["energy_delay_pj_cycles"]) == pytest.approx(
            result.total_energy * result.traffic.cycles
        )


@pytest.mark.parametrize(
    ("name", "whole", "many"),
    [
        ("DP_cChannel_12", "DP_c", "channels"),
        ("cChannel_12", "cChannel_12", ""),
        ("conv_group3", "conv", "groups"),
        ("a_image1", "a", "images"),
        ("DP_a_image1Channel_0", "DP_a", "channels"),
        ("fc", "fc", ""),
    ],
)
def test_one_of_many_knows_what_it_is_one_of(name, whole, many):
    assert whole_name(name) == (whole, many)
