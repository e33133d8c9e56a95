"""Train, evaluate, replay and export with an installed zoft, on a tiny model, in an empty folder.

    cd /somewhere/else && python …/tests/fresh.py

Run by the Python that zoft is installed in. What an import from the source tree hides shows here: a file that the wheel
lacks, an entry point, a version of a library that was resolved today.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def check(folder, env=None):
    """Run the verbs in a folder outside the source tree; AssertionError where one fails."""
    env = {**(env or os.environ), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}

    def run(*words):
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, (words[1:], done.stdout[-2000:], done.stderr[-4000:])
        return done.stdout

    def zoft(*words):
        return run(sys.executable, "-m", "zoft", *words)

    place = Path(run(sys.executable, "-c", "import zoft; print(zoft.__file__)").strip())
    assert ROOT / "zoft" not in place.parents, f"{place} is the source tree"
    make = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import pathlib, tiny; m = tiny.llama(); "
    )
    make += "m.save_pretrained('tiny'); tiny.tokenizer().save_pretrained('tiny'); tiny.write_rows(pathlib.Path('rows.jsonl'), tiny.ROWS)"
    run(sys.executable, "-c", make)
    small = [
        "model=tiny",
        "steps=6",
        "batch_size=2",
        "eval_every=3",
        "eval_limit=8",
        "max_length=32",
        "threads=1",
    ]
    task = [
        "task=local", "task.train=rows.jsonl", "task.eval=rows.jsonl", "task.prompt={text}:", "task.label=label",
        "task.choices={a: no, b: yes}",
    ]  # fmt: skip
    zoft("cp", "mezo/reviews", "mine.yaml")
    for name, how in {"all": ["train=all"], "lora": ["recipe=lora_zo", "train=lora"]}.items():
        zoft("train", *small, *task, *how, "lr=1e-3", f"output_dir={name}")
        assert json.loads(Path(folder, name, "result.json").read_text())["after"]["n"] == 8
        zoft("eval", name)
    zoft("replay", "all", "--out", "again")
    same = [Path(folder, d, "model.safetensors").read_bytes() for d in ("all/model", "again")]
    assert same[0] == same[1], "the replayed weights differ"
    zoft("export", "lora", "--merge", "--out", "merged")
    run(sys.executable, "-c", "import transformers as t; t.AutoModelForCausalLM.from_pretrained('merged')")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as empty:
        check(empty)
    print("train, eval, replay and export work from an installed wheel")
