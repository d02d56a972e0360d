"""From plain data to pictures and one HTML page. Nothing here loads torch."""

from fedkl.report.audit_page import write_audit_page
from fedkl.report.curves import arms_curves, run_curves
from fedkl.report.page import write_report
from fedkl.report.spectrum import spectrum_plot

__all__ = ["arms_curves", "run_curves", "spectrum_plot", "write_audit_page", "write_report"]
