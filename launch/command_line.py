"""Reading a command line with --config: what is wrong with it is one line, not a traceback.

Called by the commands that take a job's settings.
"""

import atexit
import contextlib
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from absl import flags

from apex_jax.batch.job import EXIT_REFUSED
from apex_jax.config import Config, ConfigError
from apex_jax.settings import SIZE_FIELDS, read_size

_SIZE_FLAG = re.compile(
    rf"--?(config\.(?:{'|'.join(map(re.escape, SIZE_FIELDS))}))(?:=(.*))?", re.S
)


def parse_flags(
    argv: Sequence[str], config_flag: flags.FlagHolder, required: Iterable[flags.FlagHolder]
) -> list[str]:
    """Parse the command line; whatever is wrong with it is one line on stderr and status 2.

    config_flag: of DEFINE_config_file. required: flags that must be given.
    """
    atexit.register(_settle_stderr)
    try:
        rest = flags.FLAGS(list(_in_plain_bytes(argv)))
        if len(rest) > 1:
            refuse(f"{rest[1]!r} is no flag; values are given as --name=value")
        for flag in required:
            if flag.value is None:
                refuse(f"--{flag.name} is missing")
        config = config_flag.value
        if not isinstance(config, Config):
            # Where the file cannot be loaded this is an object that says so once it is touched.
            if type(config).__module__.startswith("ml_collections.config_flags"):
                config.model  # noqa: B018
            refuse(
                f"get_config() of --config returns {type(config).__name__}, not apex_jax's Config"
            )
    except SystemExit:
        raise
    except ConfigError as error:
        refuse(str(error))
    except Exception as error:  # what a config file or ml_collections raises
        refuse(_explain(argv, error))
    return rest


def _settle_stderr() -> None:
    """Drop what a lost reader of stderr will not get: Python would exit with 120 because of it."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stderr.fileno())
        os.close(null)


def refuse(message: str) -> NoReturn:
    """End the process with one line on stderr and status 2."""
    with contextlib.suppress(OSError):
        print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_REFUSED)


def _in_plain_bytes(argv: Sequence[str]) -> Iterator[str]:
    """Yield the arguments with sizes such as 3GiB in bytes, which is what their fields hold."""
    rest = iter(argv)
    for argument in rest:
        match = _SIZE_FLAG.fullmatch(argument)
        if match is None:
            yield argument
            continue
        text = next(rest, "") if match[2] is None else match[2]
        yield f"--{match[1]}={read_size(f'--{match[1]}', text)}"


def _explain(argv: Sequence[str], error: Exception) -> str:
    """Say in one line what is wrong with a command line or its config file."""
    known = list(_field_names(Config()))
    for argument in argv[1:]:
        match = re.match(r"--?(?:no)?config\.([\w.]+)", argument)
        if match is None or match[1] in known or match[1].startswith("model.architecture."):
            continue
        near = difflib.get_close_matches(match[1], known, n=1)
        hint = f"did you mean --config.{near[0]}?" if near else "known are " + ", ".join(known)
        return f"--config.{match[1]}: there is no such setting; {hint}"
    text = str(error).strip().splitlines()
    reason = f"{text[0]} ... {text[-1].strip()}" if len(text) > 1 else "".join(text)
    return reason if isinstance(error, flags.Error) else f"{type(error).__name__}: {reason}"


def _field_names(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of a dataclass's fields."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from _field_names(value, f"{prefix}{field.name}.")
