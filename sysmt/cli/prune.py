"""`sysmt prune`: zero weights, train on what is left, and save a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sysmt.cli.app import print_table, say
from sysmt.cli.options import MACHINE, NETWORK, takes
from sysmt.config import parse_count
from sysmt.errors import ConfigError
from sysmt.study.run_config import RunConfig

__all__ = ["prune"]

_PRUNING = "Pruning"


def _pruning(help: str, **more: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=_PRUNING, **more)


@takes(*NETWORK, *MACHINE)
def prune(
    chosen: dict[str, Any],
    out: Annotated[Path, typer.Option(help="Checkpoint to write; replaced if it is there.", metavar="FILE")],
    sparsity: Annotated[
        float | None,
        _pruning("Share of zero weights to reach, in [0, 1).", show_default="0.4, or the pattern's"),
    ] = None,
    schedule: Annotated[
        str | None,
        _pruning(
            "Sparsities to reach one after the other, such as 0.1,0.2,0.4.",
            metavar="LIST",
            show_default="one step",
        ),
    ] = None,
    epochs: Annotated[int, _pruning("Epochs of training after each step; 0 for none.")] = 0,
    lr: Annotated[float, _pruning("Largest learning rate of that training.")] = 0.01,
    pattern: Annotated[
        str | None, _pruning("N:M, such as 2:4: of M weights in a row along K, N stay.", show_default="none")
    ] = None,
    scope: Annotated[str, _pruning("Where the smallest weights are looked for: global or layer.")] = "global",
    first: Annotated[bool, _pruning("Prune the first convolution, too.")] = False,
    linear: Annotated[bool, _pruning("Prune fully connected layers, too.")] = False,
) -> None:
    """Prune a network's smallest weights, retrain it if asked to, and save it for `sysmt run --weights`."""
    config = RunConfig.from_record(chosen)
    steps = _steps(sparsity, schedule, pattern)
    epochs = parse_count(epochs, "epochs", minimum=0)
    from sysmt.nn.checkpoints import save_weights
    from sysmt.nn.pruning import make_permanent, prune_model, sparsity_report
    from sysmt.nn.training import evaluate, train
    from sysmt.study.evaluate import open_workload
    from sysmt.study.results import check_writable

    check_writable(out)
    model, data = open_workload(config)
    for note in data.notes:
        say(note, "dim")

    def top1() -> str:
        loader = data.loader("test", batch_size=config.batch_size)
        return f"{100 * evaluate(model, loader).top1:.2f}"

    rows = [["as loaded", _share(sparsity_report(model)), top1(), "-"]]
    for step in steps:
        prune_model(model, step, scope=scope, pattern=pattern, first=first, linear=linear)
        name = pattern or f"{step:.0%} of the pruned layers"
        rows.append([name, _share(sparsity_report(model)), top1(), "-"])
        if epochs:
            train(model, data, epochs, lr=lr, batch_size=config.batch_size, seed=config.seed)
            rows[-1][-1] = top1()
    make_permanent(model)
    report = sparsity_report(model)
    save_weights(
        model,
        out,
        {
            "model": config.model,
            "sparsity": float(report["zeros"].sum() / report["weights"].sum()),
            "steps": [step for step in steps if step is not None],
            "pattern": pattern,
            "scope": scope,
            "epochs": epochs,
            "layers": dict(zip(report["name"], report["sparsity"].astype(float), strict=True)),
        },
    )
    print_table(["step", "zero weights\n%", "top-1\n%", "top-1 retrained\n%"], rows)
    say(f"pruned weights are in {out}")


def _steps(sparsity: float | None, schedule: str | None, pattern: str | None) -> list[float | None]:
    """Return the sparsities to reach, in order; None where the pattern sets it."""
    if schedule is None:
        return [sparsity if sparsity is not None or pattern is not None else 0.4]
    if sparsity is not None or pattern is not None:
        raise ConfigError("--schedule excludes --sparsity and --pattern: its last entry is where it ends")
    try:
        steps: list[float | None] = [float(part) for part in schedule.split(",")]
    except ValueError:
        raise ConfigError(f"schedule={schedule!r} is no list of sparsities, such as 0.1,0.2,0.4") from None
    if steps != sorted(steps):  # type: ignore[type-var]
        raise ConfigError(f"schedule={schedule!r} must not fall: zero weights stay zero")
    return steps


def _share(report: Any) -> str:
    return f"{100 * report['zeros'].sum() / report['weights'].sum():.1f}"
