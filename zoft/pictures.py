"""Draw pictures with matplotlib, which is an optional package."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from zoft.errors import UserError, writing
from zoft.folder import write
from zoft.packages import missing

ENDS = (".png", ".svg", ".pdf")


def pyplot(option: str) -> Any:
    """Return matplotlib's pyplot, which draws into files here. Raises UserError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(missing(option, "matplotlib")) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def refuse_other_ends(option: str, out: Path) -> None:
    """Raise UserError for a picture's name that does not end as one."""
    if out.suffix not in ENDS:
        raise UserError(f"{option} {out}: the name must end in {', '.join(ENDS)}")


def write_picture(figure: Any, out: Path, **how: Any) -> None:
    """Write a figure in the format that its file's name ends in, whole or not at all; its folder is made.

    how: more for matplotlib's savefig. Raises UserError where it cannot be written.
    """
    made = io.BytesIO()
    figure.savefig(made, format=out.suffix[1:], **how)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write(out, made.getvalue())
