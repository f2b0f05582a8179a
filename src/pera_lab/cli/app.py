"""The command line: its commands, its version, and one sentence for each mistake.

Exit codes: 0 done, 1 a check failed, 2 a mistake in the call, the recipe or the data, 130 interrupted.
With PERA_DEBUG=1 errors are printed with a traceback, and the messages of the libraries are shown.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from pera_lab import processes
from pera_lab.cli import convert, show, study, train
from pera_lab.cli.examples import examples

OUT_OF_MEMORY = (
    "out of memory; lower training.batch_size, training.max_length or method.r, or set "
    "training.gradient_checkpointing=true or model.dtype=bfloat16; to score, lower evaluation.batch_size."
)
UsageError: Any = typer.BadParameter.__base__
"""The parent of typer's errors about options and arguments, which typer does not export."""


LONGEST = 1000
"""Maximum number of characters of a message, which may quote a value of any length."""


DISTRIBUTED = ("train", "evaluate", "predict")
"""The commands that torchrun and accelerate can start in several processes."""


class Command(TyperCommand):
    """A command that holds back the messages of the libraries, then runs. Its help and its usage errors come before."""

    def invoke(self, ctx: Any) -> Any:
        from pera_lab.cli.console import held_warnings, messages, progress, stdout_for_json
        from pera_lab.progress import showing, stage

        if processes.count() > 1 and ctx.command_path.removeprefix("pera ") not in DISTRIBUTED:
            _exit(
                f"WORLD_SIZE={processes.count()}: {ctx.command_path!r} runs in one process; start it without torchrun "
                "and accelerate launch, or unset WORLD_SIZE.",
                2,
            )
        if processes.fsdp() and ctx.command_path != "pera train":
            _exit(
                f"ACCELERATE_USE_FSDP=true: {ctx.command_path!r} does not divide weights; start it without FSDP, or "
                "unset ACCELERATE_USE_FSDP.",
                2,
            )
        progress.quiet |= ctx.params.get("quiet", False)
        only_json = stdout_for_json() if ctx.params.get("json") else nullcontext()
        try:
            with only_json, nullcontext() if _debugging() else held_warnings(), showing(progress):
                with stage("loading PyTorch and transformers"):
                    import peft  # noqa: F401
                    from transformers.utils import logging

                logging.disable_progress_bar()  # type: ignore[no-untyped-call]
                result = super().invoke(ctx)
                processes.disconnect()
                return result
        except (EOFError, OSError) as error:  # typer would print nothing
            return error
        finally:
            progress.quiet = messages.quiet


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune language models with Polynomial Expansion Rank Adaptation (PERA). "
    "Score, merge, export and verify the result.",
)
COMMANDS: tuple[Callable[..., None], ...] = (
    *(train.quickstart, train.train, train.evaluate, train.predict, show.inspect),
    *(convert.merge, convert.export, convert.import_, convert.verify, show.chat, show.report, show.env),
)
for command in COMMANDS:
    name = command.__name__.strip("_")
    app.command(name, cls=Command, epilog=examples(name))(command)
for command in (show.recipes, show.studies):  # which need no torch
    app.command(command.__name__, epilog=examples(command.__name__))(command)
study_app = typer.Typer(no_args_is_help=True, help="Compare methods with tuned learning rates, seeds and statistics.")
for command in (study.run, study.report):
    study_app.command(command.__name__, cls=Command, epilog=examples(f"study {command.__name__}"))(command)
app.add_typer(study_app, name="study")


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"pera {installed('pera')}")  # noqa: T201
        raise typer.Exit


def main() -> None:
    """Run the ``pera`` command and exit. Every error is printed as one sentence."""
    from pera_lab.cli.console import accept_any_text, silence

    accept_any_text()
    try:
        if not processes.is_main():
            silence()
        if not _debugging():
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it when it is imported
        result = app(prog_name="pera", standalone_mode=False)
        if isinstance(result, Exception):
            raise result
        sys.exit(result or 0)
    except UsageError as error:
        message = " ".join(error.format_message().split()).replace("Value error, ", "")
        if error.ctx is not None and message:
            message += f"{'' if message[-1] in '.?' else '.'} See: {error.ctx.command_path} --help"
        _exit(message, error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if _debugging():
            traceback.print_exc()
        _exit(*_mistake(error))


def _debugging() -> bool:
    return os.environ.get("PERA_DEBUG", "0") not in ("", "0")


def _mistake(error: Exception) -> tuple[str, int]:
    """Message and exit code of an error.

    The modules that define the errors import torch, so they are looked up only if a command has imported them.
    """
    errors, environment = sys.modules.get("pera.errors"), sys.modules.get("pera_lab.environment")
    if errors is not None and isinstance(error, errors.PeraError):
        return str(error), error.exit_code
    if environment is not None and environment.out_of_memory(error):
        return OUT_OF_MEMORY, 2
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{str(error.filename)!r}: {error.strerror}.", 2
    return f"unexpected {type(error).__name__}: {error}; PERA_DEBUG=1 shows the traceback.", 2


def _exit(message: str, code: int) -> None:
    if message:
        from pera_lab.cli.console import messages, silence

        message = " ".join(line.strip() for line in message.splitlines())
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 :]}"
        with processes.reporting() as reports:
            silence(not reports)
            messages.print("pera:", style="red", end=" ")
            messages.print(message)
    sys.exit(code)
