"""From plain data to pictures and one HTML page. Nothing here loads torch."""

from fedkl.report.audit_page import write_audit_page
from fedkl.report.curves import arms_curves, run_curves
from fedkl.report.page import write_report

__all__ = ["arms_curves", "run_curves", "write_audit_page", "write_report"]
