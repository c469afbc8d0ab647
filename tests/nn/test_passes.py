"""What may stand where a loader belongs: batches, and never single images taken for batches."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import sysmt
from sysmt.errors import CalibrationError, DataError
from sysmt.nn.networks.training import evaluate, train
from sysmt.nn.passes import image_batches

IMAGES = torch.rand(12, 3, 9, 9) * torch.linspace(0.5, 1.5, 12)[:, None, None, None]
LABELS = torch.arange(12) % 6


class OneByOne(IterableDataset):
    def __iter__(self):
        return zip(IMAGES, LABELS.tolist(), strict=True)


SINGLE_IMAGES = {
    "dataset": TensorDataset(IMAGES, LABELS),
    "subset": torch.utils.data.Subset(TensorDataset(IMAGES, LABELS), [0, 1]),
    "iterable dataset": OneByOne(),
    "loader without batches": DataLoader(TensorDataset(IMAGES, LABELS), batch_size=None),
    "list of pairs": list(zip(IMAGES, LABELS.tolist(), strict=True)),
    "list of pairs with numpy's labels": list(zip(IMAGES, LABELS.numpy(), strict=True)),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()


@pytest.mark.parametrize("loader", SINGLE_IMAGES.values(), ids=SINGLE_IMAGES)
def test_single_images_are_no_batches(loader: object) -> None:
    what = "single images.*DataLoader"
    model = network()
    with sysmt.attach(model) as sim, pytest.raises(CalibrationError, match=what):
        sim.calibrate(loader, 4)
    with pytest.raises(CalibrationError, match=what):
        sysmt.recalibrate_batchnorm(model, loader, images=4)
    with pytest.raises(DataError, match=what):
        evaluate(model, loader, progress=False)
    if hasattr(loader, "__len__"):
        with pytest.raises(DataError, match=what):
            train(model, loader, 1, progress=False)


def test_a_dataset_in_a_loader_counts_images_and_not_channels() -> None:
    loader = DataLoader(TensorDataset(IMAGES, LABELS), 4)
    assert [len(batch) for batch in image_batches(loader, 10)] == [4, 4, 2]
    assert torch.equal(torch.cat(list(image_batches(loader, 12))), IMAGES)
    assert evaluate(network(), loader, progress=False).images == 12


@pytest.mark.parametrize("loader", [None, 3, network()], ids=["None", "number", "network"])
def test_what_cannot_be_iterated_over_is_named(loader: object) -> None:
    if isinstance(loader, nn.Sequential):
        loader = loader[0]
    with pytest.raises(CalibrationError, match=rf"the loader is a {type(loader).__name__}, which cannot be"):
        next(image_batches(loader, 1))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(11, dtype=torch.int64), r"labels of shape \(11,\)"),
        (torch.zeros(12), r"torch.float32; one integer per image"),
        (np.zeros(12, np.int64), r"pairs \(inputs, labels\) of tensors"),
    ],
)
def test_labels_that_are_not_one_integer_per_image_are_refused(labels: object, message: str) -> None:
    for use in (
        lambda batches: evaluate(network(), batches, progress=False),
        lambda b: train(network(), b, 1),
    ):
        with pytest.raises(DataError, match=message):
            use([(IMAGES, labels)])
