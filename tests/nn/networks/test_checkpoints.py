"""Weights on disk: what is understood, what is refused, and that files are whole."""

import copy
import hashlib
import io
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from sysmt.errors import WeightsError
from sysmt.nn.networks.checkpoints import (
    load_weights,
    read_metadata,
    read_weights,
    resolve_weights,
    save_weights,
    weights_hash,
)
from sysmt.nn.networks.models import build_model, load_model


def network(seed: int = 0, classes: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, classes)
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    return weights_hash(a) == weights_hash(b) and weights_hash(a, "buffers") == weights_hash(b, "buffers")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {key: value for key, value in state.items() if "num_batches" not in key},
    ],
    ids=["plain", "state_dict", "model", "module.", "without batch counts"],
)
def test_usual_forms(wrap, tmp_path: Path) -> None:
    source, target = network(0), network(1)
    torch.save(wrap(source.state_dict()), tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert same(source, target)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    source, target = network(0), network(1)
    torch.save({key: value.half() for key, value in source.state_dict().items()}, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert target[0].weight.dtype == torch.float32
    assert torch.equal(target[0].weight, source[0].weight.half().float())


def test_prune_masks_are_multiplied_in(tmp_path: Path) -> None:
    source = network(0)
    prune.random_unstructured(source[0], "weight", amount=0.5)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    target = network(1)
    load_weights(target, tmp_path / "w.pt")
    expected = source[0].weight_orig * source[0].weight_mask
    assert torch.equal(target[0].weight, expected)
    assert int((target[0].weight == 0).sum()) == 14  # round(0.5 * 27)


def test_old_densenet_names_and_auxiliary_classifiers(tmp_path: Path) -> None:
    source = build_model("densenet121", num_classes=3)
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", key): value
        for key, value in source.state_dict().items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet.pt")
    target = build_model("densenet121", num_classes=3)
    load_weights(target, tmp_path / "densenet.pt")
    assert same(source, target)

    source = build_model("googlenet", num_classes=3)
    torch.save(source.state_dict() | {"aux1.conv.conv.weight": torch.zeros(1)}, tmp_path / "googlenet.pt")
    load_weights(build_model("googlenet", num_classes=3), tmp_path / "googlenet.pt")


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nowhere.pt is missing"):
        read_weights(tmp_path / "nowhere.pt")
    with pytest.raises(WeightsError, match="is a directory"):
        read_weights(tmp_path)
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(WeightsError, match=r"text\.pt is"):
        read_weights(tmp_path / "text.pt")
    torch.save({}, tmp_path / "empty.pt")
    with pytest.raises(WeightsError, match="state_dict"):
        read_weights(tmp_path / "empty.pt")
    torch.save({"weight": torch.ones(2), "history": [1, 2]}, tmp_path / "mixed.pt")
    with pytest.raises(WeightsError, match="'history' is a list"):
        read_weights(tmp_path / "mixed.pt")


class Evil:
    """Would leave a file behind if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_that_run_code_are_refused(legacy: bool, tmp_path: Path) -> None:
    trace, file = tmp_path / "ran", tmp_path / "evil.pt"
    torch.save({"state_dict": Evil(trace)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match="could run code"):
        read_weights(file)
    file.write_bytes(pickle.dumps(Evil(trace)))
    with pytest.raises(WeightsError):
        read_weights(file)
    assert not trace.exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_truncated_files_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    torch.save(network().state_dict(), buffer)
    whole = buffer.getvalue()
    (tmp_path / "w.pt").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(WeightsError, match=r"w\.pt"):
        read_weights(tmp_path / "w.pt")


def test_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    state = network().state_dict()
    state["1.running_var"] = torch.tensor([1.0, float("inf"), 1.0])
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"1\.running_var"):
        read_weights(tmp_path / "w.pt")


def test_other_networks_are_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    target = network(1)
    before = weights_hash(target)
    state = network().state_dict()
    torch.save({key: value for key, value in state.items() if key != "0.weight"}, tmp_path / "lacks.pt")
    with pytest.raises(WeightsError, match=r"Sequential: it lacks 0\.weight"):
        load_weights(target, tmp_path / "lacks.pt")
    torch.save(state | {"9.weight": torch.ones(1)}, tmp_path / "more.pt")
    with pytest.raises(WeightsError, match=r"has besides 9\.weight"):
        load_weights(target, tmp_path / "more.pt")
    save_weights(network(classes=5), tmp_path / "shape.pt")
    with pytest.raises(WeightsError, match=r"4\.weight has shape \(5, 3\), the network needs \(4, 3\)"):
        load_weights(target, tmp_path / "shape.pt")
    torch.save(state | {"4.weight": torch.ones(4, 3, dtype=torch.int8)}, tmp_path / "int8.pt")
    with pytest.raises(WeightsError, match="int8"):
        load_weights(target, tmp_path / "int8.pt")
    assert weights_hash(target) == before


def test_one_flipped_bit_in_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    save_weights(network(), path)
    content = bytearray(path.read_bytes())
    at = content.find(network()[4].weight.detach().numpy().tobytes())
    content[at + 3] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(
        WeightsError, match=r"w\.pt is damaged or no checkpoint; .*Bad CRC-32 for file .*/data/"
    ):
        read_weights(path)


def test_sparse_weights_become_dense_and_weights_without_values_are_refused(tmp_path: Path) -> None:
    state = network().state_dict()
    torch.save(state | {"4.weight": state["4.weight"].to_sparse()}, tmp_path / "sparse.pt")
    assert torch.equal(read_weights(tmp_path / "sparse.pt")["4.weight"], state["4.weight"])
    torch.save(state | {"4.weight": torch.empty(4, 3, device="meta")}, tmp_path / "meta.pt")
    with pytest.raises(WeightsError, match=r"meta\.pt has '4\.weight' on the meta device"):
        read_weights(tmp_path / "meta.pt")


def test_names_that_are_too_long_are_missing() -> None:
    with pytest.raises(WeightsError, match="a is missing; a checkpoint file is needed"):
        read_weights("a" * 300)


WRAPPED = {
    "ema beside the model": lambda s: {"model_ema": s, "epoch": 3},
    "wrappers in wrappers": lambda s: {"model": {"state_dict": s}},
    "compiled": lambda s: {f"_orig_mod.{key}": value for key, value in s.items()},
    "compiled in DataParallel": lambda s: {f"module._orig_mod.{key}": value for key, value in s.items()},
    "averaged": lambda s: (
        {"n_averaged": torch.tensor(7)} | {f"module.{key}": value for key, value in s.items()}
    ),
    "Lightning's": lambda s: {
        "state_dict": {f"model.{key}": value for key, value in s.items()} | {"accuracy.total": torch.ones(1)},
        "pytorch-lightning_version": "2.0",
    },
    "Lightning's, compiled": lambda s: {"state_dict": {f"net._orig_mod.{key}": v for key, v in s.items()}},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_of_trainings_come_off(kind: str, tmp_path: Path) -> None:
    source = build_model("digits", 7)
    torch.save(WRAPPED[kind](source.state_dict()), tmp_path / "w.pt")
    model = load_model("digits", tmp_path / "w.pt")
    assert weights_hash(model) == weights_hash(source)
    target = build_model("digits", 7)
    load_weights(target, tmp_path / "w.pt")
    assert weights_hash(target) == weights_hash(source)
    assert weights_hash(target, "buffers") == weights_hash(source, "buffers")


def test_a_network_whose_own_names_start_with_model_keeps_them(tmp_path: Path) -> None:
    source = nn.ModuleDict({"model": nn.Linear(2, 3)})
    torch.save(source.state_dict(), tmp_path / "w.pt")
    target = nn.ModuleDict({"model": nn.Linear(2, 3)})
    load_weights(target, tmp_path / "w.pt")
    assert weights_hash(target) == weights_hash(source)


def test_safetensors(tmp_path: Path) -> None:
    torch_files = pytest.importorskip("safetensors.torch")
    path = tmp_path / "w.safetensors"
    torch_files.save_file(network().state_dict(), path)
    target = network(seed=1)
    load_weights(target, path)
    assert weights_hash(target) == weights_hash(network())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(WeightsError, match=r"w\.safetensors is damaged or no safetensors file"):
        read_weights(path)


def test_missing_safetensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"w\.safetensors is missing"):
        read_weights(tmp_path / "w.safetensors")


def test_saving_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "w.pt"
    save_weights(network(), path, {"top1": 0.9, "model": "tiny", "stages": [1, 2]})
    assert read_metadata(path) == {"top1": 0.9, "model": "tiny", "stages": [1, 2]}
    assert os.listdir(path.parent) == ["w.pt"]
    torch.save(network().state_dict(), path)
    assert read_metadata(path) == {}


def test_hash_tells_weights_apart() -> None:
    model = network()
    weights, buffers = weights_hash(model), weights_hash(model, "buffers")
    assert weights == weights_hash(copy.deepcopy(model))
    model[1].running_mean += 1
    assert weights_hash(model) == weights
    assert weights_hash(model, "buffers") != buffers
    with torch.no_grad():
        model[4].bias[0] = torch.nextafter(model[4].bias[0], torch.tensor(9.0))
    assert weights_hash(model) != weights


def test_hash_sees_masks_as_part_of_the_weights() -> None:
    model = network()
    weights = weights_hash(model)
    prune.identity(model[0], "weight")
    assert weights_hash(model) == weights
    model[0].weight_mask[0, 0, 0, 0] = 0
    changed = weights_hash(model)
    assert changed != weights
    prune.remove(model[0], "weight")
    assert weights_hash(model) == changed


@pytest.mark.parametrize(
    "derive",
    [
        nn.utils.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.25),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hash_sees_all_that_a_weight_is_computed_from(derive: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    derive(model[4])
    state = {key: value for key, value in model[4].state_dict(keep_vars=True).items() if key != "bias"}
    assert state
    hashes = [weights_hash(model)]
    for value in state.values():
        with torch.no_grad():
            value.flatten()[0] += 0.5
        hashes.append(weights_hash(model))
    assert len(set(hashes)) == len(hashes)


def test_hash_sees_weights_in_buffers_and_leaves_out_what_is_no_tensor() -> None:
    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones(3))

        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    model = Extra()
    before = weights_hash(model), weights_hash(model, "buffers")
    model.weight[1] = 2
    assert weights_hash(model) != before[0]
    assert weights_hash(model, "buffers") == before[1]


def test_hash_of_weights_without_values_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"0\.bias of Sequential is on the meta device"):
        weights_hash(network().to("meta"))


# -- torchvision's published weights, without a network ----------------------------------------


def publish(monkeypatch: pytest.MonkeyPatch, hub: Path, digest: str) -> str:
    url = f"file://{hub.as_posix()}/unreachable/tiny-{digest[:8]}.pth"
    from sysmt.nn.torchvision_import import torchvision

    weights = type("Weights", (dict,), {"__members__": {"IMAGENET1K_V1": None}})(
        IMAGENET1K_V1=SimpleNamespace(url=url)
    )
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: weights)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    return url


def test_published_weights_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights(network(), tmp_path / "w.pt")
    digest = hashlib.sha256((tmp_path / "w.pt").read_bytes()).hexdigest()
    publish(monkeypatch, tmp_path, digest)
    cached = tmp_path / "checkpoints" / f"tiny-{digest[:8]}.pth"
    with pytest.raises(WeightsError, match="could not be downloaded"):
        resolve_weights("torchvision:IMAGENET1K_V1", "resnet18")
    assert not cached.exists()
    cached.parent.mkdir(exist_ok=True)
    cached.write_bytes((tmp_path / "w.pt").read_bytes())
    assert resolve_weights("torchvision:IMAGENET1K_V1", "resnet18") == cached
    cached.write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="damaged"):
        resolve_weights("torchvision:IMAGENET1K_V1", "resnet18")


def test_unpublished_weights() -> None:
    with pytest.raises(WeightsError, match="IMAGENET1K_V1"):
        resolve_weights("torchvision:IMAGENET1K_V9", "resnet18")
    with pytest.raises(WeightsError, match="no weights for model 'digits'"):
        resolve_weights("torchvision:DEFAULT", "digits")
    assert resolve_weights("somewhere/w.pt", "digits") == Path("somewhere/w.pt")
