"""The house rules that a machine can check: imports go down only, and the public names exist."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import sysmt

PACKAGE = Path(sysmt.__file__).parent

# What each room may import from sysmt, besides itself. Ground-floor modules are importable by all.
GROUND = {"archives", "config", "errors", "files", "progress"}
MACHINE = {"hw", "cost", "scalesim"}
PASSES = {"nn.passes", "nn.torchvision_import", "nn.own_code"}
MAY_IMPORT = {
    "hw": set(),
    "cost": {"hw"},
    "scalesim": {"hw", "cost"},
    "quant": set(),
    "nn.passes": set(),
    "nn.torchvision_import": set(),
    "nn.own_code": {"nn.torchvision_import"},
    "nn.data": PASSES,
    "nn.batchnorm": PASSES | {"quant"},
    "nn.networks": PASSES | {"quant", "nn.data", "nn.batchnorm"},
    "nn.array": PASSES | MACHINE | {"quant", "nn.data", "nn.batchnorm", "nn.networks"},
    "nn.low_bit": PASSES | MACHINE | {"quant", "nn.data", "nn.batchnorm", "nn.networks", "nn.array"},
    "nn": {"nn.low_bit"},
    "study": MACHINE | {"quant", "nn"},
    "cli": MACHINE | {"quant", "nn", "study"},
    "__main__": {"cli"},
    **{room: set() for room in GROUND},
}
WITHOUT_TORCH = {*MACHINE, "quant", *GROUND}


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py*") if path.suffix in (".py", ".pyx", ".pyi"))


def room_of(path):
    """The folder below sysmt, or below nn; a module beside the folders is a room of its own."""
    return room_named(path.relative_to(PACKAGE).with_suffix("").parts)


def room_named(parts):
    parts = [part for part in parts if part != "__init__"] or ["__init__"]
    return ".".join(parts[:2]) if parts[0] == "nn" else parts[0]


def module_named(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


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
            allowed = MAY_IMPORT[room] | GROUND | {room}
            assert {room_named(rest), rest[0]} & allowed, f"{room} imports {name}, which is above it"
        elif room in WITHOUT_TORCH:
            allowed = {"torch"} if path.name == "logscale.py" else set()
            assert top not in {"torch", "torchvision"} - allowed, f"{room} imports {name}"


def test_every_room_is_known():
    rooms = {room_of(path) for path in modules()} - {"__init__"}
    assert rooms <= set(MAY_IMPORT)


def imports_by_module():
    """For each module the modules that it imports anywhere, for type hints and inside functions too."""
    paths = {module_named(path): path for path in modules() if path.suffix in (".py", ".pyx")}
    imports = {}
    for module, path in paths.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())) if path.suffix == ".py" else ():
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                children = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= children & paths.keys() or {node.module}
        imports[module] = found & paths.keys() - {module}
    return imports


def test_no_module_imports_itself_through_others():
    graphlib.TopologicalSorter(imports_by_module()).prepare()  # raises CycleError, which names the circle


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
