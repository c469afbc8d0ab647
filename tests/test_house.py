"""The house rules that a machine can check: imports go down only, and the public names exist."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sysmt

PACKAGE = Path(sysmt.__file__).parent

# What each room may import from sysmt. Ground-floor modules are importable by all.
GROUND = {"config", "errors", "files", "progress"}
MAY_IMPORT = {
    "hw": {"hw"},
    "quant": {"quant"},
    "nn": {"nn", "quant", "hw"},
    "study": {"study", "nn", "quant", "hw"},
    "cli": {"cli", "study", "nn", "quant", "hw"},
    "__main__": {"cli"},
    "config": set(),
    "errors": set(),
    "files": set(),
    "progress": set(),
}


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py*") if path.suffix in (".py", ".pyx", ".pyi"))


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_names(path):
    if path.suffix == ".pyx":  # Cython syntax is not Python's; its imports are one a line
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"], ["cimport"]):
                yield words[1]
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module
            if node.module == "sysmt":
                yield from (f"sysmt.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    room = room_of(path)
    if room == "__init__":
        return
    for name in imported_names(path):
        top, *rest = name.split(".")
        if top == "sysmt" and rest:
            if rest[0] in sysmt.__all__ and rest[0] not in GROUND | set(MAY_IMPORT):
                continue
            assert rest[0] in MAY_IMPORT[room] | GROUND, f"{room} imports {name}, which is above it"
        elif room in ("hw", "quant", *GROUND):
            allowed = {"torch"} if path.name == "logscale.py" else set()
            assert top not in {"torch", "torchvision"} - allowed, f"{room} imports {name}"


def test_every_room_is_known():
    rooms = {room_of(path) for path in modules()} - {"__init__"}
    assert rooms <= set(MAY_IMPORT)


def test_all_names_exist_and_are_sorted():
    assert list(sysmt.__all__) == sorted(sysmt.__all__)
    for name in sysmt.__all__:
        assert getattr(sysmt, name) is not None
    assert set(sysmt._HOME_OF) | {"__version__"} == set(sysmt.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="simulate_conv"):
        _ = sysmt.simulate_conv


@pytest.mark.parametrize(
    "path", [p for p in modules() if p.suffix == ".py"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_all_lists_only_what_the_module_defines(path):
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            listed = set(ast.literal_eval(node.value))
            break
    else:
        return
    if room_of(path) == "__init__":
        return
    defined = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {alias.asname or alias.name for alias in node.names}
    assert listed <= defined


def test_the_machine_does_not_load_torch():
    code = "import sys, sysmt.hw.gemm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
