"""Puts what a job says into its log, and its progress bar on the screen.

    python -m demo2eval.dataset ... 2>&1 | python -m demo2eval.tee results/.../dataset.log

The log has no carriage returns: of a bar it has the last state, and one state a minute on the way.
On a terminal the screen shows the bar as it moves, and nothing of it stays. With
DEMO2EVAL_VERBOSE=1 the screen shows the other lines as well.
"""

import codecs
import os
import signal
import sys
import time

BAR_SECONDS = 60
CLEAR_LINE = "\r\x1b[K"


class Tee:
    """Divides text into lines and states of a bar."""

    def __init__(self, log, name: str, verbose: bool):
        self._log, self._name, self._verbose = log, name, verbose
        self._line, self._logged, self._bar_logged = "", "", time.monotonic()
        self._terminal = sys.stderr.isatty()

    def feed(self, text: str) -> None:
        """Take the next piece of what the job says."""
        *lines, rest = text.replace("\r\n", "\n").split("\n")
        for line in lines:
            self._extend(line)
            self._end_line()
        self._extend(rest)

    def _extend(self, text: str) -> None:
        first, *states = text.split("\r")
        self._line += first
        for state in states:
            self._line = state or self._line
        if states and self._line:
            self._show_bar()

    def _show_bar(self) -> None:
        if self._terminal:
            width = os.get_terminal_size(2).columns - 1
            sys.stderr.write(CLEAR_LINE + f"{self._name}: {self._line}"[:width])
            sys.stderr.flush()
        if time.monotonic() - self._bar_logged > BAR_SECONDS:
            self._write(self._line)
            self._logged, self._bar_logged = self._line, time.monotonic()

    def _end_line(self) -> None:
        if not self._line or self._line != self._logged:
            self._write(self._line)
        if self._verbose:
            print(f"{CLEAR_LINE if self._terminal else ''}{self._line}", file=sys.stderr)
        elif self._terminal:
            sys.stderr.write(CLEAR_LINE)
        self._line = ""

    def _write(self, line: str) -> None:
        try:
            self._log.write(f"{line.rstrip()}\n".encode())
        except OSError:  # a full disk; the job says so
            print(line, file=sys.stderr)

    def close(self) -> None:
        """Write what has no end of line."""
        if self._line:
            self._end_line()


def main() -> None:
    """Copy the standard input, to its end: the job itself is what signals are for."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    path = sys.argv[1]
    name = os.path.splitext(os.path.basename(path))[0]
    with open(path, "wb", buffering=0) as log:
        tee = Tee(log, name, os.environ.get("DEMO2EVAL_VERBOSE") == "1")
        # What is cut in the middle of a character comes with the next piece.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while piece := os.read(0, 65_536):
            tee.feed(decoder.decode(piece))
        tee.close()


if __name__ == "__main__":
    main()
