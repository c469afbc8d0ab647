"""What the tests of experiments share: one of the scripts in this process, and a network for them."""

import torch
import typer
from typer.testing import CliRunner

from sysmt.nn.data.labelled_images import open_data
from sysmt.nn.networks.checkpoints import save_weights
from sysmt.nn.networks.models import build_model
from sysmt.nn.networks.training import train


def run(module, *args, code=0):
    """Run an experiment's command in this process; return what it printed."""
    app = typer.Typer()
    app.command()(getattr(module, module.__name__))
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def save_digits(directory, epochs):
    """Save a digits network after so many epochs (5: good enough to have something to lose)."""
    torch.manual_seed(0)
    model = build_model("digits")
    if epochs:
        train(model, open_data("digits"), epochs, lr=0.1, batch_size=64, device="cpu", progress=False)
    path = directory / "digits.pt"
    save_weights(model, path)
    return path
