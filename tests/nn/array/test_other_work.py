"""Work that no module's stand-in does: functional calls, attention, and what stays in float, all counted."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sysmt
from sysmt.nn.networks.models import build_model, build_shapes
from sysmt.nn.torchvision_import import torchvision

FOUR = sysmt.ArrayConfig(threads=4, rows=4, cols=4)


def images(count=2, channels=3, side=8, seed=1):
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


class Functional(nn.Module):
    """A network without any convolution or Linear of torch's."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.table = nn.Parameter(torch.randn(5, 6))

    def forward(self, x):
        standardised = (self.kernel - self.kernel.mean()) / self.kernel.std()
        x = F.conv2d(x, self.kernel, padding=1).relu()
        x = torch.ops.aten.conv2d.default(x, standardised.repeat(1, 2, 1, 1)).relu()
        x = torch.conv2d(input=x, weight=standardised.repeat(1, 2, 1, 1), stride=2)
        return F.linear(x.mean((2, 3)), self.table)


class Modules(nn.Module):
    """The same with modules."""

    def __init__(self, other):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.second = nn.Conv2d(6, 6, 3, bias=False)
        self.third = nn.Conv2d(6, 6, 3, stride=2, bias=False)
        self.head = nn.Linear(6, 5, bias=False)
        kernel = other.kernel.detach()
        standardised = ((kernel - kernel.mean()) / kernel.std()).repeat(1, 2, 1, 1)
        weights = (kernel, standardised, standardised, other.table.detach())
        for layer, weight in zip(self.children(), weights, strict=True):
            layer.weight = nn.Parameter(weight.clone())

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu()
        return self.head(self.third(x).mean((2, 3)))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_functional_calls_compute_what_modules_compute(first, linear):
    torch.manual_seed(0)
    functional = Functional().eval()
    modules = Modules(functional).eval()
    outputs, reports = [], []
    for net, options in ((functional, {"functional": True}), (modules, {})):
        with sysmt.attach(net, FOUR, first=first, linear=linear, **options) as sim:
            sim.calibrate([images()], 2)
            for count in (1, 3):  # names are the same in every forward
                outputs.append(net(images(count)).detach())
            reports.append(sim.report())
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert reports[0]["name"].tolist() == ["kernel", "conv2d", "conv2d#2", "table"]
    assert reports[0].drop(columns="name").equals(reports[1].drop(columns="name"))


def test_functional_calls_are_rows_in_float_unless_they_are_asked_for():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), Functional()).eval()
    expected = net(images())
    with sysmt.attach(net, FOUR, exclude=["1"], first=True) as sim:
        sim.calibrate([images()], 2)
        net(images())
        rows = sim.report().set_index("name")
        assert rows.loc["2.kernel", "reason"] == "functional call (functional=False)"
        assert rows.loc["2.table", "macs"] == 2 * 30
        assert rows["threads"].tolist() == [4, 0, 0, 0, 0, 0]
    with sysmt.attach(net, FOUR, functional=True, exclude=["1"], first=True) as sim:
        sim.calibrate([images()], 2)
        net(images())
        assert sim.report().set_index("name")["threads"].to_dict() == {
            "0": 4, "1": 0, "2.kernel": 4, "2.conv2d": 4, "2.conv2d#2": 4, "2.table": 0,
        }  # fmt: skip
    assert torch.equal(net(images()), expected)


# -- attention ---------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, batch_first, own_memory):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.own_memory, self.batch_first = own_memory, batch_first

    def forward(self, x):
        tokens = self.patch(x).flatten(2)
        tokens = tokens.transpose(1, 2) if self.batch_first else tokens.permute(2, 0, 1)
        memory = tokens if self.own_memory else tokens.flip(0)
        return self.attention(tokens, memory, memory, need_weights=False)[0]


@pytest.mark.parametrize("own_memory", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_projections_of_attention_are_gemms_of_an_image(batch_first, own_memory):
    torch.manual_seed(0)
    net = Attention(batch_first, own_memory).eval()
    expected = net(images())
    names = ["patch", "attention.out_proj", "attention.in_proj"]
    names += [] if own_memory else ["attention.in_proj#2"]
    with sysmt.attach(net, FOUR, linear=True) as sim, torch.no_grad():
        sim.calibrate([images()], 2)
        captured = [sim.capture(name, image=1) for name in names[1:]]
        whole = net(images())
        rows = sim.report().set_index("name")
        assert [name for name in rows.index if "matmul" not in name] == names
        assert rows.loc["attention.out_proj", ["M", "N", "K", "images"]].tolist() == [16, 8, 8, 2]
        columns = rows.loc[names[2:], "N"].tolist()
        assert columns == ([24] if own_memory else [8, 16])
        assert (rows.loc[names[1:], "threads"] == 4).all()
        for gemm in captured:
            assert gemm.a_mk.shape[0] == 16
            result = sysmt.simulate_gemm(gemm.a_mk, gemm.b_kn, gemm.config, engine="reference")
            assert result.stats.collisions > 0
        alone = [net(images()[[i]]) for i in range(2)] if own_memory else None
        assert (whole - expected).abs().max() < 0.2 * expected.abs().max()
    if alone is not None:  # images never share a tile, and the batch size changes no bit
        assert torch.equal(whole, torch.cat(alone, 0 if batch_first else 1))


@pytest.mark.parametrize("threads", [1, 4])
def test_attention_in_float_passes_through_bit_for_bit(threads):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Flatten(2), nn.Conv1d(8, 8, 1), layer).eval()
    layer.norm_first = True

    class Tokens(nn.Module):
        def forward(self, x):
            return x.transpose(1, 2)

    net.insert(3, Tokens())
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = net(images())
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with sysmt.attach(net, sysmt.ArrayConfig(threads=threads), functional=True) as sim:
        sim.calibrate([images()], 2)
        assert torch.equal(net(images()), expected)
        reasons = sim.report().set_index("name")["reason"]
        assert reasons["2"] == "Conv1d is not simulated"
        assert reasons["4.self_attn.in_proj"] == "fully connected layer (linear=False)"
        assert reasons["4.self_attn.matmul"] == "product of activations"


# -- everything is counted ----------------------------------------------------------------------


class Odd(nn.Module):
    """A little of everything that multiplies."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
        self.line = nn.Conv1d(6, 4, 3)
        self.volume = nn.Conv3d(1, 2, 3)
        self.bilinear = nn.Bilinear(4, 4, 3)
        self.memory = nn.LSTM(4, 5, batch_first=True)
        self.lazy = nn.LazyLinear(7)

    def forward(self, x):
        x = self.up(self.depthwise(self.conv(x)))
        tokens = self.line(x.flatten(2))
        y = self.memory(tokens.transpose(1, 2))[0]
        z = torch.einsum("bct,bdt->bcd", tokens, tokens) + tokens @ tokens.transpose(1, 2)
        v = self.volume(x.unsqueeze(1)).mean((1, 2, 3, 4))
        b = self.bilinear(z.mean(1), z.mean(2))
        return self.lazy(torch.cat([y.mean(1), b, v[:, None], torch.addmm(b, b, torch.eye(3))], 1))


def counted_macs(net, x, onednn=True, **options):
    """Macs of one forward by torch's own counter, and the report of the same forward."""
    torch.backends.mha.set_fastpath_enabled(False)
    # The counter knows attention and LSTMs by the products they are made of, not by kernels of the CPU's own.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter, torch.backends.mkldnn.flags(enabled=onednn):
            net(x)
        torch.backends.mha.set_fastpath_enabled(True)
        with sysmt.attach(net, FOUR, **options) as sim:
            sim.calibrate([x], len(x))
            net(x)
            return counter.get_total_flops() // 2, sim.report()


@pytest.mark.parametrize("options", [{}, {"linear": True, "first": True, "functional": True}])
def test_a_little_of_everything_is_counted(options):
    torch.manual_seed(0)
    net = Odd().eval()
    net.depthwise.requires_grad_(False)
    macs, report = counted_macs(net, images(), onednn=False, depthwise=True, **options)
    assert report["macs"].sum() == macs
    rows = report.set_index("name")
    # A transposed convolution: each of 64 input pixels meets the 3 x 3 x 3 weights of its group, 2 x 2 times.
    assert rows.loc["up", "macs"] == 2 * 64 * 4 * 27
    assert rows.loc["up", "reason"] == "ConvTranspose2d is not simulated"
    assert rows.loc["line", "reason"] == "Conv1d is not simulated"
    assert (rows["reason"] == "product of activations").sum() >= 3
    assert rows.loc["lazy", "macs"] == 2 * 7 * 12


FAST = {
    "resnet18": 64, "mobilenet_v3_small": 64, "shufflenet_v2_x0_5": 64, "squeezenet1_1": 64, "mnasnet0_5": 64,
    "efficientnet_b0": 64, "convnext_tiny": 32, "vit_b_32": 224, "swin_t": 64, "regnet_y_400mf": 64,
}  # fmt: skip


@pytest.mark.parametrize("name", FAST)
def test_macs_of_the_report_are_those_of_torchs_counter(name):
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(weights=None, num_classes=10).eval()
    macs, report = counted_macs(net, images(1, side=FAST[name]), linear=True)
    assert report["macs"].sum() == macs


LARGE = 50_000_000
"""Parameters of networks that are made of the same blocks as smaller ones of their family."""


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models(torchvision.models))
def test_macs_of_every_torchvision_network(name):
    size = sum(parameter.numel() for parameter in build_shapes(name).parameters())
    if size > LARGE and not os.environ.get("SYSMT_ALL_NETWORKS"):
        pytest.skip(f"{size:,} parameters, in the blocks of smaller networks; SYSMT_ALL_NETWORKS=1 runs it")
    torch.manual_seed(0)
    net = build_model(name, 10).eval()
    side = 224 if name.startswith(("vit", "maxvit")) else 64
    side = {"inception_v3": 139, "vit_h_14": 224}.get(name, side)
    macs, report = counted_macs(net, images(1, side=side), linear=True)
    assert report["macs"].sum() == macs


TIMM = {
    "tf_efficientnet_lite0": 96, "nf_regnet_b0": 96, "mixnet_s": 96, "seresnet50": 96, "eca_nfnet_l0": 96,
    "vit_tiny_patch16_224": 224, "swin_tiny_patch4_window7_224": 224, "mobilevit_xxs": 96, "levit_128s": 224,
    "lambda_resnet26t": 96,
}  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_macs_of_timms_networks_are_counted_without_a_word_of_exclude(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10).eval()
    macs, report = counted_macs(net, images(1, side=TIMM[name]), linear=True)
    assert report["macs"].sum() == macs
    assert (report["threads"] > 0).sum() > 10


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_recurrent_layers_are_counted_by_their_formula(kind, options):
    """Whichever kernel torch takes: oneDNN's LSTM is one operation, which torch's own counter overlooks."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
            self.memory = kind(5, 6, batch_first=True, **options)

        def forward(self, x):
            return self.memory(self.conv2(self.conv(x)).flatten(2).transpose(1, 2))[0]

    torch.manual_seed(0)
    net, x = Net().eval(), images()
    directions = 2 if options else 1
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind] * 6
    inputs = [5, 6 * directions][: options.get("num_layers", 1)]
    expected = 2 * 16 * sum(directions * gates * (features + 6) for features in inputs)
    for context in (torch.no_grad, torch.enable_grad):
        with sysmt.attach(net, FOUR) as sim, context():
            sim.calibrate([x], 2)
            net(x)
            rows = sim.report()
        memory = rows[rows["name"].str.startswith("memory")]
        assert memory["macs"].sum() == expected
        assert set(memory["reason"]) == {f"{kind.__name__} is not simulated"}


def test_a_matrix_times_a_vector_is_counted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
            self.vector = nn.Parameter(torch.rand(80))

        def forward(self, x):
            return self.conv2(self.conv(x)).flatten(1) @ self.vector

    with sysmt.attach(Net().eval(), FOUR) as sim:
        sim.calibrate([images()], 2)
        sim.model(images())
        assert sim.report().set_index("name").loc["matmul", "macs"] == 2 * 80
