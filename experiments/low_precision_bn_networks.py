"""Networks whose every path runs BatchNorm, ReLU, learnt layer, BatchNorm ...: training keeps codes alone.

The form, and its name, are section 1.4's of "Low-Precision Batch-Normalized Activations".
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def fully_connected(inputs: int, width: int, classes: int) -> nn.Sequential:
    """Return FC(width)-BN-ReLU-FC(width)-BN-ReLU-FC(classes) of section 2.1."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
        *(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
        nn.Linear(width, classes),
    )


def vgg(width: int, classes: int, channels: int, image_size: int) -> nn.Sequential:
    """Return VGG(k) of section 2.2, with one pair of convolutions for each halving down to 4 × 4.

    M(k) - M(2k) - ... - C4, where M(k) is kC3-BN-ReLU - kC3-MP3/2-BN-ReLU. Of 32 × 32 images it makes
    the paper's three pairs, of 16 × 16 two.
    """
    layers: list[nn.Module] = []
    while image_size > 4:
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.MaxPool2d(3, 2, padding=1)]
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        channels, width, image_size = width, 2 * width, image_size // 2
    return nn.Sequential(*layers, nn.Conv2d(channels, classes, image_size), nn.Flatten())


class PreActivatedBlock(nn.Module):
    """BN-ReLU-convolution twice, and a shortcut that pads new channels with zeros."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.stride, self.new_channels = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, ⌈H / stride⌉, ⌈W / stride⌉)."""
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return y + F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))


def pre_activated_resnet(blocks: int, width: int = 16, classes: int = 10, channels: int = 3) -> nn.Sequential:
    """Return a pre-activated residual network of three stages: 6 · `blocks` + 2 layers, ResNet-20 for 3."""
    stages: list[nn.Module] = []
    inputs = width
    for stage in range(3):
        outputs = width << stage
        for block in range(blocks):
            stages.append(PreActivatedBlock(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        *stages,
        *(nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(inputs, classes),
    )
