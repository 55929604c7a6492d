"""What is said after training: the summary and its table."""

from kd.report.summary import summarise, write_summary
from kd.report.table import gain_sentence, print_summary

__all__ = ["gain_sentence", "print_summary", "summarise", "write_summary"]
