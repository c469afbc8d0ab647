"""Run SCALE-Sim 3.0.0 itself: ``python record.py CONFIG TOPOLOGY OUT conv|gemm``, where it is installed.

Makes OUT/<run_name>/ with SCALE-Sim's reports. The figures in this directory were recorded so; the slow test
in tests/scalesim/test_scalesim.py does it again, live.
"""

import sys
import tempfile
from pathlib import Path

from scalesim.scale_sim import scalesim

config, topology, out, kind = sys.argv[1:]
with tempfile.TemporaryDirectory() as scratch:
    layout = Path(scratch, "layout.csv")
    layout.write_text("Layer name,\n")  # SCALE-Sim wants one even where layouts are off
    run = scalesim(
        save_disk_space=True,
        verbose=False,
        config=config,
        topology=topology,
        layout=str(layout),
        input_type_gemm=kind == "gemm",
    )
    run.run_scale(top_path=out)
