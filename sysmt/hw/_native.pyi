import numpy as np

def fingerprint(values: np.ndarray, cpu_threads: int) -> int: ...
def keep_heap() -> None: ...
def path_names() -> tuple[str, ...]: ...

class Layer:
    is_timed: bool
    nanoseconds: tuple[int, ...]
    ran_on: str | None
    def __init__(
        self,
        path: str,
        shape: tuple[int, ...],
        rule: dict[str, int],
        weights: np.ndarray,
        k_of: np.ndarray,
    ) -> None: ...
    @property
    def weight_bytes(self) -> int: ...
    def run(
        self,
        x: np.ndarray,
        out: np.ndarray,
        *,
        inverse_scale: float = 1.0,
        scale: np.ndarray | None = None,
        bias: np.ndarray | None = None,
        gain: np.ndarray | None = None,
        shift: np.ndarray | None = None,
        relu: bool = False,
        cpu_threads: int = 1,
        count: bool = True,
    ) -> tuple[tuple[int, ...], int, int, bool, bool]: ...
