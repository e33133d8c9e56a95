"""Read configs: files, composed by Hydra, and `key=value` become plain trees of typed keys. Nothing runs code."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoft.config.check import unknown_key
from zoft.config.schema import SECTIONS, Config, fields, filled
from zoft.errors import UserError, nearest
from zoft.yaml_files import calls, check_file, strict_yaml

GROUPS = ("model", "task")
BENCH = "bench"  # the folder of bench files, which hold rows of configs (zoft/bench/plan.py)
_SWEEP = "one value expected; a list of values is a sweep: use zoft sweep, or quotes around the text"


def packaged(folder: str) -> Path:
    """Return the folder `configs` or `recipes`: inside the package when installed from a wheel, beside it in a source tree."""
    here = Path(__file__).resolve().parents[1]
    return here / folder if (here / folder).is_dir() else here.parent / folder


def names(group: str = "") -> list[str]:
    """Return the packaged configs: whole experiments (mezo/reviews), or those of a group (model, task, bench)."""
    root = packaged("configs")
    found = sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.glob("*/*.yaml"))
    if group:
        return [n.split("/", 1)[1] for n in found if n.startswith(f"{group}/")]
    return [n for n in found if n.split("/")[0] not in (*GROUPS, BENCH)]


def describe(name: str) -> str:
    """Return the first comment line of a packaged config that is not Hydra's."""
    for line in (packaged("configs") / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").strip()
    return ""


def typed(tree: dict[str, Any], defaults: Mapping[str, Any]) -> Config:
    """Merge a plain tree of keys onto the schema, with defaults (a recipe's) where it does not set them.

    Raises UserError for values of another type than their key's.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = _with_floats(filled(_worded(tree), defaults))
    try:
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(tree)))
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None) or "config"
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from None
    assert isinstance(merged, Config), type(merged)
    return merged


def _with_floats(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a tree whose whole numbers are floats where a key takes a float or a word, as OmegaConf has them elsewhere."""
    mixed = {name for name, f in fields().items() if str(f.type).startswith("float |")}
    return {
        k: float(v) if k in mixed and type(v) is int and abs(v) < 1 << 900 else v for k, v in tree.items()
    }


def to_yaml(config: Config) -> str:
    """Return the config as YAML that `--config` reads back to the same values."""
    return dump(dataclasses.asdict(config))


def dump(tree: dict[str, Any]) -> str:
    """Return a plain tree as YAML; text that looks like an interpolation is escaped, so that it stays text."""
    import yaml

    def literal(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: literal(v) for k, v in value.items()}
        return value.replace("${", "\\${") if isinstance(value, str) else value

    class Dumper(yaml.SafeDumper):
        """Text with a line break on one line: "a\\nb"; 1e3, a number to OmegaConf alone, in quotes, too."""

    def text(dumper: Any, value: str) -> Any:
        quoted = "\n" in value or re.fullmatch(r"[-+]?[\d_.]+[eE][-+]?\d+", value)
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if quoted else None)

    Dumper.add_representer(str, text)
    return yaml.dump(literal(tree), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)


def parsed(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    joined: list[str] = []
    for text in overrides:
        if joined and joined[-1].startswith("-") and "=" not in joined[-1] + text and text[:2] != "--":
            joined[-1] += f"={text}"  # `--lr 3`: the message says `write lr=3`
        else:
            joined.append(text)
    pairs: dict[str, str] = {}
    for text in joined:
        name = text.partition("=")[0]
        if name in pairs and not name.startswith("-"):
            raise UserError(f"{name} is given twice: {pairs[name]} and {text}; keep one")
        pairs[name] = text
    return [parse(text) for text in joined]


def assign(tree: dict[str, Any], assigned: Sequence[tuple[str, Any]], folder: Path | None) -> None:
    """Put command-line values into a plain tree: whole groups first, single keys on top of them."""
    for name, value in sorted(assigned, key=lambda pair: pair[0] not in GROUPS):
        if name == "task":
            tree |= group_tree("task", value, folder)
        elif name == "model" and value in names("model"):
            tree |= group_tree("model", value, folder)
        else:
            *section, last = name.split(".", 2)
            node = tree
            for part in section:
                node = node.setdefault(part, {})
                if not isinstance(node, dict):
                    raise UserError(f"{name}: {part} has no keys below it")
            node[last] = value


def parse(text: str) -> tuple[str, Any]:
    """Turn `key=value` from a command line into (dotted key, typed value)."""
    name, equals, raw = text.partition("=")
    if text.startswith("-"):
        flag = name.lstrip("-").replace("-", "_")
        known = flag if flag in fields() else nearest(flag, fields())
        if not known:
            raise UserError(f"unknown option {name}; `zoft --help` lists options, `zoft keys` lists keys")
        raise UserError(f"{name}: keys take no dashes, write {known}={raw or 'VALUE'}")
    if name[:1] in ("+", "~"):
        raise UserError(f"{text}: write key=value, without {name[0]}")
    if not equals:
        hint = f"write --config {text}" if text in names() or text.endswith(".yaml") else "write key=value"
        raise UserError(f"{text}: {hint}")
    if name.startswith(("task.choices.", "task.columns.")):
        return name, raw
    if name not in (known_keys := fields()):
        if os.path.exists(text):  # sweep/lr=0.001-48f02353/config.yaml
            raise UserError(f"{text}: is a path, and key=value is wanted; of a config write --config {text}")
        raise unknown_key(name)
    f = known_keys[name]
    return name, raw if name in SECTIONS else _typed(name, raw, str(f.type), f.metadata)


def _typed(name: str, raw: str, kind: str, metadata: Any) -> Any:
    """The value of `name=raw`, read by the key's own type rather than guessed from the text."""
    if "None" in kind and raw.lower() in ("null", "none"):
        return None
    if kind.startswith("dict"):
        value = strict_yaml(raw, f"{name}={raw}", words=True)
        if not isinstance(value, dict):
            raise UserError(f"{name}={raw}: write '{name}={metadata['example']}'")
        return value
    free = kind.startswith("str") and "one_of" not in metadata and "pattern" not in metadata
    if not free and ("," in raw or re.match(r"(choice|range|interval|glob)\(", raw)):
        raise UserError(f"{name}={raw}: {_SWEEP}")
    if kind.startswith("str"):
        quoted = len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "'\""
        raw = raw[1:-1] if quoted else raw
        return raw.replace("\\n", "\n").replace("\\t", "\t") if metadata.get("template") else raw
    if kind.startswith("bool"):
        words = {"true": True, "false": False, "yes": True, "no": False} | {
            w: w for w in metadata.get("one_of", ())
        }
        if raw.lower() not in words:
            raise UserError(
                f"{name}={raw}: use true{''.join(f', {w}' for w in metadata.get('one_of', ()))} or false"
            )
        return words[raw.lower()]
    if "str" in kind and not re.fullmatch(r"[-+\d.eE_]+|[-+]?(nan|inf)", raw, re.I):
        return raw  # auto, or a word that the range check refuses
    try:
        number = float(raw)
    except ValueError:
        raise UserError(f"{name}={raw}: a {'whole ' if 'int' in kind else ''}number is expected") from None
    if "int" not in kind:
        return number
    if not number.is_integer():
        raise UserError(f"{name}={raw}: a whole number is expected")
    return (
        int(raw) if re.fullmatch(r"[-+]?\d{1,100}", raw) else int(number)
    )  # a float would round from 2^53 on


def is_file(config: str | None) -> bool:
    return bool(config) and (str(config).endswith((".yaml", ".yml")) or os.path.isfile(str(config)))


def read(config: str) -> tuple[dict[str, Any], Path | None]:
    """Return (plain tree, folder of the user's file or None) of a config's name or file."""
    if not is_file(config):
        if config not in names():
            near = nearest(config, names())
            hint = f"did you mean {near}?" if near else f"use {', '.join(names())}, or a path to a .yaml file"
            raise UserError(f"--config {config}: no such config; {hint}")
        return _compose(packaged("configs"), config), None
    path = Path(config).expanduser()
    if not os.path.isfile(path):
        raise UserError(f"--config {config}: no such file")
    path = path.resolve()
    if path.suffix != ".yaml":
        raise UserError(f"--config {config}: the name must end in .yaml")
    return _compose(path.parent, path.stem), path.parent


def group_tree(group: str, name: str, folder: Path | None) -> dict[str, Any]:
    """Return the tree {group: …} of one file of a group, from the user's own folder first."""
    own = (
        sorted(p.stem for p in (folder / group).glob("*.yaml"))
        if folder and (folder / group).is_dir()
        else []
    )
    known = names(group) + own
    if "," in name:
        raise UserError(f"{group}={name}: {_SWEEP}")
    if name not in known:
        near = nearest(name, known)
        raise UserError(f"{group}={name}: use {', '.join(known)}{f'; did you mean {near}?' if near else ''}")
    root = folder if folder and name in own else packaged("configs")
    return _compose(root, f"{group}/{name}")


_kept: dict[tuple[Path, str], dict[str, Any]] | None = None  # files composed so far, within `once_each`


@contextmanager
def once_each() -> Iterator[None]:
    """Let compositions in this context read each file once: Hydra takes 30 ms for it, and a sweep has many configs."""
    global _kept
    _kept = {}
    try:
        yield
    finally:
        _kept = None


def _compose(root: Path, name: str) -> dict[str, Any]:
    """Hydra's composition of root/name.yaml, as a plain tree of the caller's own."""
    if _kept is None:
        return _composed(root, name)
    if (root, name) not in _kept:
        _kept[root, name] = _composed(root, name)
    return copy.deepcopy(_kept[root, name])


def _composed(root: Path, name: str) -> dict[str, Any]:
    """Hydra's composition of root/name.yaml, packaged groups within reach, as a plain tree."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # Hydra is given no overrides but its search path: in a folder that happens to have a subfolder `train`,
    # it would take train=all for the choice of a config group.
    library = str(packaged("configs"))
    quoted = library.replace("\\", "\\\\").replace("'", "\\'")
    search = [] if str(root) == library else [f"hydra.searchpath=['file://{quoted}']"]
    path = root / f"{name}.yaml"
    if str(root) != library:
        check_file(root, name)
    outer = GlobalHydra.instance().hydra  # of a job of Hydra's own that calls zoft: there is one at a time
    GlobalHydra.instance().hydra = None
    try:
        with initialize_config_dir(str(root), version_base="1.3"):
            tree = OmegaConf.to_container(hydra_compose(name, overrides=search), resolve=False)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        text = " ".join(line.strip() for line in str(cause).splitlines()[:2])
        raise UserError(f"{path.name}: {text}") from None
    finally:
        GlobalHydra.instance().hydra = outer
    assert isinstance(tree, dict), type(tree)
    return {str(k): v for k, v in tree.items()}


def known(tree: dict[str, Any]) -> None:
    """Raise UserError for keys outside the schema, a group that is no mapping, or an interpolation that calls."""
    for name, value in tree.items():
        if name not in fields() or "." in name:
            raise unknown_key(name)
        if name in SECTIONS:
            known_parts = [f.name for f in dataclasses.fields(SECTIONS[name])]
            if not isinstance(value, dict):
                shown = ", ".join(known_parts[:3])
                raise UserError(f"{name}: expected keys below it ({shown}, …), got {value!r}")
            for part in value:
                if part not in known_parts:
                    raise unknown_key(f"{name}.{part}")
    for name, value in _leaves(tree):
        if name in fields() and fields()[name].type == "bool" and type(value) in (int, float):
            raise UserError(f"{name}={value}: use true or false")
        if isinstance(value, str) and calls(value):
            raise UserError(f"{name}: {value!r} calls a resolver; only ${{key}} may stand in a config")


def _worded(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with the words of task.choices and task.columns as text. Raises UserError where no text was meant."""
    task = dict(tree.get("task") or {})
    for name in ("choices", "columns"):
        if not isinstance(task.get(name), dict):
            continue
        for k, v in task[name].items():
            if v is None:
                raise UserError(
                    f'task.{name}: {k} stands for null; give it some text (that word in quotes: {{{k}: "null"}})'
                )
            for word in (k, v):
                if word is None or isinstance(word, (float, dict, list)):
                    said = "null" if word is None else repr(word)
                    what = said if word is k else f"{k} stands for {said}, which"
                    raise UserError(f"task.{name}: {what} is no text; give it some text, in quotes")
        # true, false: of others (no, off) `yamlfile` refuses those whose text would be lost.
        task[name] = {k: str(v).lower() if isinstance(v, bool) else v for k, v in task[name].items()}
    return tree | {"task": task} if "task" in tree else tree


def _leaves(node: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, dict):
        return [leaf for k, v in node.items() for leaf in _leaves(v, f"{name}.{k}" if name else str(k))]
    return [(name, node)]
