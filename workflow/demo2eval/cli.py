"""The command line of a module: the signature of its function, by jsonargparse.

    if __name__ == "__main__":
        run(build_dataset)

gives `python -m demo2eval.data.dataset` an option for each argument, with the defaults of the
configuration. A section of it is given key by key, `--dataset.image_storage video`, or at once,
as the workflow does: `--dataset '{"image_storage": "video"}'`.
"""

import argparse
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from demo2eval.errors import UserError

NOT_PERMITTED = (errno.EACCES, errno.EPERM, errno.EROFS)


def run(function: Callable[..., Any]) -> None:
    """Call a function with the command line's arguments.

    A UserError becomes one sentence and exit status 1. SIGTERM unwinds, so that worker processes
    end and locks are released; its status is 143.
    """
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

    class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Shows the module's docstring as it is, and no types: they are pydantic's, and long."""

        def _expand_help(self, action: argparse.Action) -> str:
            text = re.sub(
                r"type: .*(?=, default: )|, type: .*(?=\)$)", "", super()._expand_help(action)
            )
            return text.replace("(, ", "(")

    doc = sys.modules[function.__module__].__doc__
    parser = ArgumentParser(description=doc, formatter_class=HelpFormatter)
    parser.add_function_arguments(function, as_group=False)
    arguments = Namespace(parser.instantiate_classes(parser.parse_args()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with report_errors():
        function(**arguments.as_dict())


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn what a user can mend into one sentence and exit status 1."""
    try:
        yield
    except UserError as error:
        sys.exit(f"demo2eval: error: {error}")
    except MemoryError as error:
        sys.exit(f"demo2eval: error: this machine's memory does not suffice ({error}).")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in NOT_PERMITTED:
            raise
        sys.exit(f"demo2eval: error: {error.filename} cannot be used: {error.strerror}.")
