"""What is said after training: the summary and its table."""

from kd.report.comparison import compare_objectives, print_comparison
from kd.report.formatting import cost_cells, cost_headings, measured_with, share
from kd.report.page import read_summary, write_report
from kd.report.summary import gain_over, summarize, title_of, write_summary
from kd.report.sweep import print_sweep, write_sweep
from kd.report.table import print_costs, print_summary
from kd.report.verdict import gain_in_points, gain_sentence

__all__ = [
    "compare_objectives",
    "cost_cells",
    "cost_headings",
    "gain_in_points",
    "gain_over",
    "gain_sentence",
    "measured_with",
    "print_comparison",
    "print_costs",
    "print_summary",
    "print_sweep",
    "read_summary",
    "share",
    "summarize",
    "title_of",
    "write_report",
    "write_summary",
    "write_sweep",
]
