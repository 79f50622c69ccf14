"""The command line of a module: the signature of its function, by jsonargparse.

    if __name__ == "__main__":
        run(build_dataset)

gives `python -m demo2eval.data.dataset` an option for each argument, with the defaults of the
configuration. A section of it is given key by key, `--training.peak_lr 1e-4 --training.no-augment`,
or at once, as the workflow does: `--dataset '{"image_storage": "video"}'`. Several values of a list
follow each other. For a manifest the folder is taken as well that it lies beside or in.
"""

import argparse
import errno
import inspect
import json
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, get_origin

from demo2eval.errors import UserError

NOT_PERMITTED = (errno.EACCES, errno.EPERM, errno.EROFS)


def run(function: Callable[..., Any]) -> None:
    """Call a function with the command line's arguments.

    A UserError becomes one sentence and exit status 1. SIGTERM unwinds, so that worker processes
    end and locks are released; its status is 143. Where the output goes into a log, that begins
    with the date, the machine and the arguments.
    """
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

    options = dict(list_options(function))
    flags = {f"--{name}" for name, annotation in options.items() if annotation is bool}

    class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Shows the module's docstring as it is, and no types: they are pydantic's, and long."""

        def _expand_help(self, action: argparse.Action) -> str:
            text = re.sub(
                r"type: .*(?=, default: )|, type: .*(?=\)$)", "", super()._expand_help(action)
            )
            return text.replace("(, ", "(")

        def _format_action_invocation(self, action: argparse.Action) -> str:
            option = next(iter(action.option_strings), "")
            if option in flags:
                return f"{option} / {negate(option)}"
            return super()._format_action_invocation(action)

    doc = sys.modules[function.__module__].__doc__
    parser = ArgumentParser(
        description=doc, formatter_class=HelpFormatter, usage="%(prog)s OPTIONS"
    )
    parser.add_function_arguments(function, as_group=False)
    words = expand_words(sys.argv[1:], options)
    arguments = Namespace(parser.instantiate_classes(parser.parse_args(words))).as_dict()
    arguments = {name: find_manifest(value) for name, value in arguments.items()}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if not sys.stderr.isatty():
        print(describe_job(arguments), file=sys.stderr, flush=True)
    with report_errors():
        function(**arguments)


def list_options(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, type) of a function's arguments, and of the keys of those that are sections."""
    for name, parameter in inspect.signature(function).parameters.items():
        yield name, parameter.annotation
        for key, field in getattr(parameter.annotation, "model_fields", {}).items():
            yield f"{name}.{key}", field.annotation


def negate(option: str) -> str:
    """Return the option that says no: --training.no-augment for --training.augment."""
    section, dot, key = option.removeprefix("--").rpartition(".")
    return f"--{section}{dot}no-{key}"


def expand_words(words: Sequence[str], options: dict[str, Any]) -> list[str]:
    """Return a command line as jsonargparse reads it, of one with flags and several values.

    Args:
        options: {name: type} of what there is.
    """
    flags = {f"--{name}" for name, annotation in options.items() if annotation is bool}
    negated = {negate(option): option for option in flags}
    lists = {f"--{name}" for name, annotation in options.items() if get_origin(annotation) is list}
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    expanded = []
    for option, *values in groups:
        if option in negated and not values:
            expanded.append(f"{negated[option]}=false")
        elif option in flags and not values:
            expanded.append(f"{option}=true")
        elif option in lists and values and not values[0].startswith("["):
            expanded.append(f"{option}={json.dumps(values)}")
        else:
            expanded += [option, *values]
    return expanded


def find_manifest(value: Any) -> Any:
    """Return the manifest of a folder that has one beside or in it; anything else as it is."""
    if isinstance(value, Path) and value.is_dir():
        for manifest in (value / "manifest.json", value.parent / f"{value.name}.json"):
            if manifest.is_file():
                return manifest
    return value


def describe_job(arguments: dict[str, Any]) -> str:
    """Return how a log begins: date, module, machine and arguments."""
    module = getattr(sys.modules["__main__"].__spec__, "name", sys.argv[0])
    from demo2eval.config import Section

    lines = [f"{datetime.now():%Y-%m-%d %H:%M:%S} {module} on {platform.node()}", describe_device()]
    for name, value in arguments.items():
        if isinstance(value, Section):
            # What changes no result was not passed on, unless it differs.
            known, fields = value.result_settings(), type(value).model_fields
            lines += [
                f"  {name}.{key}: {item}"
                for key, item in value
                if key in known or item != fields[key].default
            ]
        elif isinstance(value, list):
            lines.append(f"  {name}: {', '.join(map(str, value))}")
        else:
            lines.append(f"  {name}: {value}")
    return "\n".join(lines)


def describe_device() -> str:
    """Return this machine's processor and GPUs; as the driver's files say, which takes no time."""
    found = re.search(r"model name\s*: (.*)", _read("/proc/cpuinfo"))
    devices = [f"{os.cpu_count()} x {found[1] if found else platform.machine()}"]
    gpus = Path("/proc/driver/nvidia/gpus")
    models = [re.search(r"Model:\s*(.*)", _read(file)) for file in gpus.glob("*/information")]
    devices += [model[1] for model in models if model]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ", ".join(devices) + (f" (CUDA_VISIBLE_DEVICES={visible})" if visible else "")


def _read(file: str | Path) -> str:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


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
