"""A network under study: in float or on the array, its BatchNorm recalibrated for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from sysmt.nn.array.simulation import Simulation, attach
from sysmt.nn.batchnorm.recalibration import (
    RecalibrationReport,
    load_statistics,
    recalibrate_batchnorm,
    save_statistics,
)
from sysmt.nn.data.labelled_images import Loader
from sysmt.nn.networks.checkpoints import weights_hash
from sysmt.nn.networks.training import Evaluation, evaluate
from sysmt.progress import Counted, progress_bar
from sysmt.study.evaluate import open_workload
from sysmt.study.run_config import RunConfig

__all__ = ["Subject"]


class Subject:
    """A network and its images, measured in many states one after the other.

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
        config = self.config
        with attach(
            self.model,
            config.array(),
            first=config.first,
            linear=config.linear,
            depthwise=config.depthwise,
            errors=errors,
            per_channel=not config.per_tensor,
        ) as sim:
            loader = self.training_images(config.calibration_images, seed)
            with progress_bar("calibrating", loader.images * (2 if reorder else 1)) as bar:
                sim.calibrate(
                    Counted(loader, bar), loader.images, percentile=config.percentile, reorder=reorder
                )
            yield sim

    def training_images(self, images: int, seed: int) -> Loader:
        """Return training images through the training augmentation; all of them if there are fewer."""
        images = min(images, self.data.images("train") or images)
        return self.data.loader(
            "train", images=images, batch_size=self.config.batch_size, augment=True, seed=seed
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
        loader = self.training_images(images, seed)
        statistics = save_statistics(self.model)
        try:
            yield recalibrate_batchnorm(
                self.model, loader, mode, momentum=momentum, images=loader.images, progress=True
            )
        finally:
            load_statistics(self.model, statistics)
