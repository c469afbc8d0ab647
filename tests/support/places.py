"""Where things lie that tests read: the repository, figures recorded from SCALE-Sim, data to measure on."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
RECORDED_SCALESIM = REPOSITORY / "tests" / "scalesim" / "recorded"
SHARED = Path(os.environ.get("SYSMT_DATA") or REPOSITORY.parent / "shared" / "data")
