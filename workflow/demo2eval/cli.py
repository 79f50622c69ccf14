"""Command lines of the stages: one named option for each field of a settings dataclass, one sentence for each user error."""

import argparse
import dataclasses
import json
import os
import signal
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path

from demo2eval.errors import UserError


def option(help: str, default=dataclasses.MISSING):
    """Return a dataclass field with a help text; without a default the option is required."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: default, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def _parse_json(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"expected JSON, got {text!r} ({error})") from error


def _converter(annotation) -> Callable:
    """Return the function that turns an option's text into a value of the annotated type; None is written `null`."""
    if isinstance(annotation, types.UnionType):
        inner = [member for member in typing.get_args(annotation) if member is not type(None)]
        return lambda text: None if text == "null" else _converter(inner[0])(text)
    if annotation is bool:
        return _parse_bool
    if annotation in (str, int, float, Path):
        return annotation
    return _parse_json


def add_settings(parser: argparse.ArgumentParser, settings_class: type) -> None:
    """Add one `--name-with-dashes` option for each field of a settings dataclass."""
    group = parser.add_argument_group("settings (they change the result)")
    hints = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        default = (
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory()
        )
        required = default is dataclasses.MISSING
        shown = "" if required else f" (default: {default})"
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            type=_converter(hints[field.name]),
            required=required,
            default=None if required else default,
            help=(field.metadata.get("help", "") + shown).replace("%", "%%"),
        )


def settings_from(arguments: argparse.Namespace, settings_class: type):
    """Build the settings dataclass from parsed arguments."""
    return settings_class(
        **{
            field.name: getattr(arguments, field.name)
            for field in dataclasses.fields(settings_class)
        }
    )


def stage_parser(doc: str, settings_class: type | None = None) -> argparse.ArgumentParser:
    """Return a parser whose help is the module's docstring, with the settings' options."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if settings_class is not None:
        add_settings(parser, settings_class)
    return parser


def run(main: Callable[[], None]) -> None:
    """Call a stage's main function; end with status 1 and one sentence on a UserError."""
    # A job that is told to stop should unwind, so that worker processes are stopped and locks released.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except UserError as error:
        print(f"demo2eval: error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
