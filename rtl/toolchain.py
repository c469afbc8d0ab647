"""Verilator, Icarus Verilog and Yosys: found, asked for their versions, and run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

__all__ = ["HERE", "VERILOG", "ToolError", "build_bench", "require_tools", "run", "tool_versions"]

HERE = Path(__file__).parent
VERILOG = HERE / "verilog"
PACKAGES = {"verilator": "verilator", "iverilog": "iverilog", "yosys": "yosys", "g++": "g++"}
"""Programs that must be there, and the Debian package that brings each."""


class ToolError(RuntimeError):
    """A tool that is missing, or that failed."""


def require_tools() -> None:
    """Raise `ToolError` naming the packages of all missing tools."""
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    if missing:
        raise ToolError(
            f"not installed: {', '.join(missing)}; on Debian or Ubuntu: apt-get install {' '.join(missing)}"
        )


def run(
    *command: str | Path, stdin: bytes = b"", accept: tuple[int, ...] = (0,), folder: Path | None = None
) -> str:
    """Run a command, in `folder` if given; its standard output.

    Raises
    ------
    ToolError
        If it ends with a status that is not in `accept`; the message carries the end of what it wrote.
    """
    done = subprocess.run(
        [str(part) for part in command], input=stdin, capture_output=True, check=False, cwd=folder
    )
    if done.returncode not in accept:
        said = (done.stdout + done.stderr).decode(errors="replace")
        raise ToolError(f"{Path(command[0]).name} ended with status {done.returncode}:\n{said[-3000:]}")
    return done.stdout.decode(errors="replace")


def tool_versions() -> dict[str, str]:
    """Versions, as they go beside the results."""
    asked = {"verilator": "--version", "iverilog": "-V", "yosys": "-V"}
    versions = {}
    for program, option in asked.items():
        found = re.search(r"\d+\.\d+(\.\d+)?", run(program, option))
        versions[program] = found.group() if found else "unknown"
    return versions


def verilator_root() -> Path:
    """Where Verilator keeps its C++ runtime."""
    return Path(run("verilator", "--getenv", "VERILATOR_ROOT").strip())


def build_runtime(folder: Path) -> list[Path]:
    """Compile Verilator's runtime once, for all benches that are linked in this folder."""
    include = verilator_root() / "include"
    objects = []
    for name in ("verilated", "verilated_threads"):
        target = folder / f"{name}.o"
        if not target.exists():
            flags = ["-std=c++17", "-O2", "-w", f"-I{include}", f"-I{include / 'vltstd'}"]
            run("g++", *flags, "-c", include / f"{name}.cpp", "-o", target)
        objects.append(target)
    return objects


def build_bench(
    top: str,
    bench: str,
    folder: Path,
    verilog: Path = VERILOG,
    parameters: dict[str, int] | None = None,
    optimise: str = "-O1",
) -> Path:
    """Turn a Verilog module and its C++ bench into a program.

    The generated sources are compiled as one, which is four times as fast as one by one.

    Parameters
    ----------
    top : str
        Top module, in bench/ or in `verilog`.
    bench : str
        Name of the C++ file in bench/, without suffix.
    folder : Path
        Where to build; the runtime's objects in its parent are shared.
    verilog : Path
        Folder of the modules: the real ones or a mutant's.
    parameters : dict, optional
        Verilog parameters of the top module; the C++ bench gets them as macros.
    optimise : str
        Optimisation level of the C++ compiler: large arrays compile longer than they run.

    Returns
    -------
    Path
        The program.
    """
    folder.mkdir(parents=True, exist_ok=True)
    given = parameters or {}
    run(
        "verilator", "--cc", "-O3", "--x-initial", "unique", "-Wno-fatal", "-Wno-lint", "--top-module", top,
        *(f"-G{name}={value}" for name, value in given.items()),
        "-y", HERE / "bench", "-y", verilog, "--Mdir", folder, HERE / "bench" / "pe.vlt", f"{top}.v",
    )  # fmt: skip
    unity = folder / "unity.cc"
    parts = [*sorted(folder.glob("V*.cpp")), HERE / "bench" / f"{bench}.cpp"]
    unity.write_text("".join(f'#include "{part}"\n' for part in parts))
    include = verilator_root() / "include"
    program = folder / bench
    run(
        "g++", "-std=c++17", optimise, "-w", f"-I{include}", f"-I{include / 'vltstd'}", f"-I{folder}",
        *(f"-D{name}={value}" for name, value in given.items()),
        unity, *build_runtime(folder.parent), "-pthread", "-o", program,
    )  # fmt: skip
    return program
