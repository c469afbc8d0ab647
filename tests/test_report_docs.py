"""Every column of every report is defined in docs/reports.md."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import sysmt
from sysmt.cost.energy import TABLES, load_table
from sysmt.cost.layer_shape import Layer
from sysmt.cost.memory import Memory
from sysmt.hw.trace import CSV_COLUMNS, trace_tile
from sysmt.scalesim.reports import REPORTS, smt_row
from sysmt.scalesim.simulate import draw_operands, simulate_layer
from sysmt.study.evaluate import array_facts
from sysmt.study.plots.trace import pe_table

DOCS = (Path(__file__).parent.parent / "docs" / "reports.md").read_text()
NAMED = set(re.findall(r"`([^`]+)`", DOCS)) | {f"active_{c}" for c in range(5)}


@pytest.mark.parametrize("name", TABLES)
def test_topology_reports(name):
    layer, table = Layer.gemm("x", 4, 5, 6), load_table(name)
    result = simulate_layer(layer, draw_operands(layer, 1, 1), sysmt.ArrayConfig(), Memory(), table)
    headers = [report([result]).splitlines()[0].split(",") for report in REPORTS.values()]
    columns = {cell.strip() for header in headers for cell in header} - {""}
    columns |= set(smt_row(result, table.unit))
    assert columns <= NAMED, columns - NAMED


def test_network_reports():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.Conv2d(1, 1, 1))
    with sysmt.attach(model, errors=True) as sim:
        columns = set(sim.report().columns) | set(array_facts(sim, clock_mhz=500.0))
    assert columns <= NAMED, columns - NAMED


def test_trace_files():
    a, b = np.ones((2, 3), np.uint8), np.ones((3, 2), np.int8)
    columns = set(CSV_COLUMNS) | set(pe_table(trace_tile(a, b, sysmt.ArrayConfig(2, 2, 2)).activity).columns)
    assert columns <= NAMED, columns - NAMED
