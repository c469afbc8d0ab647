"""Reusing what runs before a changed layer gives just what computing it again gives."""

import pytest
import torch
from torch import nn

import sysmt
from sysmt.errors import CalibrationError
from sysmt.study.sensitivity import PrefixReuse, sensitivities


class Residual(nn.Module):
    """A block with everything that makes reuse hard: in-place changes and one module called twice."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn(self.conv1(x)))
        y = self.conv2(y)
        y += x
        return self.relu(y)


class Net(nn.Module):
    """Straight and residual parts, functions between modules, and a layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.plain = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1))
        self.blocks = nn.Sequential(Residual(8), Residual(8))
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = self.blocks(self.plain(x))
        x = torch.relu_(self.twice(torch.relu_(self.twice(x))))
        return self.fc(x.mean((2, 3)))


def calibrated(net=None):
    torch.manual_seed(0)
    net = (net or Net()).eval()
    loader = [torch.rand(5, 3, 12, 12), torch.rand(4, 3, 12, 12)]
    sim = sysmt.attach(net)
    sim.calibrate(loader, images=9)
    return sim, loader


def test_reuse_changes_no_bit_and_spares_work():
    sim, loader = calibrated()
    fast = sensitivities(sim, loader, 9)
    slow = sensitivities(sim, loader, 9, reuse=False)
    assert fast.table.equals(slow.table)
    assert len(fast.table) == 2 * 7
    assert (fast.table["kl"] > 0).all()
    assert slow.modules_reused == 0
    assert fast.modules_run + fast.modules_reused == slow.modules_run
    assert fast.modules_reused > 0.3 * slow.modules_run


def test_sensitivities_are_the_divergence_of_the_softmax():
    sim, loader = calibrated()
    measured = sensitivities(sim, loader, 9, baseline=2, threads=[4])
    images = torch.cat(loader)
    with torch.no_grad():
        sim.set_threads(2)
        p = sim.model(images).double().softmax(1)
        sim.set_threads({"blocks.0.conv2": 4})
        q = sim.model(images).double().softmax(1)
    expected = float((p * (p.log() - q.log())).sum(1).mean())
    assert measured.cost("blocks.0.conv2", 4) == pytest.approx(expected, rel=1e-9)
    assert measured.cost("blocks.0.conv2", 2) == 0
    assert set(measured.table["threads"]) == {4}
    assert measured.images == 9


def test_everything_is_restored():
    sim, loader = calibrated()
    sim.set_threads({"twice": 4})
    before = {name: module.__dict__.get("forward") for name, module in sim.model.named_modules()}
    threads = sim.threads()
    sensitivities(sim, loader, 9)
    assert {name: module.__dict__.get("forward") for name, module in sim.model.named_modules()} == before
    assert sim.threads() == threads
    assert sim.images == 0


def test_everything_is_restored_after_an_exception():
    sim, _ = calibrated()
    before = {name: module.__dict__.get("forward") for name, module in sim.model.named_modules()}
    with pytest.raises(CalibrationError):
        sensitivities(sim, [torch.rand(2, 3, 12, 12), "no tensor"], 9)
    assert {name: module.__dict__.get("forward") for name, module in sim.model.named_modules()} == before
    sim.set_threads(2)


def test_a_network_that_changes_its_path_is_refused():
    class Fickle(Net):
        calls = 0

        def forward(self, x):
            Fickle.calls += 1
            x = torch.relu(self.stem(x))
            x = self.blocks(self.plain(x)) if Fickle.calls > 3 else self.plain(self.blocks(x))
            return self.fc(self.twice(x).mean((2, 3)))

    sim, loader = calibrated(Fickle())
    with pytest.raises(CalibrationError, match="where it had called"):
        sensitivities(sim, loader[:1], 5)


def test_reuse_starts_at_the_changed_module():
    sim, loader = calibrated()
    with torch.no_grad(), PrefixReuse(sim.model) as prefix:
        reference = prefix.record(loader[0])
        assert torch.equal(prefix.run(loader[0], sim.model.fc), reference)
        # The stem, plain as one, blocks as one and both calls of twice: only fc is computed.
        assert prefix.leaves_run == 1
        sim.model.fc.bias.data += 1
        assert torch.equal(prefix.run(loader[0], sim.model.fc), sim.model(loader[0]))


def test_networks_without_logits_are_refused():
    sim, loader = calibrated(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    with pytest.raises(CalibrationError, match="logits"):
        sensitivities(sim, loader, 5)
