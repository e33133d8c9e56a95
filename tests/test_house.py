"""The house: imports point downwards only, rooms make no circle, and no folder is crowded."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [  # from the ground up: a room may import what stands before it, and itself
    "", "noise", "config", "ledger", "data", "models", "method", "parallel", "objectives", "probe", "evaluation", "train",
    "replay", "run", "report", "baselines", "sweep", "bench", "cli",
]  # fmt: skip
MOST = 20  # files in a folder


def files():
    """Return the package's and the recipes' files as {dotted module: path}."""
    found = {}
    for path in [*(ROOT / "zoft").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module):
    """Return a module's room: its first folder in zoft/, "" for the ground, "recipes"."""
    parts = module.split(".")
    inner = len(parts) > 2 or (len(parts) == 2 and (ROOT / "zoft" / parts[1]).is_dir())
    return "recipes" if parts[0] == "recipes" else parts[1] if inner else ""


def is_checking(node):
    """Say whether a node is `if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(path, known):
    """Return the modules that a file imports, at its top or later, but for type checking."""
    found, todo = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        todo += node.orelse if is_checking(node) else list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            inner = {f"{node.module}.{a.name}" for a in node.names}
            found |= {m if m in known else str(node.module) for m in inner}
    return {m for m in found if m in known}


def arrows():
    """Return (from, to) for each import within the house."""
    known = files()
    made = [(m, to) for m, path in known.items() for to in imports(path, known)]
    return [(a, b) for a, b in made if b != "zoft" and a not in ("zoft", "zoft.__main__")]


def test_no_arrow_points_up():
    up = []
    for a, b in arrows():
        if room(a) == "recipes":
            up += [f"{a} -> {b}"] * (room(b) not in ("recipes", "method", "noise"))
        elif room(b) == "recipes" or FLOORS.index(room(b)) > FLOORS.index(room(a)):
            up.append(f"{a} -> {b}")
    assert not up, "\n".join(sorted(up))


def test_no_circle_of_files():
    after = defaultdict(set)
    for a, b in arrows():
        after[a].add(b)
    done, path = set(), []

    def walk(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for other in sorted(after[module]):
                walk(other)
            done.add(path.pop())

    for module in sorted(after):
        walk(module)


def test_every_room_has_a_floor_and_no_folder_is_crowded():
    folders = defaultdict(list)
    for module, path in files().items():
        folders[path.parent].append(path.name)
        assert room(module) in (*FLOORS, "recipes"), f"{module} stands on no floor"
    crowded = {str(f.relative_to(ROOT)): len(n) for f, n in folders.items() if len(n) > MOST}
    assert not crowded, crowded


def test_package_files_are_empty():
    full = [str(p.relative_to(ROOT)) for p in (ROOT / "zoft").rglob("__init__.py") if p.read_text().strip()]
    assert set(full) <= {"zoft/__init__.py", "zoft/cli/__init__.py", "zoft/data/tasks/__init__.py"}, full
