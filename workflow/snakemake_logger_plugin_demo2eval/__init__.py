"""By its name Snakemake finds the logger `demo2eval` here."""

from demo2eval.screen import LogHandler

__all__ = ["LogHandler"]
