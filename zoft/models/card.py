"""Write the README.md of a saved model: base, data, method, results, how to rebuild it and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoft.console import short
from zoft.errors import one_line
from zoft.models import load
from zoft.models.quantised_files import OURS

LIBRARY = "library_name: transformers"
BASELINES = {
    "majority": "`majority` is the accuracy of always answering the training set's most frequent label.",
    "calibrated_accuracy": "`calibrated_accuracy` of the untrained model is what removing its label bias reaches without training.",
}


def model_card(
    base: load.Source | str,
    *,
    data: Mapping[str, Any],
    method: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    rebuild: str,
) -> str:
    """Return the text of a model's README.md, up to how it is loaded, which `write_card` adds.

    Args:
        base: The model that was trained.
        data: Label -> value: task, files, prompt.
        method: Label -> value: recipe, steps, lr and so on.
        results: "before" and "after" -> metric -> value; empty for weights without an evaluation.
        rebuild: One sentence on how the weights follow from the ledger.
    """
    source = base if isinstance(base, load.Source) else load.Source("folder", base, base)
    lines = ["---", LIBRARY, "tags: [zoft, zeroth-order, mezo]"]
    if source.home:
        lines.append(f"base_model: {json.dumps(source.home)}")
    lines += ["---", "", f"# {Path(source.name).name}, fine-tuned with forward passes only", ""]
    lines += ["Trained by zoft with zeroth-order optimisation: forward passes, no back-propagation.", ""]
    home = f" ({source.home})" if source.home and source.home != source.name else ""
    lines += ["## Base", "", f"{_cell(source.name)}{home}", ""]
    for title, rows in (("Data", data), ("Method", method)):
        lines += [
            f"## {title}",
            "",
            "| | |",
            "|---|---|",
            *(f"| {k} | {_cell(v)} |" for k, v in rows.items()),
            "",
        ]
    return "\n".join([*lines, "## Results", "", *_results(results), "", "## Rebuild it", "", rebuild, ""])


def _results(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of the table of metrics and of its baselines."""
    before, after = results.get("before", {}), results.get("after", {})
    names = list(dict.fromkeys([*before, *after]))
    if not names:
        return ["These weights have no evaluation of their own; `zoft eval` makes one."]
    rows = [f"| {n} | {short(before.get(n, ''))} | {short(after.get(n, ''))} |" for n in names]
    told = ["*Untrained* is the base on the same rows, without any training."]
    told += [text for name, text in BASELINES.items() if name in names]
    return ["| held-out rows | untrained | trained |", "|---|---|---|", *rows, "", *told]


def write_card(folder: Path, card: str) -> None:
    """Write a card beside saved weights, with the lines that load what the folder holds."""
    if not card:
        return
    if (folder / "adapter_config.json").is_file():
        card = card.replace(LIBRARY, "library_name: peft", 1)
    (folder / "README.md").write_text(
        f"{card.rstrip()}\n\n## Load it\n\n{_loading(folder)}\n", encoding="utf-8"
    )


def _loading(folder: Path) -> str:
    """Return the text on how to open what a folder holds."""
    if (folder / "adapter_config.json").is_file():
        said = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = json.dumps(said.get("base_model_name_or_path") or "BASE")
        return _python(
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            f"base = AutoModelForCausalLM.from_pretrained({base})",
            'model = PeftModel.from_pretrained(base, "FOLDER")  # this folder',
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (config.get("quantization_config") or {}).get("quant_method") == OURS or (folder / "adapter").is_dir():
        text = "zoft opens this folder (`model=FOLDER`); `zoft export RUN --merge --out DIR` writes plain weights for other libraries."
        return f"{text}\n\n" + _python(
            "from zoft.models.load import load_model",
            'model, tokenizer = load_model("FOLDER")  # this folder',
        )
    masked = any("MaskedLM" in name for name in config.get("architectures") or ())
    name = "AutoModelForMaskedLM" if masked else "AutoModelForCausalLM"
    return _python(
        f"from transformers import {name}, AutoTokenizer",
        f'model = {name}.from_pretrained("FOLDER")  # this folder',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
    )


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _cell(value: Any) -> str:
    """Return a value as a cell of a table: one line, without a bar of its own."""
    return one_line(str(value)).replace("|", "\\|")
