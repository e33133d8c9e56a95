"""Docstrings say what is done: they begin with a verb, not with What, Whether or a noun."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = {"what", "of", "whether", "how", "which", "those", "where", "when", "why", "who"}
VERBS = set(
"""
Add Append Apply Ask Attach Begin Bring Build Call Cancel Catch Check Choose Close Collect Compare Compute
Connect Convert Copy Count Create Decode Delete Describe Do Download Draw Drop Encode End Estimate Evaluate
Evict Exchange Expand Explain Fetch Fill Filter Find Fine-tune Finish Flush Fold Forget Format Gather
Generate Give Go Group Hand Handle Hash Have Hide Hold Join Keep Let Limit List Listen Load Log Make Map Mark
Measure Merge Move Name Note Offload Open Pack Parse Perturb Plot Prefetch Prepare Print Probe Provide Put
Quantise Raise Rank Read Rebuild Receive Record Refuse Remove Render Repeat Replace Replay Report Represent
Reset Resolve Restore Return Round Run Sample Save Say Score Select Send Serve Set Share Show Signal Skip
Sort Split Start State Stop Store Stream Submit Sum Sync Take Tokenise Train Try Turn Update Use Validate
Verify Visit Wait Watch Work Wrap Write Yield
""".split()
)  # fmt: skip


def docstrings(node, public=True):
    """Yield (node, its docstring, whether it is public) of a module and all that is defined in it."""
    is_definition = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    if is_definition:
        public = public and not node.name.startswith("_")
    if (is_definition or isinstance(node, ast.Module)) and (text := ast.get_docstring(node)):
        yield node, text, public and is_definition
    inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))  # what a function defines is its own
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield from docstrings(child, public and not inside)


def first_word(text):
    return re.match(r"[\w'-]*", text)[0]


def test_no_docstring_begins_with_a_question_word_or_a_noun():
    offenders = []
    for folder in ("zoft", "recipes", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node, text, public in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
                word = first_word(text)
                if word.lower() in QUESTIONS or (public and folder != "scripts" and word not in VERBS):
                    where = getattr(node, "name", "module")
                    offenders.append(f"{path.relative_to(ROOT)}::{where}: {text.splitlines()[0]}")
    assert not offenders, "\n".join(offenders)
