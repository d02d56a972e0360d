"""The audit: attacks what clients really send, with controls, and says what a defense is worth."""

from fedkl.audit.cells import Event
from fedkl.audit.config import CONTROLS, STAGES, AuditConfig
from fedkl.audit.grid import run_audit
from fedkl.audit.verdicts import EXIT_CODES, overall, summarize

__all__ = [
    "CONTROLS",
    "EXIT_CODES",
    "STAGES",
    "AuditConfig",
    "Event",
    "overall",
    "run_audit",
    "summarize",
]
