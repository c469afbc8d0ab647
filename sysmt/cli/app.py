"""What all commands share: errors in one line, warnings in one line, exit codes, --debug."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

import sysmt
from sysmt.errors import SysmtError

__all__ = ["EXIT_ERROR", "Commands", "print_table", "root", "say"]

EXIT_ERROR = 2
"""Something given was wrong, or could not be had or written."""

EXIT_BUG = 70
"""An error of ours that nobody has foreseen: EX_SOFTWARE of sysexits.h."""

RAISE = "SYSMT_RAISE"
"""Where this variable is set, as in the tests, unforeseen errors are raised instead of reported."""

EXIT_INTERRUPTED = 130
"""Ctrl-C: 128 + SIGINT, as typer and shells have it."""

_BARE = {"--recalibrate": "ema"}
"""Options that may stand without their value, and the value they then have."""


class Commands(TyperGroup):
    """The group of all commands; ends every error that is not a bug in one red line and exit code 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run one command line."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal without a sign gets its escape instead
                stream.reconfigure(errors="backslashreplace")
        given = [*_with_values(sys.argv[1:] if args is None else args)]
        debug = "--debug" in given
        received: list[int] = []
        try:
            with _warnings_in_one_line(), _signals_as_ctrl_c() as received:
                code = super().main(
                    [word for word in given if word != "--debug"],
                    prog_name,
                    complete_var,
                    standalone_mode=False,
                    windows_expand_args=windows_expand_args,
                    **extra,
                )
        except SysmtError as error:
            if debug:
                traceback.print_exc()
            _fail(str(error))
            code = EXIT_ERROR
        except MemoryError as error:
            _fail(f"not enough memory: {error}")
            code = EXIT_ERROR
        except Exception as error:
            # Wrong usage: typer's exceptions have these two, wherever a version keeps their classes.
            if hasattr(error, "format_message") and hasattr(error, "exit_code"):
                context = getattr(error, "ctx", None)
                hint = f" (try '{context.command_path} --help')" if context else ""
                _fail(f"{error.format_message()}{hint}")
                code = EXIT_ERROR
            elif debug or os.environ.get(RAISE):
                raise
            else:
                _fail(_reported(error, given))
                code = EXIT_BUG
        if code == EXIT_INTERRUPTED:
            _fail(f"interrupted by {signal.Signals(received[0]).name}" if received else "interrupted")
            code = 128 + received[0] if received else code
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)


def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")
    ] = False,
) -> None:
    """Model of SySMT: a systolic array whose PEs run 1, 2 or 4 threads, bit-exact and cycle by cycle.

    `sysmt run` alone measures a small network on handwritten digits. Results are tables (CSV), plots
    (PNG) and the configuration (TOML) in a directory of the run's own. Exit codes: 0 done,
    2 something is wrong, 3 done but for points that were given up, 70 a fault of sysmt itself, 130
    interrupted (143 by SIGTERM, 129 by SIGHUP); what was measured until then is kept.
    """
    del debug  # taken out of the line before it is parsed
    if version:
        print(f"sysmt {sysmt.__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help(), end="")


def say(message: str, style: str = "") -> None:
    """Print a line for the user on stderr, where it does not mix with results."""
    Console(stderr=True, soft_wrap=True).print(Text(message, style=style))


def _fail(message: str) -> None:
    say(f"error: {' '.join(message.split())}", "bold red")


def _reported(error: Exception, args: Sequence[str]) -> str:
    """Write an unforeseen error to a file for a report, and return the line that says where it is."""
    what = f"{type(error).__name__}: {error}"[:200]
    try:
        handle, path = tempfile.mkstemp(prefix="sysmt-error-", suffix=".txt", text=True)
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"sysmt {sysmt.__version__}, Python {sys.version}\n{args}\n\n")
            traceback.print_exception(error, file=file)
    except OSError:
        return f"unforeseen, a fault of sysmt: {what} (--debug shows the traceback)"
    return f"unforeseen, a fault of sysmt: {what} ({path} has the details for a report)"


def _with_values(args: Sequence[str]) -> Iterator[str]:
    """Spell out the values of options that stand bare."""
    for word, following in itertools.pairwise([*args, "--"]):
        yield f"{word}={_BARE[word]}" if word in _BARE and following.startswith("-") else word


@contextlib.contextmanager
def _signals_as_ctrl_c() -> Iterator[list[int]]:
    """End on SIGTERM and SIGHUP as on Ctrl-C, writing what there is; yield the signals that came."""
    received: list[int] = []

    def interrupt(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)  # the second one ends the process at once
        raise KeyboardInterrupt

    handled = []
    if threading.current_thread() is threading.main_thread():
        # Who ignores a signal, as under nohup, or has a handler of their own, keeps it.
        handled = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is signal.SIG_DFL]
    for one in handled:
        signal.signal(one, interrupt)
    try:
        yield received
    finally:
        for one in handled:
            signal.signal(one, signal.SIG_DFL)


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Show each warning once, without the source line it came from."""

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        say(f"warning: {message}", "yellow")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """Print a table on stdout: the first column is text, the others are numbers."""
    table = Table(box=SIMPLE_HEAD, caption=caption or None, caption_justify="left", pad_edge=False)
    for index, title in enumerate(header):
        table.add_column(title, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    # Into a file or a pipe, lines are as long as they are.
    Console(highlight=False, width=None if sys.stdout.isatty() else 1000).print(table)
