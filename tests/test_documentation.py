"""The README and docs/: examples run and print what stands below them, links lead somewhere.

The language of a fenced block says what is done with it:

- ``python`` is run, all blocks of a page in one namespace. A block ``text`` right after it is what it must
  print; without one it must print nothing.
- ``console``: each line that starts with ``$ sysmt`` is run, and must print what follows it.
- ``ini scale.cfg``, or any language and a name, is written to a file of that name, for the blocks after it.
- ``sh`` is not run, but every option of a `sysmt` command in it must exist.

Floats may differ by one percent, or by half a unit of their last digit; everything else must be equal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image
from typer.main import get_command

from sysmt.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FLOAT = re.compile(r"[-+]?\d[\d,]*\.\d+")


@dataclasses.dataclass
class Block:
    """A fenced block: its language, its text, and the line that its text starts at."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    return [Block(t.info.strip(), t.content, t.map[0] + 1) for t in tokens if t.type == "fence" and t.map]


PAGES_WITH_EXAMPLES = [
    page for page in PAGES if any(block.language in ("python", "console") for block in blocks(page))
]


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def assert_prints(printed: str, promised: str, where: str) -> None:
    """Compare two texts word by word; floats need agree only about."""
    words, expected = (re.sub(r"\s+", " ", text).strip() for text in (printed, promised))
    message = f"{where} prints\n{printed}\nand the page says\n{promised}"
    assert FLOAT.sub("#", words) == FLOAT.sub("#", expected), message
    for found, wanted in zip(FLOAT.findall(words), FLOAT.findall(expected), strict=True):
        last_digit = 10.0 ** -len(wanted.partition(".")[2])
        values = [float(number.replace(",", "")) for number in (found, wanted)]
        assert values[0] == pytest.approx(values[1], rel=0.01, abs=0.6 * last_digit), message


@pytest.fixture
def in_a_directory_with_photos(tmp_path, monkeypatch):
    """Examples of "your own images" find three classes of small photos in photos/, and nothing else."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label, name in enumerate(("bird", "cat", "dog")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(80 * label, 80 * label + 90, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(block: Block, page: Path, namespace: dict[str, object]) -> str:
    printed = io.StringIO()
    source = "\n" * block.line + block.text  # so that a traceback names the page's own line
    with contextlib.redirect_stdout(printed):
        exec(compile(source, str(page), "exec"), namespace)
    return printed.getvalue()


def run_console(block: Block, where: str) -> None:
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        line, _, promised = part.partition("\n")
        words = shlex.split(line, comments=True)
        assert words[0] == "sysmt", f"{where}: only sysmt can be run"
        done = subprocess.run(
            [sys.executable, "-m", *words], capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert_prints(done.stdout, promised, f"{where}: {line}")


@pytest.mark.parametrize("page", PAGES_WITH_EXAMPLES, ids=page_id)
def test_examples_print_what_the_page_says(page, in_a_directory_with_photos):
    namespace: dict[str, object] = {"__name__": "__main__"}
    found = blocks(page)
    for block, following in zip(found, [*found[1:], Block("", "", 0)], strict=True):
        where = f"{page_id(page)}, line {block.line}"
        language, _, file_name = block.language.partition(" ")
        if file_name:
            Path(file_name).write_text(block.text, encoding="utf-8")
        elif language == "python":
            promised = following.text if following.language == "text" else ""
            assert_prints(run_python(block, page, namespace), promised, where)
        elif language == "console":
            run_console(block, where)


def shell_lines() -> Iterator[tuple[Path, str]]:
    for page in [*PAGES, ROOT / "experiments" / "README.md", ROOT / "CONTRIBUTING.md"]:
        for block in blocks(page):
            if block.language in ("sh", "console"):
                text = block.text.replace("\\\n", " ")
                yield from ((page, line.removeprefix("$ ")) for line in text.splitlines())


def test_every_option_of_a_sysmt_command_exists():
    known = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in get_command(app).commands.items()
    }
    seen = 0
    for page, line in shell_lines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["sysmt"]:
            continue
        assert words[1] in known, f"{page_id(page)}: {line}"
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert options <= known[words[1]] | {"--debug", "--help"}, f"{page_id(page)}: {line}"
        seen += 1
    assert seen > 10


def test_links_to_files_lead_somewhere():
    """Outside docs/, that is: there Sphinx checks them."""
    link = re.compile(r"\]\(([^)#]+)[^)]*\)|(?:src|srcset)=\"([^\"]+)\"")
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*/README.md")]
    found = {
        page.parent / (first or second)
        for page in pages
        for first, second in link.findall(page.read_text(encoding="utf-8"))
        if "://" not in first
    }
    assert len(found) > 15
    assert sorted(path for path in found if not path.exists()) == []


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_the_picture_of_the_array_is_what_its_script_draws(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "figures")
    draw_array = importlib.import_module("draw_array")
    monkeypatch.setattr(draw_array, "HERE", tmp_path)
    draw_array.main()
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(drawn) == {"array-light.svg", "array-dark.svg"}
    for name, content in drawn.items():
        assert (ROOT / "docs" / "figures" / name).read_bytes() == content


@pytest.mark.parametrize(
    ("printed", "promised", "equal"),
    [
        ("2T: 24.31 %", "2T:  24.3  %", True),
        ("2T: 25.00 %", "2T: 24.3 %", False),
        ("3T: 24.3 %", "2T: 24.3 %", False),
        ("249,184 cycles", "249,184 cycles", True),
        ("249,185 cycles", "249,184 cycles", False),
        ("1.0 2.0", "1.0", False),
    ],
)
def test_floats_may_differ_a_little_and_nothing_else(printed, promised, equal):
    if equal:
        assert_prints(printed, promised, "here")
    else:
        with pytest.raises(AssertionError, match="here prints"):
            assert_prints(printed, promised, "here")
