"""SCALE-Sim's topology files: the layers of a network as CSV, convolutions or GEMMs.

Formats of SCALE-Sim v2 and v3 (Samajdar et al., arXiv 1811.02883; their reader is
``scalesim/topology_utils.py``). A convolution's line is ``Layer name, IFMAP Height, IFMAP Width, Filter
Height, Filter Width, Channels, Num Filter, Strides,`` with an optional ``Sparsity`` (N:M); a GEMM's is
``Layer, M, N, K,`` with the same. Columns are found by their names, in any order; lines may end in a comma.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sysmt.cost.layer_shape import Layer
from sysmt.errors import ConfigError
from sysmt.scalesim.text_file import Field, integer, read_lines

__all__ = ["DEPTHWISE_MARK", "read_topology", "topology_csv"]

DEPTHWISE_MARK = "DP"
"""A convolution with this in its name is depthwise: SCALE-Sim runs it as one layer per channel."""

_NAME, _STRIDE, _SPARSITY = "layer name", "strides", "sparsity"
_CONV = ("ifmap height", "ifmap width", "filter height", "filter width", "channels", "num filter")
_GEMM = ("m", "n", "k")
_TITLES = {
    "layer": _NAME,
    "layername": _NAME,
    "name": _NAME,
    "stride": _STRIDE,
    "stride height": "stride height",
    "stride width": "stride width",
    "num filters": "num filter",
    "number of filters": "num filter",
    "channel": "channels",
    "sparsity ratio": _SPARSITY,
}
_KNOWN = (_NAME, *_CONV, _STRIDE, "stride height", "stride width", _SPARSITY, *_GEMM)


def read_topology(path: str | Path) -> list[Layer]:
    """Read a topology file.

    A depthwise layer (`DEPTHWISE_MARK` in its name) becomes one layer per channel, named
    ``<name>Channel_<i>``, as in SCALE-Sim.

    Parameters
    ----------
    path : str or Path
        CSV in UTF-8; the first line that is not empty names the columns.

    Returns
    -------
    list of Layer

    Raises
    ------
    ConfigError
        Naming file, line and column, if a column is missing, unknown or twice there, or a value is missing,
        too many, no integer, not positive, or does not fit the others; or if there is no layer at all.
    """
    lines = [
        _cells(text, str(path), number) for number, text in enumerate(read_lines(path), 1) if text.strip()
    ]
    if not lines:
        raise ConfigError(f"{path}, line 1, column 1: the file is empty; a line with column names is needed")
    header, *rows = lines
    titles = _read_header(header)
    if not rows:
        raise header[0].error("no layer follows the column names")
    return [layer for row in rows for layer in _read_row(row, titles)]


def _cells(text: str, path: str, line: int) -> list[Field]:
    """Cut a line at its commas; an empty cell after the last comma is dropped."""
    cells, at = [], 0
    for cell in text.split(","):
        blank = len(cell) - len(cell.lstrip())
        cells.append(Field(cell.strip(), path, line, at + blank + 1))
        at += len(cell) + 1
    return cells if cells[-1].text else cells[:-1]


def _read_header(cells: Sequence[Field]) -> list[str]:
    titles: list[str] = []
    for cell in cells:
        plain = " ".join(re.sub(r"[_\s]+", " ", cell.text).lower().split())
        title = _TITLES.get(plain, plain)
        if title not in _KNOWN:
            raise cell.error(
                f"{cell.text!r} is no column of a topology; known: layer name, {', '.join(_CONV)}, "
                "strides, sparsity; or layer, m, n, k"
            )
        if title in titles:
            raise cell.error(f"column {cell.text!r} is there twice")
        titles.append(title)
    gemm = any(title in _GEMM for title in titles)
    needed = [_NAME, *(_GEMM if gemm else _CONV)]
    if not gemm and not {"stride height", "stride width"} <= set(titles):
        needed.append(_STRIDE)
    last = cells[-1]
    for title in needed:
        if title not in titles:
            end = Field("", last.path, last.line, last.column + len(last.text))
            raise end.error(f"column {title!r} is missing; {', '.join(needed)} are needed")
    for title in titles:
        if title not in (*needed, _SPARSITY, "stride height", "stride width") or (gemm and "stride" in title):
            raise cells[titles.index(title)].error(
                f"column {title!r} does not belong to a {'GEMM' if gemm else 'convolution'} topology"
            )
    return titles


def _read_row(cells: list[Field], titles: list[str]) -> Iterator[Layer]:
    optional = titles[-1] == _SPARSITY
    if len(cells) > len(titles):
        surplus = cells[len(titles)]
        raise surplus.error(f"{surplus.text!r} is one value too many; the file names {len(titles)} columns")
    if len(cells) < len(titles) - optional:
        end, missing = cells[-1] if cells else None, titles[len(cells)]
        assert end is not None
        place = Field("", end.path, end.line, end.column + len(end.text), missing)
        raise place.error(f"{len(cells)} values; {len(titles)} are needed, one is missing")
    values = {
        title: Field(cell.text, cell.path, cell.line, cell.column, title)
        for title, cell in zip(titles, cells, strict=False)
    }
    name = values[_NAME].text
    if not name:
        raise values[_NAME].error("the layer has no name")
    density = _density(values.get(_SPARSITY))
    sizes = {title: integer(field, 1) for title, field in values.items() if title not in (_NAME, _SPARSITY)}
    if "m" in sizes:
        yield Layer.gemm(name, sizes["m"], sizes["n"], sizes["k"], density)
        return
    for axis in ("height", "width"):
        if sizes[f"filter {axis}"] > sizes[f"ifmap {axis}"]:
            raise values[f"filter {axis}"].error(
                f"{sizes[f'filter {axis}']} is larger than the input's {sizes[f'ifmap {axis}']}"
            )
    depthwise = DEPTHWISE_MARK in name
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
    if depthwise:
        yield from (layer.renamed(f"{name}Channel_{index}") for index in range(sizes["channels"]))
    else:
        yield layer


def _density(field: Field | None) -> tuple[int, int]:
    if field is None:
        return 1, 1
    match = re.fullmatch(r"(\d+)\s*:\s*(\d+)", field.text)
    if match is None:
        raise field.error(f"{field.text!r} is no N:M, such as 2:4")
    kept, of = int(match[1]), int(match[2])
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
