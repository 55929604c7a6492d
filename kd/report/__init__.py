"""Summary, tables and page of an experiment."""

from kd.report.comparison import compare_objectives
from kd.report.formatting import cost_cells, cost_headings, gain_in_points, measured_with, share
from kd.report.page import write_report
from kd.report.summary import read_summary, summarize, title_of, write_summary
from kd.report.sweep import print_sweep, write_sweep
from kd.report.table import print_comparison, print_costs, print_summary
from kd.report.verdict import gain_sentence, paired_difference
