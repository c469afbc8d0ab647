"""`sysmt topology` and `sysmt trace`, end to end, and networks as topologies."""

import copy
import csv
import io

import numpy as np
import pandas as pd
import pytest
import torch
from places import RECORDED_SCALESIM as DATA
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from vcd.reader import tokenize

import sysmt
from sysmt.cli import app
from sysmt.hw.trace import trace_tile
from sysmt.nn.array.topology_export import export_named, export_topology, input_size
from sysmt.nn.networks.models import build_model, build_shapes, model_names
from sysmt.scalesim.topology_file import read_topology
from sysmt.study.plots.trace import pe_table

RANDOM = ("--model", "digits", "--weights", "random", "--calibration-images", "8", "--cpu-threads", "1")


def run(*args):
    """Run one command line; return its exit code."""
    return app([str(arg) for arg in args], standalone_mode=False) or 0


def read(path):
    return pd.read_csv(path, sep=r"\s*,\s*", engine="python")


# -- topology ----------------------------------------------------------------------------------------


def test_reports_of_a_topology(tmp_path, capsys):
    common = ("topology", "--config", DATA / "8x8.cfg", "--topology", DATA / "gemm.csv")
    assert run(*common, "--threads", 4, "--accelergy", "--out", tmp_path) == 0
    table = capsys.readouterr().out
    assert "deep" in table
    assert "all" in table
    directory = tmp_path / "8x8"
    names = {"COMPUTE_REPORT.csv", "BANDWIDTH_REPORT.csv", "DETAILED_ACCESS_REPORT.csv", "SMT_REPORT.csv"}
    assert {path.name for path in directory.iterdir()} == names | {"action_counts.yaml"}
    smt, compute = pd.read_csv(directory / "SMT_REPORT.csv"), read(directory / "COMPUTE_REPORT.csv")
    layers = read_topology(DATA / "gemm.csv").layers
    assert list(smt["name"]) == [layer.name for layer in layers]
    for layer, (_, row), cycles in zip(layers, smt.iterrows(), compute["Total Cycles"], strict=True):
        tiles = -(-layer.m // 8) * -(-layer.n // 8)
        assert cycles == row["compute_cycles"] == tiles * (-(-layer.k // 4) + 14)
    assert (smt["collisions"] > 0).all()
    assert run(*common, "--out", tmp_path) == 2
    assert "is not empty" in capsys.readouterr().err
    assert run(*common, "--out", tmp_path, "--overwrite", "--energy", "sysmt-micro2020") == 0
    again = pd.read_csv(directory / "SMT_REPORT.csv")
    assert not (directory / "action_counts.yaml").exists()
    assert (again["energy_relative"] == again["pe_cycles"]).all()  # one thread: the conventional array


def test_terminal_tells_speedup_with_and_without_stalls_and_adds_up_depthwise_channels(tmp_path, capsys):
    topology, config = tmp_path / "net.csv", tmp_path / "one_byte.cfg"
    titles = (
        "Layer name, IFMAP Height, IFMAP Width, Filter Height, Filter Width, Channels, Num Filter, Strides,"
    )
    topology.write_text(f"{titles}\r\nDP_c, 8, 8, 3, 3, 5, 1, 1,\r\nfc, 1, 1, 1, 1, 640, 64, 1,\r\n,,,,\r\n")
    text = (DATA / "8x8.cfg").read_text()
    config.write_text(text.replace("CALC", "USER").replace("Bandwidth : 10", "Bandwidth : 1"))
    common = ("topology", "--topology", topology, "--threads", 4, "--drain", "serial", "--out", tmp_path)
    assert run(*common, "--config", config) == 0
    shown, said = capsys.readouterr()
    assert "line 4: a line of commas is a blank line" in " ".join(said.split())
    assert "DP_c (5 channels)" in shown
    assert "Channel_" not in shown
    smt = pd.read_csv(tmp_path / "8x8" / "SMT_REPORT.csv")
    assert len(smt) == 6
    before = smt["speedup_cycles"] * smt["cycles"], smt["speedup_compute_cycles"] * smt["compute_cycles"]
    total = before[0].sum() / smt["cycles"].sum(), before[1].sum() / smt["compute_cycles"].sum()
    assert total[0] < total[1]
    last = shown[shown.index(" all ") :].split()
    assert last[1:5] == [
        f"{smt['cycles'].sum():,}", f"{smt['stall_cycles'].sum():,}", f"{total[0]:.2f}x", f"{total[1]:.2f}x"
    ]  # fmt: skip
    assert run(*common, "--config", DATA / "8x8.cfg", "--overwrite") == 0
    last = capsys.readouterr().out
    assert "without" not in last
    assert last[last.index(" all ") :].split()[3] == f"{total[1]:.2f}x"


def test_topology_with_operands_from_files(tmp_path, capsys):
    rng = np.random.default_rng(0)
    operands = {}
    for layer in read_topology(DATA / "gemm.csv").layers:
        a = rng.integers(-128, 128, (layer.m, layer.k)).astype(np.int8)
        b = rng.integers(-128, 128, (layer.k, layer.n)).astype(np.int8)
        operands[layer.name] = a, b
        np.save(tmp_path / f"{layer.name}.a_mk.npy", a)
        np.save(tmp_path / f"{layer.name}.b_kn.npy", b)
    common = (
        "topology",
        "--config",
        DATA / "8x8.cfg",
        "--topology",
        DATA / "gemm.csv",
        "--operands",
        tmp_path,
    )
    assert (
        run(*common, "--threads", 2, "--drain", "serial", "--policy", "S+W", "--out", tmp_path / "out") == 0
    )
    smt = pd.read_csv(tmp_path / "out" / "8x8" / "SMT_REPORT.csv").set_index("name")
    config = sysmt.ArrayConfig(8, 8, 2, "S+W")
    for name, (a, b) in operands.items():
        stats = sysmt.simulate_gemm(a, b, config).stats
        assert tuple(smt.loc[name, [f"active_{c}" for c in range(3)]]) == stats.active
        assert smt.loc[name, "reduced_weights"] == stats.reduced_weights
        assert smt.loc[name, "compute_cycles"] == stats.cycles
    (tmp_path / "thin.b_kn.npy").unlink()
    assert run(*common, "--out", tmp_path / "other") == 2
    assert "thin.b_kn.npy" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("args", "what"),
    [
        ((), "--config is missing"),
        (("--config", DATA / "8x8.cfg"), "--topology is missing"),
        (("--config", "nowhere.cfg", "--topology", DATA / "gemm.csv"), "nowhere.cfg cannot be read"),
        (("--config", DATA / "gemm.csv", "--topology", DATA / "gemm.csv"), "gemm.csv, line 1, column 1"),
        (("--export", "digits", "--config", DATA / "8x8.cfg"), "excludes"),
        (("--export", "digitz"), "did you mean 'digits'"),
        (("--export", "digits", "--image-size", 0), "image_size=0"),
        (("--export", "vgg11", "--image-size", 3), "does not run on an input"),
        (("--threads", 3, "--config", DATA / "8x8.cfg", "--topology", DATA / "gemm.csv"), "threads=3"),
        (("--energy", "none", "--config", DATA / "8x8.cfg", "--topology", DATA / "gemm.csv"), "energy table"),
    ],
)
def test_wrong_topology_commands(args, what, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("topology", *args) == 2
    assert what in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["digits", "digits32", "resnet20", "resnet18", "mobilenet_v1", "resnext50_32x4d"]
)
def test_exported_networks_have_the_networks_own_shapes(name, tmp_path, capsys):
    assert run("topology", "--export", name, "--image-size", 64, "--out", tmp_path / "net.csv") == 0
    layers = read_topology(tmp_path / "net.csv").layers
    model = build_model(name)
    sizes = []

    def note(module, given, made):
        groups = getattr(module, "groups", 1)
        weight = module.weight
        sizes.extend(
            [(made[0, 0].numel() if made.ndim == 4 else 1, len(weight) // groups, weight[0].numel())] * groups
        )

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, 1 if name.startswith("digits") else 3, 64, 64))
    assert [(layer.m, layer.n, layer.k) for layer in layers] == sizes


def test_export_to_stdout_reads_back(tmp_path, capsys):
    assert run("topology", "--export", "resnet20") == 0
    text = capsys.readouterr().out
    assert text == export_named("resnet20").csv
    first = text.splitlines()[1]
    assert first == "conv1, 34, 34, 3, 3, 3, 16, 1,"  # 32 pixels and one of padding on each side


def test_export_says_what_the_format_cannot(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.aDP = nn.Conv2d(2, 4, 3, stride=(2, 1), dilation=2)
            self.bn = nn.BatchNorm2d(4)
            self.unused = nn.Linear(3, 3)
            self.rows = nn.Linear(5, 6)

        def forward(self, x):
            y = self.bn(self.aDP(x))
            return self.rows(self.rows(torch.zeros(1, 7, 5))[..., :5]) + y.sum()

    model = Odd().train()
    exported = export_topology(model, (2, 11, 12))
    assert model.training
    assert model.bn.training
    assert float(model.bn.running_mean.abs().sum()) == 0
    path = tmp_path / "odd.csv"
    path.write_text(exported.csv)
    layers = read_topology(path).layers
    assert [(layer.name, layer.m, layer.n, layer.k) for layer in layers] == [
        ("adp", 4 * 8, 4, 18),
        ("rows", 7, 6, 5),
        ("rows", 7, 6, 5),
    ]
    notes = " ".join(exported.notes)
    for word in ("dilation", "strides", "written as adp", "unused: not reached"):
        assert word in notes
    with pytest.raises(sysmt.ConfigError, match="nothing to export"):
        export_topology(nn.ReLU(), (3,))


class Everything(nn.Module):
    """Each kind of layer that a forward multiplies in, and products that no module stands for."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 8, 3, stride=2, groups=1)
        self.row = nn.Conv1d(8, 6, 5, stride=2, groups=2)
        self.lstm = nn.LSTM(6, 7, batch_first=True)
        self.attention = nn.MultiheadAttention(7, 1, batch_first=True)
        self.volume = nn.Conv3d(1, 2, (1, 1, 3))
        self.weight = nn.Parameter(torch.zeros(4, 8, 2, 2))
        self.unused = nn.Conv1d(1, 1, 1)

    def forward(self, x):
        x = self.up(x)  # 8 x 11 x 11
        pairs = torch.nn.functional.conv2d(x.expand(2, -1, -1, -1), self.weight)
        x = self.row(x.flatten(2)).transpose(1, 2)  # 121 pixels, 59 outputs
        x = self.lstm(x)[0]
        x = self.attention(x, x, x, need_weights=False)[0]
        y = self.volume(x[None, :, :1])
        return (x @ x.transpose(1, 2)).sum() + y.sum() + pairs.sum()


def test_every_product_is_exported_as_the_gemm_that_it_is(tmp_path):
    model = Everything()
    exported = export_topology(model, (3, 5, 5))
    path = tmp_path / "net.csv"
    path.write_text(exported.csv)
    layers = read_topology(path).layers
    assert [(layer.name, layer.m, layer.n, layer.k) for layer in layers] == [
        ("up", 5 * 5, 8 * 3 * 3, 3),
        ("Everything_image0", 10 * 10, 4, 8 * 2 * 2),
        ("Everything_image1", 10 * 10, 4, 8 * 2 * 2),
        ("row_group0", 59, 3, 4 * 5),
        ("row_group1", 59, 3, 4 * 5),
        ("lstm.weight_ih_l0", 59, 4 * 7, 6),
        *[("lstm.weight_hh_l0", 1, 4 * 7, 7)] * 59,
        ("attention.in_proj", 59, 3 * 7, 7),
        ("attention.QK", 59, 59, 7),
        ("attention.AV", 59, 7, 59),
        ("attention.out_proj", 59, 7, 7),
        ("matmul0", 59, 59, 7),
    ]
    assert exported.notes == (
        "volume: a convolution over three axes cannot be written; 30 MACs are left out",
        "unused: not reached by the forward, not exported",
    )
    assert sum(layer.macs for layer in layers) == exported.macs
    # Where an attention or an LSTM has a kernel of its own, the counter does not see into it.
    shapes = copy.deepcopy(model).to("meta")
    assert exported.macs + exported.left_out_macs == counted_macs(shapes, 3, 5, 5)
    assert export_topology(shapes, (3, 5, 5)).macs == exported.macs


def counted_macs(model, *shape):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *shape, device=next(model.parameters()).device))
    return counter.get_total_flops() // 2


SOME = ("googlenet", "mobilenet_v2", "regnet_y_400mf", "resnext50_32x4d", "swin_t", "vit_b_16")
ALL = [
    pytest.param(name, marks=[] if name in SOME else pytest.mark.slow)
    for name in model_names()
    if not name.startswith("digits")
]


@pytest.mark.parametrize("name", ALL)
def test_exported_and_noted_macs_are_the_networks(name, tmp_path):
    exported = export_named(name)
    side = input_size(name)
    assert exported.macs + exported.left_out_macs == counted_macs(build_shapes(name), 3, side, side)
    assert not any("not reached" in note for note in exported.notes)
    (tmp_path / "net.csv").write_text(exported.csv)
    assert sum(layer.macs for layer in read_topology(tmp_path / "net.csv").layers) == exported.macs


# -- trace -------------------------------------------------------------------------------------------


def test_trace_of_a_layer(tmp_path, capsys):
    out = tmp_path / "trace"
    args = (
        "--layer",
        "layer2.0.conv1",
        "--threads",
        4,
        "--rows",
        8,
        "--cols",
        4,
        "--tile",
        "1,2",
        "--image",
        2,
    )
    assert run("trace", *RANDOM, *args, "--out", out) == 0
    names = {"trace.csv", "trace.vcd", "pes.csv", "collisions.png", "utilization.png", "trace.toml"}
    assert {path.name for path in out.iterdir()} == names
    cycles, pes = pd.read_csv(out / "trace.csv"), pd.read_csv(out / "pes.csv")
    assert len(pes) == 32
    assert cycles["busy_pes"].sum() == pes["slots"].sum()
    assert cycles["collisions"].sum() == pes["collisions"].sum()
    assert sum(1 for _ in tokenize(io.BytesIO((out / "trace.vcd").read_bytes()))) > 1000
    for plot in ("collisions.png", "utilization.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
    assert "layer2.0.conv1, tile 1,2" in capsys.readouterr().out


def test_trace_of_matrices(tmp_path):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (5, 9)).astype(np.uint8), rng.integers(-128, 128, (9, 5)).astype(np.int8)
    np.save(tmp_path / "a.npy", a)
    np.save(tmp_path / "b.npy", b)
    out = tmp_path / "out"
    args = ("--a", tmp_path / "a.npy", "--b", tmp_path / "b.npy", "--rows", 4, "--cols", 4, "--policy", "A")
    assert run("trace", *args, "--out", out, "--no-plots", "--cycles", "3,6") == 0
    assert not list(out.glob("*.png"))
    expected = trace_tile(a, b, sysmt.ArrayConfig(4, 4, 2, "A"))
    text = io.StringIO()
    expected.write_csv(text)
    assert (out / "trace.csv").read_text() == text.getvalue()
    wave = io.StringIO()
    expected.write_vcd(wave, 3, 6)
    assert (out / "trace.vcd").read_text() == wave.getvalue()
    rows = list(csv.DictReader((out / "pes.csv").open()))
    assert [int(row["collisions"]) for row in rows] == expected.activity.collisions_rc.ravel().tolist()


def test_edge_tiles_have_pes_without_slots():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (5, 9)).astype(np.uint8), rng.integers(-128, 128, (9, 5)).astype(np.int8)
    table = pe_table(trace_tile(a, b, sysmt.ArrayConfig(4, 4, 1), (1, 1)).activity)
    assert (table["slots"] > 0).sum() == 1
    assert np.isfinite(table["collision_rate"]).all()


@pytest.mark.parametrize(
    ("args", "what"),
    [
        ((), "either --layer NAME or both"),
        (("--layer", "x", "--a", "a.npy", "--b", "b.npy"), "either --layer NAME or both"),
        (("--a", "a.npy"), "either --layer NAME or both"),
        (("--a", "a.npy", "--b", "b.npy"), "a.npy cannot be read"),
        (("--layer", "x", "--tile", "1"), "tile='1' is no pair"),
        (("--layer", "x", "--cycles", "a,b"), "cycles='a,b' is no pair"),
        ((*RANDOM, "--layer", "layer2.0.conv3"), "did you mean 'layer2.0.conv"),
        ((*RANDOM, "--layer", "layer2.0.conv1", "--image", 10**6), "image=1000000 is not there"),
        ((*RANDOM, "--layer", "layer2.0.conv1", "--group", 1), "group=1"),
        ((*RANDOM, "--layer", "conv1"), "stays in float"),
        ((*RANDOM, "--layer", "layer2.0.conv1", "--tile", "99,0"), "tile 99,0 is not there"),
    ],
)
def test_wrong_trace_commands(args, what, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("trace", *args) == 2
    assert what in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
