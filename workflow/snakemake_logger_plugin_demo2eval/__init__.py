"""What Snakemake shows on the screen: a line per job, and one sentence for each that fails.

The profile names it (`logger: demo2eval`), and Snakemake finds it by the name of this package. A
dry run shows the jobs as Snakemake does, and `--verbose` all that it says; its own log in
.snakemake/log has that in any case.

Nothing of the package demo2eval is imported here: the Snakefile imports that of its own folder.
"""

import contextlib
import logging
import re
import sys
import textwrap
import time
from pathlib import Path

from snakemake.logging import ColorizingTextHandler, DefaultFilter, DefaultFormatter
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

SENTENCE = "demo2eval: error: "
CLEAR_LINE = "\r\x1b[K"
LONGEST = 380
"""Characters of a sentence: five lines of a terminal."""
NOISE = re.compile(
    r"host: |Building DAG|Using shell|Provided |Rules claiming|Assuming unrestricted|Select jobs"
    r"|Execute \d|Shutting down|Exiting because|Complete log|DAG of jobs will be updated"
    r"|Config file .* is extended|Group jobs|Conda environments|Singularity|Elapsed time"
    r"|Removing output files of failed job|Trying to restart job|At least one job|None$|$"
)
SHOWN = (None, LogEvent.RUN_INFO, LogEvent.JOB_INFO, LogEvent.PROGRESS)
HEADER = re.compile(
    r"^ *(Error|WorkflowError|InputFunctionException|MissingRuleException)"
    r'( in rule \w+)?( in file ".*", line \d+)?:$'
)
TRACE = re.compile(r'^ *File ".*", line \d+, in |^(Traceback|Wildcards):$|^  \w+=')
"""Where in the workflow an error was raised; the wildcards stand in its words."""


class LogHandler(LogHandlerBase):
    """Snakemake's handler for the screen, with fewer words."""

    def __post_init__(self) -> None:
        settings = self.common_settings
        self._screen = ColorizingTextHandler(
            nocolor=settings.nocolor, stream=sys.stdout if settings.stdout else sys.stderr
        )
        self._full = DefaultFormatter(settings.quiet, settings.show_failed_logs)
        self._brief = BriefFormatter(settings.quiet)
        self._verbose, self._dryrun = settings.verbose, settings.dryrun
        self._said: set[str] = set()
        self._waiting: list[str] = []
        self.addFilter(
            DefaultFilter(
                settings.quiet,
                settings.debug_dag,
                settings.verbose,
                settings.dryrun,
                settings.printshellcmds,
            )
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message, if it is worth it."""
        event = getattr(record, "event", None)
        # A dry run is asked for all that is to be known of the jobs.
        is_full = self._verbose or (self._dryrun and record.levelno < logging.ERROR)
        text = (self._full if is_full else self._brief).format(record)
        if not self._verbose and not self._is_worth(record, text):
            return
        if event == LogEvent.RUN_INFO and " jobs: " in text:
            # Shown when a job starts: something may be in its way.
            self._waiting = [text]
            return
        if event == LogEvent.JOB_INFO:
            text = "\n".join([*self._waiting, text])
            self._waiting = []
        clear = CLEAR_LINE if self._screen.is_tty else ""
        # Nobody may read any more, as with `| head`.
        with contextlib.suppress(BrokenPipeError):
            self._screen.stream.write(f"{clear}{self._screen.decorate(record, text)}\n")
            self._screen.flush()

    def _is_worth(self, record: logging.LogRecord, text: str) -> bool:
        if NOISE.match(text):
            return False
        if record.levelno < logging.WARNING:
            event = getattr(record, "event", None)
            return event in SHOWN or (self._dryrun and event != LogEvent.WORKFLOW_STARTED)
        # Of a job that failed another message gives the reason; tried again, it may fail again.
        if "CalledProcessError" in text or text in self._said:
            return False
        self._said.add(text)
        return True

    @property
    def writes_to_stream(self) -> bool:
        return True

    @property
    def writes_to_file(self) -> bool:
        return False

    @property
    def has_filter(self) -> bool:
        return True

    @property
    def has_formatter(self) -> bool:
        return True

    @property
    def needs_rulegraph(self) -> bool:
        return False


class BriefFormatter(DefaultFormatter):
    """Formats what happens in few words, and errors without where they were raised."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a message; "" for one without any."""
        event, now = getattr(record, "event", None), time.strftime("%H:%M:%S")
        fields = record.__dict__
        if event == LogEvent.JOB_ERROR:
            return describe_failure(fields["rule_name"], fields["log"])
        if record.levelno >= logging.ERROR:
            return strip_location(str(record.msg))
        if event == LogEvent.JOB_INFO:
            return f"{now} {fields['rule_name']} {' '.join(fields['output'][:1])}"
        if event == LogEvent.PROGRESS:
            return f"{now} {fields['done']} of {fields['total']} jobs done"
        if event == LogEvent.RUN_INFO and "stats" in fields:
            stats = dict(fields["stats"])
            total = stats.pop("total", sum(stats.values()))
            if not total:
                return f"{now} no job needs to run"
            counts = ", ".join(f"{count} {rule}" for rule, count in stats.items())
            return f"{now} {total} jobs: {counts}"
        return super().format(record)


def strip_location(text: str) -> str:
    """Return an error of Snakemake's without where it was raised."""
    lines = text.rstrip().splitlines()
    if text.startswith("Traceback"):
        return f"{lines[-1]} (--verbose shows where)"
    if not lines or not HEADER.match(lines[0]):
        return text
    kept = [line for line in lines if not HEADER.match(line) and not TRACE.match(line)]
    return textwrap.dedent("\n".join(kept)).strip("\n") or text


def describe_failure(rule: str, logs: list[str]) -> str:
    """Return why a job failed, in a sentence, and where its log is."""
    text = "".join(
        Path(log).read_text(encoding="utf-8", errors="replace")
        for log in logs
        if Path(log).is_file()
    )
    where = f"\n  log: {', '.join(logs)}" if logs else ""
    return f"{rule} failed: {find_reason(text)}{where}"


def find_reason(text: str) -> str:
    """Return the sentence with which a log ends, shortened in its middle if it is long."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    sentences = [line for line in lines if line.startswith(SENTENCE)]
    if sentences:
        reason = sentences[-1].removeprefix(SENTENCE)
    elif "Traceback" in text:
        reason = lines[-1]
    else:
        reason = "it ended without a reason; it was killed, perhaps for want of memory."
    if len(reason) <= LONGEST:
        return reason
    return f"{reason[: LONGEST // 2]} [...] {reason[-LONGEST // 2 :]}"
