"""Turn a command line's mistakes into one line and exit code 2, for all verbs."""

from __future__ import annotations

import errno
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from zoft.errors import UserError, one_line


class _AsTyped:
    """The identity, where typer would build a converter."""

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        return value


def _light(param: Any) -> Any:
    """Spare text and flags typer's conversion: 0.29 sends them through pydantic, whose import takes 0.15 s.

    A typer without this attribute takes no notice.
    """
    if getattr(getattr(param, "type_descriptor", None), "annotation", None) in (str, list[str], bool):
        param._runtime_param = _AsTyped()
    return param


class Verb(TyperCommand):
    """A verb of zoft, whose epilog is an example of its use."""

    def get_params(self, ctx: Any) -> list[Any]:
        return [_light(param) for param in super().get_params(ctx)]

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the example below the options, as it is typed."""
        formatter.write(f"\nExample:\n  {self.epilog}\n")


_UsageError: Any = typer.BadParameter.__mro__[1]  # click's, which newer versions of typer bring along
# What a file system says of a file: a mistake or a mishap, never a bug.
_MACHINE = {getattr(errno, name) for name in (
    "EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "EIO", "ESTALE", "ENOENT", "ENOTDIR", "EISDIR",
    "EEXIST", "ELOOP", "ENAMETOOLONG", "EMFILE", "ENFILE", "ETXTBSY", "ENODEV", "ENXIO",
) if hasattr(errno, name)}  # fmt: skip


def _refused(error: Any) -> typer.Exit:
    """Prints a mistake as one line, whatever is in it; returns exit code 2."""
    text = error.format_message() if isinstance(error, _UsageError) else str(error)
    line = one_line(" ".join(text.split("\n")).strip())
    if len(line) > 1000:
        line = f"{line[:500]} … {line[-500:]}"
    typer.echo(f"error: {line}", err=True)
    return typer.Exit(2)


class Verbs(TyperGroup):
    """Turns a user's mistake into one line and exit code 2; anything else is a bug and keeps its traceback."""

    def get_params(self, ctx: Any) -> list[Any]:
        return [_light(param) for param in super().get_params(ctx)]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write two lines per verb: its purpose and an example."""
        formatter.write("\nCommands:\n")
        for name, verb in self.commands.items():
            formatter.write(f"  {name:9} {verb.help}\n{'':12}{verb.epilog}\n")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                raise
            raise _refused(error) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            from zoft.errors import nearest

            near = nearest(args[0], self.commands)
            raise UserError(
                f"{args[0]}: no such verb; {f'did you mean {near}?' if near else 'use ' + ', '.join(self.commands)}"
            )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (UserError, _UsageError) as error:
            raise _refused(error) from None
        except OSError as error:
            if error.errno not in _MACHINE or error.filename is None:
                raise
            raise _refused(UserError(f"{error.filename}: {error.strerror}")) from None
        except KeyboardInterrupt as error:  # of a run that has started: stop.Stopped
            typer.echo(str(error) or "interrupted", err=True)
            raise typer.Exit(getattr(error, "code", 130)) from None
