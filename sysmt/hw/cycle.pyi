import numpy as np

from sysmt.config import ArrayConfig
from sysmt.hw.activity import Activity
from sysmt.hw.stats import Counters

def simulate(a: np.ndarray, b: np.ndarray, config: ArrayConfig) -> tuple[np.ndarray, Counters, Activity]: ...
