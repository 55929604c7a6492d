"""Summary, tables and page of an experiment."""

from kd.report.page import PICTURES, write_report
from kd.report.summary import read_summary, summarize, title_of, write_summary
from kd.report.sweep import print_sweep, write_sweep
from kd.report.tables import (
    cost_cells,
    cost_headings,
    gain_in_points,
    measured_with,
    print_comparison,
    print_costs,
    print_summary,
    share,
)
from kd.report.verdict import best_score_of, compare_objectives, gain_sentence, paired_difference
