"""BatchNorm and ReLU done by the layer before them: no bit may differ from torch's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sysmt
from sysmt.errors import OperandError
from sysmt.nn import epilogue
from sysmt.nn.folding import fold_batchnorm
from sysmt.nn.models import build_model

CONTEXTS = [torch.no_grad, torch.inference_mode]


def images(batch: int = 2, channels: int = 3, size: int = 9) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """Give BatchNorm layers statistics of the model's own, weights of all signs and a zero of each sign."""
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = None
        if layer.affine:
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
            with torch.no_grad():
                layer.weight[0], layer.bias[0], layer.bias[-1] = 0, -0.0, 0
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def attached(model: nn.Module, x: Tensor, threads: int = 4, fuse: bool = True) -> sysmt.Simulation:
    simulation = sysmt.attach(model, sysmt.ArrayConfig(threads=threads), fuse=fuse)
    simulation.set_ranges(
        {layer.name: sysmt.ActivationRange(0.02, signed=True) for layer in simulation.simulated()}
    )
    return simulation


def bits(y: Tensor) -> Tensor:
    return y.contiguous().view(torch.int32)


def fused(simulation: sysmt.Simulation) -> dict[str, tuple[bool, bool]]:
    """Which of BatchNorm and ReLU each layer does itself in the next forward."""
    due = {layer.name: layer._plan.due() for layer in simulation.simulated()}
    return {name: (one.batch_norm is not None, one.relu) for name, one in due.items()}


def _lies(y: Tensor, memory_format: torch.memory_format) -> bool:
    return y.ndim == 4 and y.is_contiguous(memory_format=memory_format)


def check(model: nn.Module, x: Tensor, context=torch.inference_mode, threads: int = 4, forwards: int = 3):
    """Hold forwards with epilogues against one without; return what is fused in the end."""
    plain, quick = copy.deepcopy(model), copy.deepcopy(model)
    reference, simulation = attached(plain, x, threads, fuse=False), attached(quick, x, threads)
    with context():
        for _ in range(forwards):
            expected, y = plain(x.clone()), quick(x.clone())
            assert type(y) is Tensor
            assert torch.equal(bits(y), bits(expected))
            for memory_format in (torch.contiguous_format, torch.channels_last):
                assert _lies(y, memory_format) == _lies(expected, memory_format)
    assert simulation.report().equals(reference.report())
    return fused(simulation)


class Body(nn.Module):
    """A first convolution in float, one to be simulated, and whatever follows it."""

    def __init__(self, follow, channels: int = 21) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.other = nn.BatchNorm2d(channels)
        self.follow = follow

    def forward(self, x: Tensor) -> Tensor:
        return self.follow(self, self.conv(self.first(x)))


FOLLOWERS = {
    "batch norm and relu": (lambda net, y: F.relu(net.bn(y)), (True, True)),
    "in place": (lambda net, y: torch.relu_(net.bn(y)), (True, True)),
    "method": (lambda net, y: net.bn(y).relu(), (True, True)),
    "relu": (lambda net, y: torch.relu(y), (False, True)),
    "in place, its result left": (lambda net, y: (y.relu_(), y.clone())[1], (False, False)),
    "batch norm": (lambda net, y: net.bn(y) + 1, (True, False)),
    "batch norm, the model's output": (lambda net, y: net.bn(y), (True, False)),
    "another activation": (lambda net, y: F.hardswish(net.bn(y)), (True, False)),
    "add in place, then relu": (lambda net, y: F.relu(net.bn(y).add_(1)), (True, False)),
    "the sum is the output's": (lambda net, y: net.bn(y).__iadd__(y.shape[0]), (True, False)),
    "nothing": (lambda net, y: y, (False, False)),
    "something else": (lambda net, y: F.relu(net.bn(F.max_pool2d(y, 2))), (False, False)),
    "output used twice": (lambda net, y: F.relu(net.bn(y)) + y, (False, False)),
    "normalised values used twice": (lambda net, y: (lambda z: F.relu(z) - z)(net.bn(y)), (False, False)),
    "two norms": (lambda net, y: net.bn(y) + net.other(y), (False, False)),
    "norm of a norm": (lambda net, y: F.relu(net.other(net.bn(y))), (True, False)),
    "relu of a relu": (lambda net, y: F.relu(F.relu(net.bn(y))), (True, True)),
    "questions": (lambda net, y: F.relu(net.bn(y)) * y.shape[1] if y.dim() == 4 else y, (True, True)),
    "clone": (lambda net, y: F.relu(net.bn(y.clone())), (False, False)),
    "list": (lambda net, y: torch.cat([y, net.bn(y)]), (False, False)),
    "numpy": (lambda net, y: torch.from_numpy(y.numpy().copy()), (False, False)),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("follow", FOLLOWERS)
def test_whatever_follows(follow, context):
    function, expected = FOLLOWERS[follow]
    torch.manual_seed(0)
    model = trained(Body(function), images())
    assert check(model, images(), context)["conv"] == expected


@pytest.mark.parametrize("channels", [1, 3, 8, 16, 24, 40])
@pytest.mark.parametrize("size", [3, 9, 20])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_shapes(channels, size, memory_format):
    torch.manual_seed(0)
    x = images(3, 3, size).to(memory_format=memory_format)
    model = trained(Body(lambda net, y: F.relu(net.bn(y)), channels).to(memory_format=memory_format), x)
    assert check(model, x, threads=2)["conv"] == (True, True)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "googlenet", "densenet121", "mobilenet_v1"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_networks(name, memory_format):
    torch.manual_seed(0)
    x = images(2, 3, 32 if name == "resnet20" else 64).to(memory_format=memory_format)
    model = trained(build_model(name).to(memory_format=memory_format), x)
    done = list(check(model, x, threads=4).values())
    assert sum(relu for _, relu in done) >= len(done) // 2 - 1


def test_folded_networks_keep_relu():
    torch.manual_seed(0)
    model = trained(build_model("resnet20"), images(4, 3, 32))
    fold_batchnorm(model, images(2, 3, 32))
    done = list(check(model, images(2, 3, 32)).values())
    assert all(not norm for norm, _ in done)
    assert sum(relu for _, relu in done) == 9


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_norms_without_weights(affine, eps):
    torch.manual_seed(0)
    model = Body(lambda net, y: net.bn(y).relu())
    model.bn = nn.BatchNorm2d(21, affine=affine, eps=eps)
    assert check(trained(model, images()), images())["conv"] == (True, True)


def test_changed_statistics_are_followed():
    torch.manual_seed(0)
    model = trained(Body(lambda net, y: F.relu(net.bn(y))), images())
    plain = copy.deepcopy(model)
    attached(plain, images(), fuse=False)
    simulation = attached(model, images())

    def both(change) -> None:
        change(plain)
        change(model)
        with torch.no_grad():
            assert torch.equal(bits(model(images())), bits(plain(images())))

    with torch.no_grad():
        both(lambda net: None)
        both(lambda net: net.bn.running_mean.add_(1))
        both(lambda net: net.bn.weight.data.mul_(2))
        both(lambda net: setattr(net.bn, "bias", nn.Parameter(torch.ones(21))))
        both(lambda net: setattr(net.bn, "eps", 0.5))
        both(lambda net: net.train())
        both(lambda net: net.eval())
        both(lambda net: net.bn.running_var.fill_(float("inf")))
        both(lambda net: net.bn.running_var.fill_(0))
        both(lambda net: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}))
    assert fused(simulation)["conv"] == (True, True)


@pytest.mark.parametrize("name", ["conv", "bn"])
def test_hooks_see_what_torch_would_give_them(name):
    torch.manual_seed(0)
    model = trained(Body(lambda net, y: F.relu(net.bn(y))), images())
    plain, seen = copy.deepcopy(model), {}
    attached(plain, images(), fuse=False)
    attached(model, images())
    with torch.inference_mode():
        model(images())
        for net in (plain, model):
            getattr(net, name).register_forward_hook(
                lambda module, args, output, key=net: seen.update({key: (args[0], output)})
            )
            net(images())
    for wanted, got in zip(seen[plain], seen[model], strict=True):
        assert torch.equal(bits(got + 0), bits(wanted + 0))


class Fickle(nn.Module):
    """Does something else with the convolution's output once told so."""

    def __init__(self, spoils_input: bool = False) -> None:
        super().__init__()
        self.first, self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)
        self.changes, self.spoils_input = False, spoils_input

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.conv(x)
        if self.changes and self.spoils_input:
            x.zero_()
        return torch.tanh(y) if self.changes else F.relu(self.bn(y))


def test_an_output_used_otherwise_is_computed_again():
    torch.manual_seed(0)
    model = trained(Fickle(), images())
    plain = copy.deepcopy(model)
    reference, simulation = attached(plain, images(), fuse=False), attached(model, images())
    with torch.no_grad():
        for changes in (False, False, True, True, False):
            model.changes = plain.changes = changes
            assert torch.equal(bits(model(images())), bits(plain(images())))
    assert simulation.report().equals(reference.report())
    assert fused(simulation)["conv"] == (False, False)


@pytest.mark.parametrize(("context", "spoils_input"), [(torch.no_grad, True), (torch.inference_mode, False)])
def test_an_output_that_cannot_be_computed_again_is_an_error_once(context, spoils_input):
    torch.manual_seed(0)
    model = trained(Fickle(spoils_input), images())
    plain = copy.deepcopy(model)
    attached(plain, images(), fuse=False)
    attached(model, images())
    with context():
        model(images())
        model.changes = plain.changes = True
        with pytest.raises(
            OperandError, match=r"layer 'conv': .* run the forward again, or attach with fuse=False"
        ):
            model(images())
        assert torch.equal(bits(model(images())), bits(plain(images())))


class Scripted(nn.Module):
    """A compiled consumer beside the norm: it calls no torch function that Python could see."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)
        self.head = torch.jit.script(nn.Sequential(nn.ReLU(), nn.Flatten()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.first(x))
        return F.relu(self.bn(y)).flatten(1) + self.head(y)


@pytest.mark.parametrize("context", CONTEXTS)
def test_compiled_consumers(context):
    torch.manual_seed(0)
    model = Scripted()
    simulation = attached(model, images())
    model.eval()
    with context():
        got = [model(images()) for _ in range(2)]
        simulation.detach()
        attached(model, images(), fuse=False)
        expected = model(images())
    assert all(torch.equal(bits(y), bits(expected)) for y in got)


def test_modules_called_alone_give_plain_tensors():
    model = trained(Body(lambda net, y: F.relu(net.bn(y))), images())
    attached(model, images())
    with torch.inference_mode():
        model(images())
        assert type(model.conv(model.first(images()))) is Tensor


def test_outputs_in_containers_are_plain():
    model = Body(lambda net, y: {"y": [y], "normal": (net.bn(y),)}).eval()
    attached(model, images())
    with torch.no_grad():
        outputs = model(images())
    assert type(outputs["y"][0]) is Tensor
    assert type(outputs["normal"][0]) is Tensor


def test_a_failed_forward_leaves_nothing_behind():
    def fail(net: Body, y: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    model = Body(fail).eval()
    simulation = attached(model, images())
    with torch.no_grad(), pytest.raises(RuntimeError, match="on purpose"):
        model(images())
    assert not simulation.is_inside


def test_copies_learn_for_themselves():
    torch.manual_seed(0)
    model = trained(Body(lambda net, y: F.relu(net.bn(y))), images())
    attached(model, images())
    with torch.no_grad():
        model(images())
        twin = copy.deepcopy(model)
        expected = model(images())
        assert torch.equal(bits(twin(images())), bits(expected))
        model.bn.bias.fill_(100)
        assert torch.equal(bits(twin(images())), bits(expected))


def test_comparing_with_one_thread_stays_as_it_was():
    torch.manual_seed(0)
    model = trained(Body(lambda net, y: F.relu(net.bn(y))), images())
    reports = []
    for fuse in (False, True):
        with sysmt.attach(model, sysmt.ArrayConfig(threads=4), errors=True, fuse=fuse) as simulation:
            simulation.set_ranges({"conv": sysmt.ActivationRange(0.02, signed=True)})
            with torch.no_grad():
                model(images())
                model(images())
            reports.append(simulation.report())
    assert reports[0].equals(reports[1])


def test_where_torch_rounds_twice_its_own_norm_stays(monkeypatch):
    monkeypatch.setattr(epilogue, "batch_norm_is_fused", lambda: False)
    torch.manual_seed(0)
    model = trained(Body(lambda net, y: F.relu(net.bn(y))), images())
    assert check(model, images())["conv"] == (False, False)


def test_gradients_are_refused_as_before():
    model = trained(Body(lambda net, y: F.relu(net.bn(y))), images())
    attached(model, images())
    with pytest.raises(sysmt.UnsupportedLayerError, match="no gradient comes back"):
        model(images()).sum().backward()


def test_a_shared_convolution_gives_up():
    torch.manual_seed(0)
    model = trained(
        Body(lambda net, y: F.relu(net.bn(y)) + net.other(net.conv(net.first(images())))), images()
    )
    assert check(model, images(), torch.no_grad)["conv"] == (False, False)
