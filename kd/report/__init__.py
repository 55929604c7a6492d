"""What is said after training: the summary and its table."""

from kd.report.comparison import compare_objectives, print_comparison
from kd.report.page import read_summary, write_report
from kd.report.summary import summarise, write_summary
from kd.report.sweep import print_sweep, write_sweep
from kd.report.table import print_summary
from kd.report.verdict import gain_sentence

__all__ = [
    "compare_objectives",
    "gain_sentence",
    "print_comparison",
    "print_summary",
    "print_sweep",
    "read_summary",
    "summarise",
    "write_report",
    "write_summary",
    "write_sweep",
]
