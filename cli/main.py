"""The console entry ``tome-export``: finds the command, runs it, and turns failures into lines."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import click

from tome_export import __version__
from tome_export.cli.output import Terminal, beside_the_error
from tome_export.cli.signals import Interrupted, interrupt, interruptible
from tome_export.errors import InputError, TomeExportError, exit_text

COMMANDS = (
    *("build", "engine", "check", "bench", "eval", "tune", "cascade"),
    *("predict", "inspect", "report", "serve", "query", "models", "doctor"),
)
"""In the order in which they are used."""

NAME = "tome-export"

EXIT_CODES = """\b
Exit codes:
  0  done
  1  unexpected failure: a bug
  2  usage: an unknown option, or a value of the wrong kind (--r abc)
  3  bad input: model, weights, schedule (--r -1), batch range, images, artifact,
     output directory; or a result that is printed but could not be written down
  4  a needed component (TensorRT, a GPU, a plugin, a server) is missing
  5  parity failed: the result does not compute what PyTorch computes; or an image is
     merged more than --min-entropy allows
  6  the export or the engine build failed
  129, 130, 143  ended by SIGHUP, Ctrl-C or SIGTERM; nothing half-made is left behind
  141  the reader of standard output went away"""

_ELSEWHERE = "free space or choose another place"

SYSTEM = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO), _ELSEWHERE),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _ELSEWHERE),
    errno.EFBIG: "raise the limit of a file's size (ulimit -f) or choose another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs: the machine has no more open files to give",
    errno.ENOMEM: "free memory, or give fewer images or a smaller batch",
}
"""What the machine refuses, as opposed to what a bug provokes, and what to do."""

BROKEN_PIPE = 141
"""128 + SIGPIPE, as of any program whose reader went away."""


class Commands(click.Group):
    """Commands are imported when they are named: ``--help`` must not wait for torch."""

    def list_commands(self, _context: click.Context) -> list[str]:
        """All of them."""
        return list(COMMANDS)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        """The command of that name, from its own module."""
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"tome_export.cli.{name}").command
        return command


@click.group(NAME, cls=Commands, epilog=EXIT_CODES)
@click.version_option(__version__, prog_name=NAME)
@click.option(
    "--debug", is_flag=True, expose_value=False, help="Show tracebacks and library output."
)
def cli() -> None:
    """Merge the tokens of a vision transformer and export it, with proof of parity.

    Results go to standard output, progress and errors to standard error.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, by default with the arguments of the process; returns the exit code."""
    if f"_{NAME.upper().replace('-', '_')}_COMPLETE" in os.environ:
        cli.main(prog_name=NAME)  # click writes a shell's completions and exits
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 (lives on)
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Looked for before parsing, because parsing may be what fails.
    terminal = Terminal(json="--json" in arguments, debug="--debug" in arguments)
    try:
        with interruptible():
            return _run(arguments, terminal)
    except (BrokenPipeError, Interrupted) as error:  # while a failure was being printed
        return _silenced() if isinstance(error, BrokenPipeError) else error.exit_code


def _run(arguments: list[str], terminal: Terminal) -> int:
    try:
        with cli.make_context(NAME, arguments, obj=terminal) as context:
            cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as end:
        return end.exit_code
    except BrokenPipeError:
        return _silenced()
    except (Exception, Interrupted, KeyboardInterrupt, SystemExit) as error:
        # A library's C++ may drop the interrupt, and fail at what it has not done.
        return _failed(interrupt() or error, terminal)
    return 0


def _failed(error: BaseException, terminal: Terminal) -> int:
    """Print one line for what went wrong; returns the exit code."""
    kind, message, exit_code = _described(error)
    if isinstance(error, click.exceptions.NoArgsIsHelpError) and not terminal.json:
        error.show()
        return exit_code
    if terminal.debug:
        traceback.print_exception(error)
    report = getattr(error, "report", None)
    if report is not None and not terminal.findings:
        terminal.findings = {"report": report}
        if not terminal.json:
            from tome_export.cli.format import parity_lines

            with beside_the_error():
                terminal.result({}, parity_lines(report))
    terminal.error(kind, message, exit_code)
    return exit_code


def _described(error: BaseException) -> tuple[str, str, int]:
    kind, message = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, TomeExportError):
        return kind, message, error.exit_code
    if isinstance(error, click.ClickException):
        return "UsageError", _usage(error), 2
    if isinstance(error, Interrupted):
        return kind, f"{message}; nothing half-made was left behind", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted", "interrupted", 130
    if isinstance(error, SystemExit):
        text = f"the model's own code ended the program with {exit_text(error)}"
        text += "; expected it to go on"
    elif isinstance(error, OSError) and error.errno in SYSTEM:
        where = f" {error.filename}" if error.filename else ""
        text = f"cannot read or write{where}: {error.strerror}; {SYSTEM[error.errno]}"
    elif isinstance(error, MemoryError):
        text = f"memory is used up{': ' * bool(message)}{message}; {SYSTEM[errno.ENOMEM]}"
    else:
        text = f"{kind}: {message}; this is a bug, run with --debug for the traceback"
        return kind, text, 1
    return "InputError", text, InputError.exit_code


def _usage(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else NAME
    message = " ".join(error.format_message().split()).rstrip(".")
    return f"{message}{'' if message.endswith('?') else ';'} see '{path} --help'"


def _silenced() -> int:
    """Python would complain about the pipe once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return BROKEN_PIPE
