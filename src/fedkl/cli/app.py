"""The application: its commands, and what becomes of errors."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fedkl._version import __version__
from fedkl.cli.audit import audit
from fedkl.cli.audit_update import audit_update
from fedkl.cli.certify import certify
from fedkl.cli.demo import demo
from fedkl.cli.evaluate import evaluate
from fedkl.cli.inspection import inspect
from fedkl.cli.keys import keygen
from fedkl.cli.provenance import arguments
from fedkl.cli.show import plain, say
from fedkl.cli.train import train
from fedkl.errors import ConfigError, ExtraStateWarning, FedKLError, ShortcutWarning

DONE, USER, INTERNAL, INTERRUPTED = 0, 2, 70, 130

# Newer releases of typer carry click inside, older ones import it: both have this name.
_Usage: type[typer.BadParameter] = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)

HELP = """Lock any PyTorch model with a client's private key and train it federated.

Start with [bold]fedkl demo --out runs/demo[/bold]: a few minutes, real images, one table.

Examples:

  fedkl train --dataset fashion-mnist --model lenet --method fedkl --clients 3 --out runs/kl

  fedkl inspect runs/kl

  fedkl inspect --model resnet18

  fedkl evaluate runs/kl --split test

  fedkl audit --run runs/kl --out runs/kl-audit

Exit codes: 0 done, 2 something for you to mend, 130 interrupted, 70 a fault of FedKL's own; of an
audit also 0 holds, 1 leaks, 3 inconclusive.
"""


class Once(TyperCommand):
    """A command whose options take one value each: given twice, the last one would count alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As the command's own.

        Raises:
            ConfigError: An option was given more than once, under whichever of its names.
        """
        # The parser empties the list that it gets.
        *_, order = self.make_parser(ctx).parse_args(args=list(args))
        for option, times in Counter(order).items():
            if times > 1 and not option.is_eager:
                flags = " or ".join([*option.opts, *option.secondary_opts])
                raise ConfigError(
                    f"{flags} was given {times} times and takes one value; leave all but one out, "
                    f"or run the command once for each. Try: {ctx.command_path} --help"
                )
        return super().parse_args(ctx, args)


app = typer.Typer(
    help=HELP,
    rich_markup_mode="rich",
    add_completion=False,
    # Locals can hold keys: a traceback never shows them.
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command, panel in (
    (demo, "Start here"),
    (train, "Federations"),
    (evaluate, "Federations"),
    (audit, "Audits"),
    (audit_update, "Audits"),
    (certify, "Audits"),
    (inspect, "Keys and models"),
    (keygen, "Keys and models"),
):
    app.command(rich_help_panel=panel, cls=Once)(command)


def _version(asked: bool) -> None:
    if asked:
        print(f"fedkl {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the application itself."""


root.__doc__ = HELP


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; those of the process if None.

    Returns:
        The exit code: 0 done, 2 the user's error, 130 interrupted, 70 an internal error.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")  # a dash must not end a run where the locale has none
    words = list(sys.argv[1:] if argv is None else argv)
    arguments.set(tuple(words))
    try:
        with _telling():
            code = app(args=words or ["--help"], prog_name="fedkl", standalone_mode=False)
    except _Usage as error:
        message = error.format_message().rstrip(".")
        return _refuse(f"{message}. Try: {_help_of(words)}")
    except FedKLError as error:
        return _refuse(str(error))
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        if error.filename is None:
            return _internal(error)
        return _refuse(f"{error.filename}: {error.strerror}; check the path and the disk.")
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        return _internal(error)
    return code if isinstance(code, int) else DONE


@contextmanager
def _telling() -> Iterator[None]:
    """Within it a warning of ours is one line, without the place in the code that gave it."""
    show = warnings.showwarning

    def tell(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, ShortcutWarning | ExtraStateWarning):
            say(f"warning: {message}")
        else:
            show(message, category, *rest)

    with warnings.catch_warnings():
        warnings.showwarning = tell  # type: ignore[assignment]
        yield


def _help_of(words: Sequence[str]) -> str:
    names = {"audit", "audit-update", "certify", "demo", "train", "evaluate", "inspect", "keygen"}
    named = [word for word in words[:1] if word in names]
    return " ".join(["fedkl", *named, "--help"])


def _refuse(message: str) -> int:
    print(f"error: {plain(message)}", file=sys.stderr)
    return USER


def _internal(error: BaseException) -> int:
    # Python's own traceback: lines of code, and no values of variables.
    traceback.print_exception(error, file=sys.stderr)
    print(
        f"internal error: {type(error).__name__}: {plain(str(error))}. This is a fault of FedKL; "
        "please report it with the lines above.",
        file=sys.stderr,
    )
    return INTERNAL
