"""YAML files as they may come from anybody: read strictly, and checked before Hydra follows what they name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from zoft.errors import UserError
from zoft.limits import CONFIG_BYTES, read_bytes


def yaml_tree(path: Path, words: bool = False) -> dict[str, Any]:
    """Return the plain tree of a file: mappings, lists and scalars. Raises UserError in one line with the file's line.

    Refused: tags that make objects, a key given twice (YAML keeps the last), aliases (a few of them make a tree
    that no memory holds), label words that YAML reads as something else than their text. words: as in `strict_yaml`.
    """
    data = read_bytes(path, CONFIG_BYTES, "it is no config")
    try:
        tree = strict_yaml(data.decode("utf-8"), path.name, words)
    except UnicodeDecodeError:
        raise UserError(f"{path.name}: not a text file in UTF-8") from None
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"{path.name}: expected lines of `key: value`")
    return tree or {}


def strict_yaml(text: str, where: str, words: bool = False) -> Any:
    """Return the value of a YAML text, by the rules of `yaml_tree`.

    where: for messages. words: scalars are the text that was typed ("no", "007"), but for null.
    """
    import yaml

    class Strict(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()
                raise yaml.composer.ComposerError(
                    None,
                    None,
                    f"aliases like *{event.anchor} are not for configs; write it out",
                    event.start_mark,
                )
            return super().compose_node(parent, index)

        def get_single_node(self) -> Any:
            node = super().get_single_node()
            if not words:
                _refuse_other_words(where, node)
                _refuse_other_numbers(where, node)
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            made = super().construct_mapping(node, deep)
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key} is there twice; keep one", key_node.start_mark
                    )
                seen.add(key)
            return made

    if words:
        Strict.yaml_implicit_resolvers = {
            first: [pair for pair in pairs if pair[0].endswith(":null")]
            for first, pairs in Strict.yaml_implicit_resolvers.items()
        }
    try:
        return yaml.load(text, Strict)
    except RecursionError:
        raise UserError(f"{where}: nested too deep") from None
    except (yaml.YAMLError, ValueError, OverflowError, LookupError, TypeError, AttributeError) as error:
        # A date of month 13, a number too long, `!!int` of nothing, a list as a key.
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{where}{line}: not valid YAML ({problem or (str(error).splitlines() or ['a value that is none'])[0]})"
        ) from None


SAME = {
    "bool": "true|false",
    "int": r"0|-?[1-9]\d*",
    "float": r"(?!)",
    "null": r"(?!)",
}  # words that stay as typed


def _refuse_other_words(where: str, root: Any) -> None:
    """Raise UserError for a word in task.choices or task.columns that would come back as another: no, 007, 1.50."""
    below = [pair for key, node in _pairs(root) if key.value == "task" for pair in _pairs(node)]
    for name, held in [*_pairs(root), *below]:
        pairs = _pairs(held) if name.value in ("choices", "columns") else []
        shown = [(k, k.value) for k, _ in pairs] + [(v, f"{k.value}: {v.value}") for k, v in pairs]
        for word, text in shown:
            kind = str(word.tag).rpartition(":")[2]
            if kind in SAME and not re.fullmatch(SAME[kind], word.value):
                typed = word.value or "…"
                raise UserError(
                    f"{where}, line {word.start_mark.line + 1}: task.{name.value}: {text}: YAML reads {kind} there, "
                    f'not this text; put it in quotes: "{typed}"'
                )


def _refuse_other_numbers(where: str, root: Any) -> None:
    """Raise UserError for a number that YAML reads in base 8 or 60: 010 is 8 there, and 1:30 is 90."""
    nodes = [root]
    while nodes:
        node = nodes.pop()
        value = getattr(node, "value", "")
        if isinstance(value, list):
            nodes += [n for item in value for n in (item if isinstance(item, tuple) else (item,))]
        elif str(getattr(node, "tag", "")).endswith((":int", ":float")) and re.match(
            r"[-+]?0[0-7_]+$|[-+\d_]+:", value
        ):
            raise UserError(
                f"{where}, line {node.start_mark.line + 1}: {value}: YAML reads this in base {60 if ':' in value else 8}; "
                "write the number in digits, or text in quotes"
            )


def _pairs(node: Any) -> list[tuple[Any, Any]]:
    """The nodes of a mapping: (key, value); of anything else none."""
    return node.value if getattr(node, "id", "") == "mapping" else []


def check_file(root: Path, name: str, seen: frozenset[str] = frozenset()) -> None:
    """Check the file root/name.yaml and the files of the same folder that its defaults list names."""
    path = root / f"{name}.yaml"
    tree = yaml_tree(path)
    if "hydra" in tree:
        raise UserError(f"{path.name}: zoft has no hydra section; remove it")
    if name in seen:
        raise UserError(f"{path.name}: its defaults lead back to itself")
    for entry in _defaults(path, tree.get("defaults")):
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", entry):
            raise UserError(
                f"{path.name}: defaults: {entry} is no name of a config; paths lead nowhere from here"
            )
        for place in dict.fromkeys((entry, f"{name.rpartition('/')[0]}/{entry}".lstrip("/"))):
            if place != "_self_" and (root / f"{place}.yaml").is_file():
                check_file(root, place, seen | {name})


def _defaults(path: Path, listed: Any) -> list[str]:
    """The names that a defaults list holds, as group/option."""
    if listed is None:
        return []
    if not isinstance(listed, list):
        raise UserError(f"{path.name}: defaults must be a list: `- /task: reviews`")
    names = []
    for item in listed:
        if isinstance(item, str):
            names.append(item)
            continue
        if not isinstance(item, dict) or len(item) != 1:
            raise UserError(f"{path.name}: defaults: {item!r} is neither a name nor `group: name`")
        ((group, option),) = item.items()
        words = str(group).split()
        if words[:-1] not in ([], ["override"], ["optional"]) or not words:
            raise UserError(f"{path.name}: defaults: {group} is no group of configs")
        group = words[-1].partition("@")[0].lstrip("/")
        options = option if isinstance(option, list) else [option]
        names += [f"{group}/{o}" if group else str(o) for o in options if o is not None]
    return names


def calls(text: str) -> bool:
    """Say whether a value holds an interpolation that is more than ${key}: one that calls something, or is built."""
    for found in re.finditer(r"(\\*)\$\{", text):
        escaped = len(found[1]) % 2 == 1
        if not escaped and not re.match(r"[\w.]+\}", text[found.end() :]):
            return True
    return False
