"""SCALE-Sim's topology files: the layers of a network as CSV, convolutions or GEMMs.

Formats of SCALE-Sim v1 to v3 (Samajdar et al., arXiv 1811.02883; their reader is
``scalesim/topology_utils.py``). A convolution's line is ``Layer name, IFMAP Height, IFMAP Width, Filter
Height, Filter Width, Channels, Num Filter, Strides,`` with an optional ``Sparsity`` (N:M) and ``Batch size``;
a GEMM's is ``Layer, M, N, K,`` with the same. Columns are found by their names, in any order; lines may end
in a comma. What spreadsheets and people add (Windows line ends, empty cells, blank rows, comments) is read
over, and named in `Topology.notes`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from sysmt.cost.layer_shape import Layer
from sysmt.errors import ConfigError
from sysmt.hw.operands import MAX_K
from sysmt.scalesim.text_file import Field, integer, misplaced, read_lines

__all__ = ["DEPTHWISE_MARK", "Topology", "read_topology", "topology_csv", "whole_name"]

DEPTHWISE_MARK = "DP"
"""A convolution with this in its name is depthwise: SCALE-Sim runs it as one layer per channel."""

MOST_PARTS = 65_536
"""Most channels of a depthwise layer, and most images of a batch: each becomes a layer of its own."""

LARGEST_BLOCK = 1024
"""Largest M of an N:M sparsity."""

MOST_MACS = 2**62
"""Most multiplications of a layer: its counters are 64-bit integers."""

_NAME, _STRIDE, _SPARSITY, _BATCH = "layer name", "strides", "sparsity", "batch size"
_CONV = ("ifmap height", "ifmap width", "filter height", "filter width", "channels", "num filter")
_GEMM = ("m", "n", "k")
_STRIDES = ("stride height", "stride width")
_OPTIONAL = (_SPARSITY, _BATCH)
_TITLES = {
    "l": _NAME,
    "layer": _NAME,
    "layername": _NAME,
    "name": _NAME,
    "stride": _STRIDE,
    "num filters": "num filter",
    "number of filters": "num filter",
    "channel": "channels",
    "sparsity ratio": _SPARSITY,
    "batch": _BATCH,
    "batchsize": _BATCH,
}
_KNOWN = (_NAME, *_CONV, _STRIDE, *_STRIDES, *_OPTIONAL, *_GEMM)
_PARTS = {"Channel_": "channels", "_group": "groups", "_image": "images"}
_SEPARATORS = {"\t": "tabs", ";": "semicolons"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """The layers of a topology file.

    Attributes
    ----------
    layers : tuple of Layer
        In the file's order; each channel of a depthwise layer and each image of a batch is one.
    cells : tuple of mapping of str to Field
        The line that each layer comes from: its cells by column.
    notes : tuple of str
        What is read in another way than it is written, with the lines.
    """

    layers: tuple[Layer, ...]
    cells: tuple[Mapping[str, Field], ...]
    notes: tuple[str, ...] = ()

    def check_values(self) -> None:
        """Make sure that every layer can be simulated with values, before the first one is.

        Raises
        ------
        ConfigError
            Naming file, line and column, if K is above 65,535, or operands and results are larger than the
            memory of this machine.
        """
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for layer, cells in zip(self.layers, self.cells, strict=True):
            if layer.k > MAX_K:
                sizes = f"{layer.channels} x {layer.filter_height} x {layer.filter_width}"
                made = "" if "k" in cells else f", channels times filter: {sizes}"
                raise cells["k" if "k" in cells else "channels"].error(
                    f"K={layer.k}{made}, could overflow a 32-bit accumulator; K must be at most {MAX_K}"
                )
            needed = layer.m * layer.k + layer.k * layer.n + 4 * layer.m * layer.n
            if needed > there:
                raise cells[_NAME].error(
                    f"operands and results of layer {layer.name!r} (M={layer.m}, N={layer.n}, K={layer.k}) "
                    f"take {needed / 2**30:,.1f} GiB; this machine has {there / 2**30:,.1f}"
                )


def read_topology(path: str | Path) -> Topology:
    """Read a topology file.

    A depthwise layer (`DEPTHWISE_MARK` in its name) becomes one layer per channel, named
    ``<name>Channel_<i>``, as in SCALE-Sim. A layer with a batch size of more than 1 becomes as many layers,
    named ``<name>_image<i>``.

    Parameters
    ----------
    path : str or Path
        CSV in UTF-8; the first line that is not empty names the columns.

    Returns
    -------
    Topology

    Raises
    ------
    ConfigError
        Naming file, line and column, if a column is missing, unknown or twice there, or a value is missing,
        too many, no integer, not positive, beyond 2,147,483,647 or does not fit the others; or if there is no
        layer at all.
    """
    notes = _Notes(str(path))
    lines = [
        cells
        for number, text in enumerate(read_lines(path), 1)
        if (cells := _cells(text, str(path), number, notes))
    ]
    if not lines:
        raise ConfigError(f"{path}, line 1, column 1: the file is empty; a line with column names is needed")
    header, *rows = lines
    titles = _read_header(header, notes)
    if not rows:
        raise header[0].error("no layer follows the column names")
    found = [(layer, cells) for row in rows for layer, cells in _read_row(row, titles, notes)]
    return Topology(tuple(x for x, _ in found), tuple(x for _, x in found), notes.lines())


class _Notes:
    """What was read in another way than it is written: one note for all lines of the same kind."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.found: dict[str, list[int]] = {}

    def add(self, what: str, line: int) -> None:
        self.found.setdefault(what, []).append(line)

    def lines(self) -> tuple[str, ...]:
        return tuple(f"{self.path}, {_lines(at)}: {what}" for what, at in self.found.items())


def _lines(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"line {numbers[0]}"
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"lines {', '.join(map(str, numbers[:5]))}{more}"


def _cells(text: str, path: str, line: int, notes: _Notes) -> list[Field]:
    """Cut a line at its commas; empty cells at its end and a comment there are dropped."""
    cells: list[Field] = []
    at = 0
    for cell in text.split(","):
        blank = len(cell) - len(cell.lstrip())
        # A layer's name may have the sign in it; every other cell ends there.
        comment = re.search(r"(^|\s)#" if cells else r"^\s*#", cell)
        kept = cell[: comment.start()] if comment else cell
        cells.append(Field(kept.strip(), path, line, at + blank + 1))
        if comment:
            notes.add("what follows a # is a comment", line)
            break
        at += len(cell) + 1
    given = len(cells)
    while cells and not cells[-1].text:
        cells.pop()
    if not cells and given > 1:
        notes.add("a line of commas is a blank line", line)
    elif cells and given > len(cells) + 1:
        notes.add("empty cells at the end are dropped", line)
    if len(cells) == 1:
        for sign, called in _SEPARATORS.items():
            if sign in text:
                raise misplaced(
                    path,
                    line,
                    text.index(sign) + 1,
                    f"the cells are separated by {called}; commas are needed",
                )
    return cells


def _read_header(cells: Sequence[Field], notes: _Notes) -> list[str]:
    names = [" ".join(re.sub(r"[_\s]+", " ", cell.text).lower().split()) for cell in cells]
    found = [_TITLES.get(name, name) for name in names]
    titles: list[str] = []
    for cell, title in zip(cells, found, strict=True):
        if title not in _KNOWN:
            what = f"column {cell.text!r} is unknown" if cell.text else "the name of this column is empty"
            raise cell.error(
                f"{what}; known: layer name, {', '.join(_CONV)}, strides; or layer, m, n, k; "
                "and sparsity, batch size"
            )
        if title in titles:
            axis, tall = title.removesuffix(" width"), title.replace(" width", " height")
            if not title.endswith(" width") or tall in found or titles.count(title) > 1:
                raise cell.error(f"column {cell.text!r} is there twice")
            titles[titles.index(title)] = tall
            notes.add(f"{axis} width is there twice; the first is its height, as in SCALE-Sim", cell.line)
        titles.append(title)
    gemm = any(title in _GEMM for title in titles)
    needed = [_NAME, *(_GEMM if gemm else _CONV)]
    if not gemm and not set(_STRIDES) <= set(titles):
        needed.append(_STRIDE)
    last = cells[-1]
    for title in needed:
        if title not in titles:
            end = Field("", last.path, last.line, last.column + len(last.text))
            raise end.error(f"column {title!r} is missing; {', '.join(needed)} are needed")
    for title in titles:
        if title not in (*needed, *_OPTIONAL, *_STRIDES) or (gemm and "stride" in title):
            raise cells[titles.index(title)].error(
                f"column {title!r} does not belong to a {'GEMM' if gemm else 'convolution'} topology"
            )
    order = [title for title in titles if title in needed]
    if order != needed:
        notes.add(f"columns are read by their names ({', '.join(order)}), not by their places", last.line)
    return titles


def _read_row(
    cells: list[Field], titles: list[str], notes: _Notes
) -> Iterator[tuple[Layer, Mapping[str, Field]]]:
    if len(cells) > len(titles):
        surplus = cells[len(titles)]
        raise surplus.error(
            f"{surplus.text!r} is one value too many; the file names {len(titles)} columns"
            if surplus.text
            else f"{len(cells)} cells, this one empty; the file names {len(titles)} columns"
        )
    missing = [title for title in titles[len(cells) :] if title not in _OPTIONAL]
    if missing:
        end = cells[-1]
        place = Field("", end.path, end.line, end.column + len(end.text), missing[0])
        raise place.error(f"{len(cells)} values; {len(titles)} are needed, one is missing")
    values = {
        title: dataclasses.replace(cell, name=title) for title, cell in zip(titles, cells, strict=False)
    }
    for title in _OPTIONAL:
        if title in titles and (title not in values or not values[title].text):
            values.pop(title, None)
            notes.add(f"{title} is missing; 1{':1' if title == _SPARSITY else ''} is taken", cells[0].line)
    for layer in _layers(values):
        if layer.macs > MOST_MACS:
            raise values[_NAME].error(
                f"layer {layer.name!r} of M={layer.m}, N={layer.n}, K={layer.k} has more than 2^62 MACs"
            )
        yield layer, values


def _layers(values: Mapping[str, Field]) -> Iterator[Layer]:
    """Make the layers of one line: of each image of the batch, and of each channel of a depthwise layer."""
    name = values[_NAME].text
    if not name:
        raise values[_NAME].error("the layer has no name")
    density = _density(values.get(_SPARSITY))
    images = integer(values[_BATCH], 1, MOST_PARTS) if _BATCH in values else 1
    depthwise = "m" not in values and DEPTHWISE_MARK in name
    sizes = {
        title: integer(field, 1, MOST_PARTS) if depthwise and title == "channels" else integer(field, 1)
        for title, field in values.items()
        if title not in (_NAME, *_OPTIONAL)
    }
    if "m" in sizes:
        layer = Layer.gemm(name, sizes["m"], sizes["n"], sizes["k"], density)
    else:
        for axis in ("height", "width"):
            if sizes[f"filter {axis}"] > sizes[f"ifmap {axis}"]:
                raise values[f"filter {axis}"].error(
                    f"{sizes[f'filter {axis}']} is larger than the input's {sizes[f'ifmap {axis}']}"
                )
        layer = Layer(
            name,
            sizes["ifmap height"],
            sizes["ifmap width"],
            sizes["filter height"],
            sizes["filter width"],
            channels=1 if depthwise else sizes["channels"],
            filters=sizes["num filter"],
            stride_height=sizes.get("stride height", sizes.get(_STRIDE, 1)),
            stride_width=sizes.get("stride width", sizes.get(_STRIDE, 1)),
            density=density,
        )
    for image in range(images):
        one = layer if images == 1 else layer.renamed(f"{name}_image{image}")
        if depthwise:
            yield from (one.renamed(f"{one.name}Channel_{index}") for index in range(sizes["channels"]))
        else:
            yield one


def whole_name(name: str) -> tuple[str, str]:
    """Split off what a name says of being one of many: a depthwise channel, a group, or an image of a batch.

    Returns
    -------
    (str, str)
        The name without it, and what there are many of: "channels", "groups", "images", or nothing.
    """
    for ending, many in _PARTS.items():
        if match := re.fullmatch(rf"(.+){ending}[0-9]+", name):
            if many == "channels" and DEPTHWISE_MARK not in name:
                continue
            return whole_name(match[1])[0], many
    return name, ""


def _density(field: Field | None) -> tuple[int, int]:
    if field is None:
        return 1, 1
    match = re.fullmatch(r"([0-9]+)\s*:\s*([0-9]+)", field.text)
    if match is None:
        raise field.error(f"{field.text!r} is no N:M, such as 2:4")
    kept, of = (
        integer(
            dataclasses.replace(field, text=match[part], column=field.column + match.start(part)),
            0,
            LARGEST_BLOCK,
        )
        for part in (1, 2)
    )
    if not 1 <= kept <= of:
        raise field.error(f"{field.text!r} is impossible: of M weights in a row N stay, 1 <= N <= M")
    return kept, of


def topology_csv(layers: Iterable[tuple[Layer, int]]) -> str:
    """Write a convolution topology as SCALE-Sim reads it.

    Parameters
    ----------
    layers : iterable of (Layer, int)
        A layer and its groups: groups of one channel each, at least two of them, make one depthwise line;
        other groups make a line each, named ``<name>_group<i>``.

    Returns
    -------
    str

    Raises
    ------
    ConfigError
        If a name has a comma or `DEPTHWISE_MARK` in it without being depthwise, or the strides differ.
    """
    text = (
        "Layer name, IFMAP Height, IFMAP Width, Filter Height, Filter Width, Channels, Num Filter, Strides,\n"
    )
    for layer, groups in layers:
        if layer.stride_height != layer.stride_width:
            raise ConfigError(
                f"layer {layer.name!r} has strides {layer.stride_height} and {layer.stride_width}; "
                "a topology has one for both"
            )
        depthwise = groups > 1 and layer.channels == 1
        if "," in layer.name or (DEPTHWISE_MARK in layer.name) != depthwise:
            raise ConfigError(
                f"layer name {layer.name!r} would be misread: no commas, and {DEPTHWISE_MARK!r} "
                "in just the names of depthwise layers"
            )
        lines = 1 if depthwise else groups
        for line in range(lines):
            name = layer.name if lines == 1 else f"{layer.name}_group{line}"
            channels = groups if depthwise else layer.channels
            sizes = (*layer.ifmap, layer.filter_height, layer.filter_width, channels, layer.filters)
            text += f"{name}, {', '.join(map(str, sizes))}, {layer.stride_height},\n"
    return text
