"""BatchNorm and ReLU done by the layer before them: no bit may differ from torch's own."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from network_speed import settle_statistics
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sysmt
from sysmt.nn.array import epilogue, fused_blocks
from sysmt.nn.array.layer import ArrayLayer
from sysmt.nn.batchnorm.folding import fold_batchnorm
from sysmt.nn.batchnorm.recalibration import recalibrate_batchnorm
from sysmt.nn.low_bit.low_precision_batchnorm import convert_batchnorm
from sysmt.nn.networks.models import build_model


def images(batch: int = 2, channels: int = 3, size: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, size, size, generator=generator, dtype=torch.float32)


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """Give BatchNorm layers statistics of the model's own, weights of all signs and a zero of each sign."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.affine:
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
            with torch.no_grad():
                layer.weight[0], layer.bias[0], layer.bias[-1] = 0, -0.0, 0
    return settle_statistics(model, x)


def attached(model: nn.Module, threads: int = 4, fuse: bool = True) -> sysmt.Simulation:
    simulation = sysmt.attach(model, sysmt.ArrayConfig(threads=threads), fuse=fuse)
    simulation.set_ranges(
        {layer.name: sysmt.ActivationRange(0.02, signed=True) for layer in simulation.simulated()}
    )
    return simulation


def bits(y: Tensor) -> Tensor:
    return y.contiguous().view(torch.int32)


@pytest.fixture
def done(monkeypatch):
    """What layers did beyond their convolution, in the order of their runs: (BatchNorm, ReLU)."""
    seen: list[tuple[bool, bool]] = []
    run = ArrayLayer.compute

    def spy(self, call, in_float, what=epilogue.NOTHING):
        if self.observer is None:
            seen.append((what.affine is not None, what.relu))
        return run(self, call, in_float, what)

    monkeypatch.setattr(ArrayLayer, "compute", spy)
    return seen


def check(model: nn.Module, x: Tensor, done: list, context=torch.inference_mode, threads: int = 4) -> list:
    """Hold forwards with epilogues against such without; return what the last one did."""
    plain, quick = copy.deepcopy(model), copy.deepcopy(model)
    reference, simulation = attached(plain, threads, fuse=False), attached(quick, threads)
    with context():
        for _ in range(2):
            expected = plain(x.clone())
            done.clear()
            y = quick(x.clone())
            assert torch.equal(bits(y), bits(expected))
            for memory_format in (torch.contiguous_format, torch.channels_last):
                assert _lies(y, memory_format) == _lies(expected, memory_format)
    assert simulation.report().equals(reference.report())
    simulation.detach()
    assert not any("forward" in module.__dict__ for module in quick.modules())
    return list(done)


def _lies(y: Tensor, memory_format: torch.memory_format) -> bool:
    return y.ndim == 4 and y.is_contiguous(memory_format=memory_format)


def sequence(*followers: nn.Module, channels: int = 21) -> nn.Sequential:
    """A first convolution in float, one to be simulated, and whatever follows it."""
    torch.manual_seed(0)
    return trained(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, channels, 3, padding=1), *followers), images()
    )


BOTH, NORM, RELU, NEITHER = (True, True), (True, False), (False, True), (False, False)


def norm(**options) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(21, **options)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("followers", "expected"),
    [
        ([norm(), nn.ReLU()], BOTH),
        ([norm(), nn.ReLU(inplace=True), nn.ReLU()], BOTH),
        ([norm(affine=False), nn.ReLU()], BOTH),
        ([norm(eps=0.1)], NORM),
        ([norm(), nn.Hardswish()], NORM),
        ([norm(), norm(), nn.ReLU()], NORM),
        ([nn.ReLU()], RELU),
        ([nn.ReLU(), norm()], RELU),
        ([], NEITHER),
        ([nn.Identity(), norm(), nn.ReLU()], NEITHER),
        ([norm(track_running_stats=False), nn.ReLU()], NEITHER),
        ([nn.Sequential(norm(), nn.ReLU())], NEITHER),
    ],
)
def test_whatever_follows(followers, expected, context, done):
    model = sequence(*copy.deepcopy(followers))
    assert check(model, images(), done, context) == [expected]


@pytest.mark.parametrize("channels", [1, 3, 8, 16, 24, 40])
@pytest.mark.parametrize("size", [3, 9, 20])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_shapes(channels, size, memory_format, done):
    model = sequence(nn.BatchNorm2d(channels), nn.ReLU(), channels=channels).to(memory_format=memory_format)
    x = images(3, 3, size).to(memory_format=memory_format)
    assert check(model, x, done, threads=2) == [BOTH]


@pytest.mark.parametrize(
    ("name", "norms", "relus"),
    [
        ("resnet20", 18, 9),
        ("resnet18", 19, 8),
        ("resnet50", 52, 32),
        ("googlenet", 56, 56),
        ("inception_v3", 93, 93),
        ("mobilenet_v1", 13, 13),
        ("vgg11_bn", 7, 7),
        ("densenet121", 0, 0),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_networks(name, norms, relus, memory_format, done):
    torch.manual_seed(0)
    size = {"resnet20": 32, "inception_v3": 96}.get(name, 64)
    x = images(2, 3, size).to(memory_format=memory_format)
    model = trained(build_model(name, 10).to(memory_format=memory_format), x)
    seen = check(model, x, done)
    assert (sum(norm for norm, _ in seen), sum(relu for _, relu in seen)) == (norms, relus)


def test_folded_networks_keep_relu(done):
    torch.manual_seed(0)
    model = trained(build_model("resnet20"), images(4, 3, 32))
    fold_batchnorm(model, images(2, 3, 32))
    seen = check(model, images(2, 3, 32), done)
    assert not any(norm for norm, _ in seen)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_changes_between_forwards_are_followed(context, done):
    model = sequence(norm(), nn.ReLU())
    plain = copy.deepcopy(model)
    attached(plain, fuse=False)
    attached(model)

    def both(change, expected=BOTH) -> None:
        change(plain)
        change(model)
        with context():
            wanted = plain(images())
            done.clear()
            assert torch.equal(bits(model(images())), bits(wanted))
        assert done[-1] == expected

    gamma = torch.linspace(-1, 1, 21)
    both(lambda net: None)
    both(lambda net: net[2].running_mean.add_(1))
    both(lambda net: net[2].weight.data.mul_(2))
    both(lambda net: setattr(net[2].weight, "data", gamma))
    both(lambda net: setattr(net[2], "bias", nn.Parameter(torch.ones(21))))
    both(lambda net: setattr(net[2], "eps", 0.5))
    both(lambda net: net.train(), NEITHER)
    both(lambda net: net.eval())
    both(lambda net: recalibrate_batchnorm(net, [images(4), images(4)], mode="cumulative"))
    both(lambda net: net[2].running_var.fill_(float("inf")))
    both(lambda net: net[2].running_var.fill_(0))
    both(lambda net: net[2].running_var.fill_(float("nan")), NEITHER)
    both(
        lambda net: net.load_state_dict(
            {key: torch.ones_like(value) for key, value in net.state_dict().items()}
        )
    )
    both(lambda net: net[1].weight.data.mul_(-1))
    both(lambda net: net.__setitem__(3, nn.SiLU()), NORM)
    both(lambda net: net.__setitem__(3, nn.ReLU()))
    both(lambda net: convert_batchnorm(net), NEITHER)
    both(lambda net: net.__setitem__(2, nn.Identity()), NEITHER)
    both(lambda net: net.__setitem__(2, norm().eval()))
    both(lambda net: [setattr(net[2], name, None) for name in ("running_mean", "running_var")], NEITHER)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_see_what_torch_gives_them(at, kind, done):
    model = sequence(norm(), nn.ReLU())
    plain, seen = copy.deepcopy(model), {}
    attached(plain, fuse=False)
    attached(model)
    with torch.inference_mode():
        model(images())
        for net in (plain, model):
            getattr(net[at], kind)(lambda module, *args, key=net: seen.update({key: args}))
            done.clear()
            net(images())
        assert done == [NEITHER]
    for wanted, got in zip(seen[plain], seen[model], strict=True):
        wanted, got = (one[0] if isinstance(one, tuple) else one for one in (wanted, got))
        assert torch.equal(bits(got), bits(wanted))


def test_global_hooks_see_every_module(done):
    model, seen = sequence(norm(), nn.ReLU()), []
    attached(model)
    with torch.inference_mode():
        model(images())
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
        try:
            model(images())
        finally:
            handle.remove()
    assert nn.BatchNorm2d in seen
    assert nn.ReLU in seen


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names.append(func.__name__)
        return func(*args, **(kwargs or {}))


names: list[str] = []


@pytest.mark.parametrize(("mode", "name"), [(Functions, "batch_norm"), (Operators, "relu.default")])
def test_those_who_record_torch_see_every_function(mode, name):
    model = sequence(norm(), nn.ReLU())
    attached(model)
    names.clear()
    with torch.no_grad():
        model(images())
        with mode():
            model(images())
    assert name in names


def test_gradients_are_refused_as_before():
    model = sequence(norm(), nn.ReLU())
    attached(model)
    with pytest.raises(sysmt.UnsupportedLayerError, match="no gradient comes back"):
        model(images()).sum().backward()


def test_comparing_with_one_thread_stays_as_it_was(done):
    model = sequence(norm(), nn.ReLU())
    with sysmt.attach(model, sysmt.ArrayConfig(threads=4), errors=True) as simulation:
        simulation.set_ranges({"1": sysmt.ActivationRange(0.02, signed=True)})
        with torch.no_grad():
            model(images())
            model(images())
        assert (simulation.report()["mse"].iloc[1]) > 0
    assert set(done) == {NEITHER}


def test_where_torch_rounds_twice_its_own_norm_stays(monkeypatch, done):
    monkeypatch.setattr(epilogue, "batch_norm_is_fused", lambda: False)
    assert check(sequence(norm(), nn.ReLU()), images(), done) == [NEITHER]


def test_another_default_type_changes_nothing(done):
    model = sequence(norm(), nn.ReLU())
    torch.set_default_dtype(torch.float64)
    try:
        epilogue.batch_norm_is_fused.cache_clear()
        assert check(model, images(), done) == [BOTH]
    finally:
        torch.set_default_dtype(torch.float32)


def test_mismatched_channels_end_in_torchs_own_error():
    model = sequence(norm(), nn.ReLU())
    attached(model)
    with torch.no_grad():
        model(images())
        model[2] = nn.BatchNorm2d(16).eval()
        with pytest.raises(RuntimeError, match="running_mean should contain 21 elements not 16"):
            model(images())


def test_copies_and_pickles_run_by_themselves():
    model = sequence(norm(), nn.ReLU())
    sim = attached(model)
    with torch.no_grad():
        model(images())
        twin, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    sim.detach()
    with torch.no_grad():
        expected = model(images())
        model[2].bias.fill_(100)
        for copied in (twin, loaded):
            assert torch.equal(bits(copied(images())), bits(expected))
            assert copied[2] is not model[2]
            attached(copied)  # as any float network


@pytest.mark.parametrize("name", fused_blocks.FORWARDS)
def test_known_forwards_are_torchs_and_torchvisions_of_now(name):
    """A version whose blocks have other names in their code would silently go without epilogues."""
    models = [
        build_model(one, 10) for one in ("resnet20", "resnet18", "resnet50", "googlenet", "inception_v3")
    ]
    kinds = {type(module) for model in models for module in model.modules()}
    (kind,) = [one for one in kinds if f"{one.forward.__module__}.{one.forward.__qualname__}" == name][:1]
    assert kind.forward.__code__.co_names == fused_blocks.FORWARDS[name][1], inspect.getsource(kind.forward)


def test_blocks_of_another_forward_are_left_alone():
    class Other(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(super().forward(x))

    assert fused_blocks.known_forward(Other()) is None
    changed = nn.Sequential()
    changed.forward = lambda x: x
    assert fused_blocks.known_forward(changed) is None
