"""torch's fast path of attention layers, which reads weights past the modules that hold them."""

from __future__ import annotations

import threading

import torch

__all__ = ["FAST_PATH"]


class _FastPath:
    """Keeps torch's global switch off as long as some simulation needs it off.

    With the fast path on, `nn.TransformerEncoderLayer` computes its Linear layers without calling them:
    they would run in float, uncounted.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = True

    def switch_off(self) -> None:
        """Count one more user, and remember at the first what the switch was."""
        with self._lock:
            if self._users == 0:
                self._before = torch.backends.mha.get_fastpath_enabled()
            self._users += 1
            torch.backends.mha.set_fastpath_enabled(False)

    def keep_off(self) -> None:
        """Switch it off again where somebody else has switched it on meanwhile."""
        if torch.backends.mha.get_fastpath_enabled():
            torch.backends.mha.set_fastpath_enabled(False)

    def release(self) -> None:
        """Count one user less, and restore the switch after the last."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                torch.backends.mha.set_fastpath_enabled(self._before)


FAST_PATH = _FastPath()
"""The one switch of this process."""
