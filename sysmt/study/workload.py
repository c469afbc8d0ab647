"""A network, its images and its array, in one place: opened, attached, calibrated, evaluated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from sysmt.config import RecalibrationMode
from sysmt.errors import ConfigError
from sysmt.nn.array.simulation import Simulation, attach
from sysmt.nn.batchnorm.recalibration import (
    RecalibrationReport,
    load_statistics,
    recalibrate_batchnorm,
    save_statistics,
)
from sysmt.nn.data.labelled_images import ImageData, Loader, open_data
from sysmt.nn.networks.checkpoints import weights_hash
from sysmt.nn.networks.digits import DIGITS, trained_digits
from sysmt.nn.networks.models import build_model, load_model
from sysmt.nn.networks.training import Evaluation, evaluate
from sysmt.progress import Counted, progress_bar
from sysmt.study.run_config import RANDOM_WEIGHTS, RunConfig

__all__ = ["OpenWorkload", "open_workload"]


def open_workload(config: RunConfig) -> tuple[nn.Module, ImageData]:
    """Build the network, load its weights and open the images, as a configuration asks for.

    Also seeds torch and sets its CPU threads.

    Raises
    ------
    ConfigError
        If weights or data are not named, or unknown.
    DataError, WeightsError
        If they cannot be read.
    """
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    torch.manual_seed(config.seed)
    is_digits = config.model in DIGITS
    if config.data is None and not is_digits:
        raise ConfigError(f"model {config.model!r} needs data, such as npz:FILE or imagefolder:DIR")
    if config.weights is None and not is_digits:
        raise ConfigError(
            f"model {config.model!r} needs weights: a checkpoint's path, torchvision:NAME, or "
            f"{RANDOM_WEIGHTS!r} where only cycles matter"
        )
    data = open_data(
        config.model if config.data is None else config.data,
        train=config.train_data,
        preprocessing=config.preprocessing,
        image_size=config.image_size,
        skip_bad_images=config.skip_bad_images,
        seed=config.seed,
    )
    if config.weights is None:
        return trained_digits(name=config.model), data
    if config.weights == RANDOM_WEIGHTS:
        return build_model(config.model, data.num_classes, data.preprocessing.channels), data
    return load_model(config.model, config.weights), data


class OpenWorkload:
    """A network and its images, to be measured in many states one after the other.

    Parameters
    ----------
    config : RunConfig
        Network, weights, images and the array; its threads and recalibration are left to the study.

    Attributes
    ----------
    config : RunConfig
    model : nn.Module
    data : ImageData

    Raises
    ------
    SysmtError
        If network, weights or images cannot be had or do not fit each other.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.model, self.data = open_workload(config)

    def identity(self) -> dict[str, str]:
        """Return hashes of the weights and the images."""
        return {"weights_sha256": weights_hash(self.model), "data_sha256": self.data.fingerprint()}

    def evaluate(self, what: str) -> Evaluation:
        """Evaluate the test images with the network as it is; `what` is for the progress bar."""
        loader = self.data.loader("test", images=self.config.images, batch_size=self.config.batch_size)
        return evaluate(self.model, loader, what=what)

    def attach(self, *, errors: bool = False) -> Simulation:
        """Put the network on the array that the configuration describes; `errors` compares with T = 1."""
        config = self.config
        return attach(
            self.model,
            config.array(),
            first=config.first,
            linear=config.linear,
            depthwise=config.depthwise,
            errors=errors,
            per_channel=not config.per_tensor,
        )

    def calibrate(self, sim: Simulation, seed: int, *, reorder: bool = False) -> int:
        """Calibrate on training images drawn by a seed; return how many those were."""
        loader = self.training_images(self.config.calibration_images, seed)
        with progress_bar("calibrating", loader.images * (2 if reorder else 1)) as bar:
            sim.calibrate(
                Counted(loader, bar), loader.images, percentile=self.config.percentile, reorder=reorder
            )
        return loader.images

    @contextlib.contextmanager
    def on_array(self, seed: int, *, reorder: bool = False, errors: bool = False) -> Iterator[Simulation]:
        """Put the network on the array, calibrated on training images drawn by a seed.

        Parameters
        ----------
        seed : int
            Draws the images and their augmentation.
        reorder : bool
            Gather reordering statistics as well, and switch them on.
        errors : bool
            Compare every layer with T = 1.

        Yields
        ------
        Simulation
            Attached until the block ends.
        """
        with self.attach(errors=errors) as sim:
            self.calibrate(sim, seed, reorder=reorder)
            yield sim

    def training_images(self, images: int, seed: int) -> Loader:
        """Return training images through the training augmentation; all of them if there are fewer."""
        images = min(images, self.data.images("train") or images)
        return self.data.loader(
            "train", images=images, batch_size=self.config.batch_size, augment=True, seed=seed
        )

    def recalibrate(
        self, mode: str | RecalibrationMode, images: int, seed: int, momentum: float = 0.1, what: str = ""
    ) -> RecalibrationReport:
        """Regather BatchNorm's statistics with the network as it is; `what` is for the progress bar.

        Returns
        -------
        RecalibrationReport
            How far each layer's statistics moved.
        """
        loader = self.training_images(images, seed)
        with progress_bar(f"{what}: recalibrating" if what else "recalibrating", loader.images) as bar:
            return recalibrate_batchnorm(
                self.model, Counted(loader, bar), mode, momentum=momentum, images=loader.images
            )

    @contextlib.contextmanager
    def recalibrated(
        self, mode: str, images: int, seed: int, momentum: float = 0.1
    ) -> Iterator[RecalibrationReport]:
        """Recalibrate BatchNorm with the network as it is; the old statistics are back after the block.

        Yields
        ------
        RecalibrationReport
            How far each layer's statistics moved.
        """
        statistics = save_statistics(self.model)
        try:
            yield self.recalibrate(mode, images, seed, momentum)
        finally:
            load_statistics(self.model, statistics)
