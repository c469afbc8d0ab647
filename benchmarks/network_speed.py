"""Benchmarks of whole networks: a forward on the array against torch's own in float32."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from turns import take_turns

import sysmt
from sysmt.nn.networks.models import build_model

Row = dict[str, Any]

NETWORKS: dict[str, tuple[str, int, int, tuple[float, float, float]]] = {
    "ResNet-18": ("resnet18", 8, 224, (2.0, 1.5, 1.2)),
    "ResNet-18, one image": ("resnet18", 1, 224, (1.2, 1.0, 0.8)),
    "ResNet-50": ("resnet50", 8, 224, (1.5, 1.2, 0.9)),
    "GoogLeNet": ("googlenet", 8, 224, (1.2, 1.0, 0.8)),
    "DenseNet-121": ("densenet121", 8, 224, (1.2, 1.0, 0.8)),
    "MobileNet-v1": ("mobilenet_v1", 8, 224, (1.2, 1.0, 0.8)),
    "CIFAR ResNet-20": ("resnet20", 128, 32, (1.5, 1.2, 1.0)),
}
"""Model, batch, pixels a side, and the speed to reach relative to torch at T = 1, 2, 4."""


def settle_statistics(model: torch.nn.Module, images: torch.Tensor) -> torch.nn.Module:
    """Give BatchNorm layers the images' statistics, as training would, in evaluation mode."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def network_rows(label: str, cpu_threads: int, rounds: int = 5) -> Iterator[Row]:
    """Time one network in both memory formats, ours and torch's; the faster of each counts."""
    name, batch, size, targets = NETWORKS[label]
    torch.set_num_threads(cpu_threads)
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size)
    model = settle_statistics(build_model(name), images)
    formats = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
    candidates = {}
    with torch.inference_mode():
        for suffix, memory_format in formats.items():
            x = images.to(memory_format=memory_format)
            plain = copy.deepcopy(model).to(memory_format=memory_format)
            candidates[f"float {suffix}"] = lambda net=plain, x=x: net(x)
            for threads in (1, 2, 4):
                simulated = copy.deepcopy(plain)
                simulation = sysmt.attach(simulated, sysmt.ArrayConfig(threads=threads))
                simulation.calibrate([x], images=batch)
                candidates[f"{threads} {suffix}"] = lambda net=simulated, x=x: net(x)
        seconds = take_turns(candidates, rounds, one_thread=cpu_threads == 1)
    torch_seconds = min(seconds[f"float {suffix}"] for suffix in formats)
    for threads, target in zip((1, 2, 4), targets, strict=True):
        ours = min(seconds[f"{threads} {suffix}"] for suffix in formats)
        yield {
            "part": "network",
            "name": label,
            "threads": threads,
            "cpu_threads": cpu_threads,
            "seconds": ours,
            "torch_seconds": torch_seconds,
            "ratio": torch_seconds / ours,
            "target": target,
        }
