"""What goes before a forward: copies, arguments, forwards of a layer's own, counts, and how it leaves."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import sysmt
from sysmt.nn.torchvision_import import torchvision

FOUR = sysmt.ArrayConfig(threads=4, rows=4, cols=4)


def network(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.LazyLinear(4)]
    net = nn.Sequential(*layers).eval()
    net(images())
    return net


def images(count=2, seed=1):
    return torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


class SameConv(nn.Conv2d):
    """Pads as TensorFlow does: in its forward, more below and right."""

    def forward(self, x):
        rows, cols = (
            max((-(-size // stride) - 1) * stride + kernel - size, 0)
            for size, stride, kernel in zip(x.shape[-2:], self.stride, self.kernel_size, strict=True)
        )
        x = F.pad(x, (cols // 2, cols - cols // 2, rows // 2, rows - rows // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


# -- copies ------------------------------------------------------------------------------------


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    return average.module.eval()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, saved_and_loaded, lambda m: pickle.loads(pickle.dumps(m)), averaged]
)
def test_a_copy_by_any_means_is_a_plain_float_network(copied):
    net = network()
    expected = net(images())
    with sysmt.attach(net, FOUR) as sim:
        sim.calibrate([images()], 2)
        simulated = net(images())
        twin = copied(net)
        assert torch.equal(twin(images()), expected)
        assert not torch.equal(simulated, expected)
        assert sim.images == 2
        with sysmt.attach(twin, FOUR) as other:  # a copy can be attached, beside the original
            other.calibrate([images()], 2)
            assert torch.equal(twin(images()), simulated)
    assert torch.equal(twin(images()), expected)


def test_a_simulation_says_that_it_cannot_be_copied():
    with sysmt.attach(network(), FOUR) as sim:
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(sysmt.ConfigError, match="copy its model"):
                copied(sim)


# -- forwards of a layer's own -----------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, x, scale=1.0):
        return F.linear(x, self.weight, self.bias) * scale


class ChannelsLastLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


class Calling(nn.Module):
    def __init__(self, call, fc):
        super().__init__()
        self.conv, self.fc, self.call = nn.Conv2d(3, 8, 3), fc, call

    def forward(self, x):
        return self.call(self.fc, F.relu(self.conv(x)))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(
    ("call", "fc"),
    [
        (lambda fc, h: fc(h.mean((2, 3)), 0.5), Scaled(8, 4)),
        (lambda fc, h: fc(h.mean((2, 3)), scale=0.5), Scaled(8, 4)),
        (lambda fc, h: fc(x=h.mean((2, 3))), Scaled(8, 4)),
        (lambda fc, h: fc(h), ChannelsLastLinear(8, 4)),
        (lambda fc, h: fc(input=h.mean((2, 3))), nn.Linear(8, 4)),
    ],
)
def test_arguments_pass_through_as_they_came(call, fc, linear):
    net = Calling(call, fc).eval()
    expected = net(images())
    with sysmt.attach(net, sysmt.ArrayConfig(threads=1), first=True, linear=linear) as sim:
        sim.calibrate([images()], 2)
        y = net(images())
        assert y.shape == expected.shape
        assert (y - expected).abs().max() < 0.05 * expected.abs().max()
        row = sim.report().set_index("name").loc["fc"]
        assert row["macs"] == expected.numel() * 8
        assert row["images"] == 2
        assert row["threads"] == int(linear)


@settings(deadline=None, max_examples=40)
@given(
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    kernel=st.sampled_from([1, 2, 3, 5]),
    stride=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    batch=st.integers(1, 3),
    threads=st.sampled_from([1, 2, 4]),
    channels_last=st.booleans(),
    seed=st.integers(0, 999),
)
def test_padding_of_its_own_equals_the_padded_convolution(
    size, kernel, stride, groups, batch, threads, channels_last, seed
):
    torch.manual_seed(seed)
    own = SameConv(4 * groups, 6, kernel, stride=stride, groups=groups)
    x = torch.rand(batch, 4 * groups, *size)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    rows, cols = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in size)
    padded = F.pad(x, (cols // 2, cols - cols // 2, rows // 2, rows - rows // 2))
    plain = nn.Conv2d(4 * groups, 6, kernel, stride=stride, groups=groups)
    plain.load_state_dict(own.state_dict())
    results = []
    for module, given_x in ((own, x), (plain, padded)):
        net = nn.Sequential(module)
        with sysmt.attach(net, sysmt.ArrayConfig(threads=threads), first=True) as sim:
            sim.set_ranges({"0": 1 / 255})
            results.append((net(given_x).detach(), sim.report().iloc[0]))
    (y, row), (expected, expected_row) = results
    assert torch.equal(y, expected)
    assert row.equals(expected_row)


def test_a_forward_that_convolves_twice_has_two_layers():
    class Twice(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(self._conv_forward(x, self.weight, None).relu(), -self.weight, None)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Twice(4, 4, 3, bias=False)).eval()
    with sysmt.attach(net, FOUR) as sim:
        sim.calibrate([images()], 2)
        net(images())
        report = sim.report().set_index("name")
        assert report["threads"].to_dict() == {"0": 0, "2": 4, "2#2": 4}
        assert report["macs"].to_dict() == {"0": 2 * 49 * 27 * 4, "2": 2 * 25 * 36 * 4, "2#2": 2 * 9 * 36 * 4}
        captured = [sim.capture(name) for name in ("2", "2#2")]
        y = net(images())
        assert np.array_equal(captured[0].b_kn, -captured[1].b_kn)
        result = sysmt.simulate_gemm(captured[1].a_mk, captured[1].b_kn, captured[1].config)
        assert result.out_mn.shape == (9, 4)
        ranges = sim.ranges()
    with sysmt.attach(net, FOUR) as again:
        again.calibrate([images()], 2)
        assert again.ranges() == ranges
        assert torch.equal(net(images()), y)


def test_a_computed_weight_is_read_once_a_forward():
    draws = []

    class Noisy(nn.Module):
        def forward(self, weight):
            draws.append(1)
            return weight + 0.1 * torch.randn_like(weight)

    conv = nn.Conv2d(4, 8, 3, bias=False)
    parametrize.register_parametrization(conv, "weight", Noisy())
    net, x = nn.Sequential(conv).eval(), torch.rand(1, 4, 5, 5)
    for errors in (False, True):
        with sysmt.attach(net, FOUR, first=True, errors=errors) as sim:
            sim.calibrate([x], 1)
            captured = sim.capture("0")
            draws.clear()
            net(x)
            assert len(draws) == 1
            largest = np.abs(captured.b_kn.astype(int)).max(axis=0)
            assert (largest == 127).all()  # the scales are those of the very draw that gave the codes


# -- counts ------------------------------------------------------------------------------------


def test_float_layers_are_counted_from_what_they_gave():
    own = SameConv(8, 8, 3, stride=2, groups=8)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), own, nn.ReLU(), nn.Conv2d(8, 6, 1)).eval()
    x = torch.rand(2, 3, 12, 12)
    with sysmt.attach(net, FOUR) as sim:
        sim.calibrate([x], 2)
        net(x)
        row = sim.report().set_index("name").loc["2"]
        assert (row["M"], row["macs"], row["reason"]) == (
            25,
            2 * 8 * 25 * 9,
            "depthwise convolution (depthwise=False)",
        )
        macs = sim.report()["macs"]
        assert sim.network_speedup == macs.sum() / (macs[0] + macs[1] + macs[2] / 4)


def test_attributes_changed_after_attach_are_followed():
    net = network()[:3]
    with sysmt.attach(net, FOUR) as sim:
        sim.calibrate([images()], 2)
        net[0].stride = (2, 2)
        net[2].padding = (1, 1)
        y = net(images())
        assert y.shape == (2, 6, 4, 4)
        assert sim.report()["M"].tolist() == [16, 16]
        assert sim.report()["macs"].tolist() == [2 * 16 * 27 * 8, 2 * 16 * 72 * 6]


@pytest.mark.parametrize("scales", [None, 0.01, np.full(8, 0.01)])
def test_channels_that_were_cut_while_attached(scales):
    net = network()[:3]
    with sysmt.attach(net, FOUR, first=True) as sim, torch.no_grad():
        sim.calibrate([images()], 2)
        sim.set_weight_scales({"0": scales})
        net(images())
        net[0].weight, net[0].bias = (
            nn.Parameter(net[0].weight[:5].clone()),
            nn.Parameter(net[0].bias[:5].clone()),
        )
        net[0].out_channels = net[2].in_channels = 5
        net[2].weight = nn.Parameter(net[2].weight[:, :5].clone())
        if np.ndim(scales):
            with pytest.raises(sysmt.ConfigError, match="'0' has 5 output channels now.*set for 8"):
                net(images())
            return
        sim.reset()
        assert net(images()).shape == (2, 6, 5, 5)
        assert sim.report()["macs"].tolist() == [2 * 49 * 27 * 5, 2 * 25 * 45 * 6]


@pytest.mark.parametrize("first", [False, True])
def test_a_forward_that_failed_counts_nothing(first):
    net = network()[:3]
    with sysmt.attach(net, FOUR, first=first) as sim:
        sim.calibrate([images()], 2)
        with pytest.raises((RuntimeError, sysmt.OperandError)):
            net(torch.rand(2, 3, 2, 2))  # smaller than the kernel
        assert sim.report()["macs"].tolist() == [0, 0]
        assert sim.report()["images"].tolist() == [0, 0]
        assert sim.cycles == sim.images == 0


# -- what torch may do with a network ----------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 16, 3, 3), nn.Linear(16, 5)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)

    def forward(self, x):
        return self.head(self.encoder(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.filterwarnings("ignore")
def test_the_attention_fast_path_stays_off_until_the_last_simulation_ends():
    torch.manual_seed(0)
    nets = [Encoder().eval(), Encoder().eval()]
    sims = [sysmt.attach(net, FOUR, linear=True) for net in nets]
    for sim in sims:
        sim.calibrate([images()], 2)
    with torch.no_grad():
        before = nets[1](images())
        counted = sims[1].report()["images"].tolist()
        sims[0].detach()
        sims[1].reset()
        assert torch.equal(nets[1](images()), before)
        assert sims[1].report()["images"].tolist() == counted
        torch.backends.mha.set_fastpath_enabled(True)  # somebody else's doing
        sims[1].reset()
        assert torch.equal(nets[1](images()), before)
        assert sims[1].report()["images"].tolist() == counted
    sims[1].detach()
    sims[1].detach()
    assert torch.backends.mha.get_fastpath_enabled()


def forward_mode(model, x):
    with torch.autograd.forward_ad.dual_level():
        return model(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.parametrize(
    "run",
    [
        torch.jit.trace,
        lambda model, x: torch.jit.script(model),
        lambda model, x: torch.export.export(model, (x,)),
        lambda model, x: torch.func.vmap(model)(x[None]),
        lambda model, x: torch.func.jvp(model, (x,), (x,)),
        lambda model, x: torch.func.grad(lambda x: model(x).sum())(x),
        forward_mode,
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_the_array_cannot_follow_is_refused(run):
    net = network()
    with sysmt.attach(net, FOUR) as sim:
        sim.calibrate([images()], 2)
        expected = net(images())
        with pytest.raises(sysmt.UnsupportedLayerError, match="detach"):
            run(net, images())
        assert torch.equal(net(images()), expected)


@pytest.mark.filterwarnings("ignore")
def test_traced_and_data_parallel_networks_run_as_they_are():
    net = network()
    with sysmt.attach(net, FOUR) as sim:
        sim.calibrate([images()], 2)
        expected = net(images())
        for wrapped in (
            nn.DataParallel(net),
            torch.fx.symbolic_trace(net),
            torch.compile(net, backend="eager"),
        ):
            assert torch.equal(wrapped(images()), expected)
    traced = torch.fx.symbolic_trace(network())
    with sysmt.attach(traced, FOUR) as sim:
        sim.calibrate([images()], 2)
        assert torch.equal(traced(images()), expected)


def test_compiled_parts_without_layers_are_left_alone():
    net = network()
    net[1] = torch.jit.script(nn.SiLU())
    with sysmt.attach(net, FOUR) as sim:
        sim.calibrate([images()], 2)
        net(images())
        assert sim.report()["threads"].tolist() == [0, 4, 0]
    net[1] = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1)))
    with pytest.warns(UserWarning, match=r"'1\.0' is compiled by TorchScript"):
        sysmt.attach(net, FOUR).detach()


def test_attach_is_all_or_nothing(monkeypatch):
    net = network()
    expected = net(images())
    for target in ("sysmt.nn.array.simulation.known_forward", "sysmt.nn.array.simulation.RootWatch"):

        def failing(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(target, failing)
            with pytest.raises(KeyboardInterrupt):
                sysmt.attach(net, FOUR)
        assert not any("forward" in module.__dict__ for module in net.modules())
        assert torch.equal(net(images()), expected)
    sysmt.attach(net, FOUR).detach()


# -- leaving, and what came meanwhile ----------------------------------------------------------


def test_detach_below_another_tools_wrapper_ends_the_simulation():
    net = network()
    expected = net(images())
    sim = sysmt.attach(net, FOUR)
    sim.calibrate([images()], 2)
    inner = net[2].forward
    net[2].forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert not torch.equal(net(images()), expected)
    sim.detach()
    counted = sim.report()
    assert torch.equal(net(images()), expected)
    assert sim.report().equals(counted)


@pytest.mark.parametrize(
    "use",
    [
        lambda sim: sim.calibrate([images()], 2),
        lambda sim: sim.set_threads(2),
        lambda sim: sim.set_ranges({"2": 1.0}),
        lambda sim: sim.set_weight_scales({"2": 1.0}),
        lambda sim: sim.capture("2"),
        lambda sim: sim.reconfigure(policy="S"),
    ],
)
def test_a_detached_simulation_says_so(use):
    net = network()
    with sysmt.attach(net, FOUR) as sim:
        sim.calibrate([images()], 2)
        net(images())
    with pytest.raises(sysmt.ConfigError, match="detached; attach the model again"):
        use(sim)
    assert sim.images == 2
    assert sim.speedup == 4.0


def test_layers_that_come_after_attach_are_named_once():
    net = network()
    with sysmt.attach(net, FOUR) as sim:
        sim.calibrate([images()], 2)
        net[2] = nn.Conv2d(8, 6, 3)
        with pytest.warns(UserWarning, match="added or replaced after attach, such as '2'"):
            net(images())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            net(images())


# -- which layers ------------------------------------------------------------------------------


class Block(nn.Sequential):
    pass


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["1"], ["2", "3.0"]),
        ("1", ["2", "3.0"]),
        (["1.0"], ["1.2", "2", "3.0"]),
        (["*.0"], ["1.2", "2"]),
        (["?.?"], ["2"]),
        (Block, ["2"]),
        ([nn.ReLU6, "1", "3"], ["2"]),
        (lambda name, module: module.kernel_size == (3, 3), ["2", "3.0"]),
    ],
)
def test_exclude_takes_blocks_patterns_types_and_functions(exclude, left):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        Block(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)),
        nn.Conv2d(8, 8, 1),
        Block(nn.Conv2d(8, 8, 1)),
    ).eval()
    if isinstance(exclude, list) and nn.ReLU6 in exclude:
        with pytest.raises(sysmt.ConfigError, match="ReLU6.*leaves out no layer"):
            sysmt.attach(net, exclude=exclude)
        exclude = exclude[1:]
    with sysmt.attach(net, FOUR, exclude=exclude) as sim:
        sim.calibrate([images()], 2)
        assert [layer.name for layer in sim.simulated()] == left


@pytest.mark.parametrize("name", ["1", "1.0", "x*"])
def test_an_exclusion_of_nothing_is_an_error(name):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Block(nn.BatchNorm2d(8)), nn.Conv2d(8, 8, 1))
    with pytest.raises(sysmt.ConfigError, match=r"exclude names"):
        sysmt.attach(net, exclude=[name])


def test_settings_of_one_element_count_for_rows_and_columns():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=(2,)), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=(1,), dilation=(1,))
    ).eval()
    x = images()
    with sysmt.attach(net, FOUR, first=True) as sim:
        sim.calibrate([x], 2)
        assert net(x).shape == (2, 6, 4, 4)
        assert sim.report()["M"].tolist() == [16, 16]


@pytest.mark.parametrize("function", [F.gelu, F.relu, torch.relu, nn.ReLU(), nn.ReLU6()])
def test_only_relu_is_fused_as_relu(function):
    torch.manual_seed(0)
    block = torchvision.models.resnet.BasicBlock(4, 4)
    del block.relu
    block.relu = function
    net = nn.Sequential(nn.Conv2d(3, 4, 3), block).eval()
    with sysmt.attach(net, FOUR) as sim, torch.no_grad():
        sim.calibrate([images()], 2)
        fused = net(10 * images())
        sim.fuse = False
        assert torch.equal(fused, net(10 * images()))


def test_inputs_of_every_kind_run_or_are_refused_by_name():
    net = nn.Sequential(nn.Conv2d(3, 8, 3)).eval()
    complex_ = torch.complex(torch.rand(1, 3, 9, 9), -torch.rand(1, 3, 9, 9))
    with sysmt.attach(net, FOUR, first=True) as sim:
        sim.calibrate([images()], 2)
        negative = complex_.conj().imag
        assert negative.is_neg()
        assert torch.equal(net(negative), net(negative.resolve_neg()))
        for x, error in (
            (images().to_sparse(), sysmt.UnsupportedLayerError),
            (None, sysmt.OperandError),
            ([images()], sysmt.OperandError),
            (images().to("meta"), sysmt.UnsupportedLayerError),
        ):
            with pytest.raises(error, match="'0'"):
                net(x)
