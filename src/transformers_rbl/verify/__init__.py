"""`rbl verify`: the library's contracts, checked on a user's own checkpoint and installation."""

from .contracts import CONTRACTS, LOADS
from .pictures import drawn_picture
from .report import FAILED, MEASURED, PASSED, SKIPPED, Check, Report
from .running import verify, verify_checkpoint
from .subject import ALL, OFF, Broken, Decoded, Skipped, Subject, stock_twin


__all__ = [
    "ALL",
    "CONTRACTS",
    "FAILED",
    "LOADS",
    "MEASURED",
    "OFF",
    "PASSED",
    "SKIPPED",
    "Broken",
    "Check",
    "Decoded",
    "Report",
    "Skipped",
    "Subject",
    "drawn_picture",
    "stock_twin",
    "verify",
    "verify_checkpoint",
]
