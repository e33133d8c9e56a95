"""Renew the locks: the exact versions that `make demo`, `make test` and `make test-lowest` install.

    python scripts/lock.py --uv uv

Needs uv, and asks the package index for the newest versions. Writes constraints/lock.txt (what zoft needs),
lock-dev.txt (with what the tests need), lock-docs.txt (with what `make docs` needs), lock-real.txt (the real model and data), lock-lowest.txt (the lowest versions
that pyproject.toml promises), and zoft/tested.txt, from which the line of docs/running.md is made.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.markers import Marker

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from zoft import env  # noqa: E402

PYTHON = "3.11"  # of the machine that tests; the locks hold from 3.10 on
HEAD = "# Made by `make lock`; torch comes first, by cpu.txt, since its CPU build has other hashes than PyPI's.\n"


def bounds() -> dict[str, str]:
    """Return the lower bound of each package that pyproject.toml names for zoft and for its tests."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:dependencies|dev) = \[\n(.*?)^\]", text, re.M | re.S)
    return dict(re.findall(r'"([\w-]+)>=([\d.]+)', "".join(lists)))


def pins(name: str) -> dict[str, str]:
    """Return the version of each package that a lock has for the Python that is tested."""
    text = (ROOT / "constraints" / name).read_text(encoding="utf-8")
    rows = re.findall(r"^([\w.-]+)==([^\s;]+)(?: ; ([^\\\n]+))?", text, re.M)
    here = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "sys_platform": "linux"}
    return {n: version for n, version, when in rows if not when or Marker(when).evaluate(here)}


def tested() -> str:
    """Return zoft/tested.txt as the locks have it: each package, its lowest and its newest tested version."""
    low, new = pins("lock-lowest.txt"), pins("lock-dev.txt")
    torch = {"torch": pins("cpu.txt")["torch"]}
    lines = ["# Package, lowest and newest version that zoft was tested with. Made by `make lock`."]
    lines.append(f"python {PYTHON} {PYTHON}")
    for name in env.PACKAGES:
        if name in low | torch:
            lines.append(f"{name} {(low | torch)[name]} {(new | torch)[name]}")
    return "\n".join(lines) + "\n"


def running(text: str) -> str:
    """Return the text of docs/running.md with the line that says what was tested."""
    return re.sub(r"^Tested with.*$", lambda _: env.tested_line(), text, flags=re.M)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--uv", default="uv", help="the uv to call")
    uv = parser.parse_args().uv
    links = ["--find-links", os.environ["PIP_FIND_LINKS"]] if os.environ.get("PIP_FIND_LINKS") else []

    def compile(out: str, *args: str, universal: str = "3.10") -> None:
        place = ROOT / "constraints" / out
        place.unlink(missing_ok=True)  # uv would keep the versions that it finds there
        every = ["--universal", "--python-version", universal] if universal else ["--no-deps"]
        command = [
            uv, "--config-file", "constraints/uv.toml", "pip", "compile", "--quiet", "--generate-hashes", "--no-header",
            "--no-annotate", "--no-emit-package", "torch", *every, *links, *args, "-o", str(place),
        ]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True)
        place.write_text(HEAD + place.read_text(encoding="utf-8"), encoding="utf-8")
        print(f"{place.relative_to(ROOT)}: {len(pins(out))} packages")

    parts = ["pyproject.toml", "constraints/build.in", "-c", "constraints/cpu.txt"]
    compile("lock-dev.txt", *parts, "--extra", "dev")
    compile("lock.txt", *parts, "-c", "constraints/lock-dev.txt")
    compile("lock-docs.txt", *parts, "--extra", "docs", "-c", "constraints/lock-dev.txt")
    compile("lock-real.txt", "constraints/real.in", universal="")
    with tempfile.TemporaryDirectory() as folder:
        lowest = Path(folder, "lowest.txt")
        kept = (f"{n}=={v}\n" for n, v in bounds().items() if n != "torch")
        lowest.write_text("".join(kept), encoding="utf-8")
        compile("lock-lowest.txt", *parts, "--extra", "dev", "-c", str(lowest))
    (ROOT / "zoft" / env.TESTED).write_text(tested(), encoding="utf-8")
    page = ROOT / "docs" / "running.md"
    page.write_text(running(page.read_text(encoding="utf-8")), encoding="utf-8")
    print(env.tested_line())


if __name__ == "__main__":
    main()
