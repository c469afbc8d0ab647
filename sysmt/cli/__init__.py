"""The command line: `sysmt`, or `python -m sysmt`. One file per command, listed here.

To add a command: write ``sysmt/cli/<name>.py`` with a function of that name, whose docstring is its
help, and add a line below. Errors need no handling there; `sysmt.cli.app.Commands` ends every
`SysmtError` in one line. Import torch, and what imports it, inside the function, so that ``--help`` is quick.
"""

from __future__ import annotations

import typer

from sysmt.cli.app import Commands, root
from sysmt.cli.calibrate import calibrate
from sysmt.cli.gemm import gemm
from sysmt.cli.info import info
from sysmt.cli.plot import plot
from sysmt.cli.prune import prune
from sysmt.cli.run import run
from sysmt.cli.search import search
from sysmt.cli.sweep import sweep
from sysmt.cli.topology import topology
from sysmt.cli.trace import trace

__all__ = ["app", "main"]

app = typer.Typer(
    name="sysmt",
    cls=Commands,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.callback(invoke_without_command=True)(root)

for command in (run, calibrate, prune, sweep, search, gemm, plot, topology, trace, info):
    app.command()(command)


def main() -> None:
    """Run the command line with this process's arguments, and exit."""
    app(prog_name="sysmt")
