"""What is said after training: the summary and its table."""

from kd.report.comparison import compare_objectives, print_comparison
from kd.report.page import read_summary, write_report
from kd.report.summary import gain_over, summarise, title_of, write_summary
from kd.report.sweep import print_sweep, write_sweep
from kd.report.table import print_prices, print_summary
from kd.report.verdict import gain_in_points, gain_sentence
from kd.report.words import measured_with, price_cells, price_headings, share

__all__ = [
    "compare_objectives",
    "gain_in_points",
    "gain_over",
    "gain_sentence",
    "measured_with",
    "price_cells",
    "price_headings",
    "print_comparison",
    "print_prices",
    "print_summary",
    "print_sweep",
    "read_summary",
    "share",
    "summarise",
    "title_of",
    "write_report",
    "write_summary",
    "write_sweep",
]
