"""`python scripts/testbeds COMMAND`, from the checkout's root."""

import sys
from pathlib import Path


sys.path[0] = str(Path(__file__).resolve().parents[1])  # scripts/, as Python has it for a script that lies there

from testbeds.commands import app  # noqa: E402


app()
