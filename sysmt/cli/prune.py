"""`sysmt prune`: zero weights, train on what is left, and save a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sysmt.cli.app import print_table, say
from sysmt.cli.options import MACHINE, NETWORK, takes
from sysmt.config import parse_count
from sysmt.errors import ConfigError
from sysmt.study.run_config import RunConfig

if TYPE_CHECKING:
    import pandas as pd

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
    if len(steps) > 1 and not epochs:
        raise ConfigError(
            "a --schedule of several steps needs --epochs: without training its last step is all"
        )
    from sysmt.nn.networks.checkpoints import save_weights
    from sysmt.nn.networks.pruning import make_permanent, prune_and_retrain, prune_model, sparsity_report
    from sysmt.nn.networks.training import evaluate, train
    from sysmt.study.run_directory import check_writable
    from sysmt.study.workload import open_workload

    check_writable(out)
    model, data = open_workload(config)
    for note in data.notes:
        say(note, "dim")
    test = data.loader("test", batch_size=config.batch_size)
    where = {"scope": scope, "first": first, "linear": linear}
    training = {"lr": lr, "seed": config.seed, "batch_size": config.batch_size}

    rows: list[tuple[Any, ...]] = [
        ("as loaded", _zeros(sparsity_report(model)), evaluate(model, test).top1, None)
    ]
    if epochs and pattern is None:
        table = prune_and_retrain(model, data, steps, epochs, test=test, **where, **training)  # type: ignore[arg-type]
        rows += [
            (f"step {row.step}", row.sparsity, row.pruned_top1, row.test_top1) for row in table.itertuples()
        ]
    else:
        prune_model(model, steps[0] if steps else None, pattern=pattern, **where)  # type: ignore[arg-type]
        before, after = evaluate(model, test).top1, None
        if epochs:
            train(model, data, epochs, **training)  # type: ignore[arg-type]
            after = evaluate(model, test).top1
        rows.append((pattern or "pruned", _zeros(sparsity_report(model)), before, after))
    make_permanent(model)
    report = sparsity_report(model)
    facts = {"model": config.model, "sparsity": _zeros(report), "steps": steps, "pattern": pattern}
    facts |= {"scope": scope, "epochs": epochs, **training}
    facts["layers"] = {
        name: float(share) for name, share in zip(report["name"], report["sparsity"], strict=True)
    }
    save_weights(model, out, facts)
    header = ["", "zero weights\n%", "top-1\n%", "retrained\ntop-1, %"]
    print_table(header, [[row[0], *map(_percent, row[1:])] for row in rows])
    say(f"pruned weights are in {out}")


def _steps(sparsity: float | None, schedule: str | None, pattern: str | None) -> list[float]:
    """Return the sparsities to reach, in order; none where the pattern sets it."""
    if schedule is None:
        if sparsity is not None:
            return [sparsity]
        return [0.4] if pattern is None else []
    if sparsity is not None or pattern is not None:
        raise ConfigError("--schedule excludes --sparsity and --pattern: its last entry is where it ends")
    try:
        return [float(part) for part in schedule.split(",")]
    except ValueError:
        raise ConfigError(f"schedule={schedule!r} is no list of sparsities, such as 0.1,0.2,0.4") from None


def _zeros(report: pd.DataFrame) -> float:
    """Share of zeros among all weights of Conv2d and Linear layers."""
    return float(report["zeros"].sum() / report["weights"].sum())


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"
