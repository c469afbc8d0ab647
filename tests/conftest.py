"""What all tests start with."""

import os

# An error that nobody has foreseen is a traceback in the tests, never a line on stderr.
os.environ.setdefault("SYSMT_RAISE", "1")
