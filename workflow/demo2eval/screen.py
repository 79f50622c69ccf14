"""What Snakemake shows on the screen: a line per job, and one sentence for each that fails.

The profile names it (`logger: demo2eval`). A dry run, and `--verbose`, show all that Snakemake
says. Snakemake's own log in .snakemake/log has it in any case.
"""

import logging
import re
import sys
import textwrap
import time
from pathlib import Path

from snakemake.logging import ColorizingTextHandler, DefaultFilter, DefaultFormatter
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from demo2eval.tee import CLEAR_LINE

SENTENCE = "demo2eval: error: "
LONGEST = 380
"""Characters of a sentence: five lines of a terminal."""
NOISE = re.compile(
    r"host: |Building DAG|Using shell|Provided |Rules claiming|Assuming unrestricted|Select jobs"
    r"|Execute \d|Shutting down|Exiting because|Complete log|DAG of jobs will be updated|Reasons:"
    r"|Config file .* is extended|Group jobs|Conda environments|Singularity|Elapsed time"
    r"|Removing output files of failed job|Trying to restart job|At least one job"
)
SHOWN_EVENTS = (None, LogEvent.RUN_INFO, LogEvent.JOB_INFO, LogEvent.PROGRESS, LogEvent.JOB_ERROR)
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
        self._formatter = BriefFormatter(settings.quiet, settings.show_failed_logs)
        self._formatter.brief = not settings.dryrun
        if settings.verbose:
            self._formatter = DefaultFormatter(settings.quiet, settings.show_failed_logs)
        self._brief = not (settings.verbose or settings.dryrun)
        self._said: set[str] = set()
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
        text = self._formatter.format(record)
        if text in ("", "None") or (self._brief and not is_shown(record)):
            return
        if self._brief and record.levelno >= logging.ERROR:
            # A job that is tried again may fail again.
            if text in self._said:
                return
            self._said.add(text)
        clear = CLEAR_LINE if self._screen.is_tty else ""
        self._screen.stream.write(f"{clear}{self._screen.decorate(record, text)}\n")
        self._screen.flush()

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


def is_shown(record: logging.LogRecord) -> bool:
    """Whether a message of Snakemake's is worth a line on the screen."""
    event, text = getattr(record, "event", None), str(record.msg or "")
    if record.levelno >= logging.WARNING:
        # Of a job that failed another message gives the reason.
        return not (NOISE.match(text) or "CalledProcessError" in text)
    return event in SHOWN_EVENTS and not NOISE.match(text)


class BriefFormatter(DefaultFormatter):
    """Formats what happens in few words, and errors without where they were raised."""

    brief = True

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a message; "" for one without any."""
        event, now = getattr(record, "event", None), time.strftime("%H:%M:%S")
        fields = record.__dict__
        if event == LogEvent.JOB_ERROR:
            return describe_failure(fields["rule_name"], fields["log"])
        if record.levelno >= logging.ERROR:
            return strip_location(str(record.msg))
        if self.brief and event == LogEvent.JOB_INFO:
            return f"{now} {fields['rule_name']} {' '.join(fields['output'][:1])}"
        if self.brief and event == LogEvent.PROGRESS:
            return f"{now} {fields['done']} of {fields['total']} jobs done"
        return super().format(record)


def strip_location(text: str) -> str:
    """Return an error of Snakemake's without where in the workflow it was raised."""
    lines = text.splitlines()
    if not HEADER.match(lines[0]):
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
