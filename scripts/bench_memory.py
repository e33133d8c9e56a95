"""Compare what `zoft estimate` says a run will take with what `zoft train` then took.

Each model is made with random weights, saved in a folder, and trained for a few steps on rows of a known length.

python scripts/bench_memory.py --case opt-125m:16x32 --case opt-1.3b:16x256 --json memory.json
python scripts/bench_memory.py --case opt-125m:16x32:perturb=inplace --case opt-125m:8x64:q=4,probes_per_forward=8
python scripts/bench_memory.py --case tiny:4x16 --device cpu --steps 2
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from bench_models import MODELS, build
from tokenizers import Tokenizer, models, pre_tokenizers

from zoft.config.schema import Config
from zoft.env import environment
from zoft.method import configured
from zoft.method.space import DTYPES
from zoft.run import estimate
from zoft.run.start import train_run
from zoft.tables import markdown

DEFAULT = ["opt-125m:16x32", "opt-125m:16x256", "opt-125m:16x256:perturb=inplace", "opt-125m:8x64:q=4,probes_per_forward=8",
           "smollm2-135m:16x64", "opt-1.3b:16x32", "opt-1.3b:16x256", "llama-1b:16x256"]  # fmt: skip


def saved(name: str, device: str, dtype: torch.dtype, folder: Path) -> None:
    """A model of that shape in a folder, with a tokenizer of one word a token."""
    model = build(name, device, dtype)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(model.config.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w1", bos_token="w2", eos_token="w3"
    ).save_pretrained(folder)
    model.save_pretrained(folder)


def rows(path: Path, tokens: int, count: int, vocab: int) -> None:
    """Rows whose sequences are exactly `tokens` long: the label's word is the last one, and is not an input."""
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            text = " ".join(f"w{k}" for k in rng.integers(7, vocab, tokens))
            file.write(json.dumps({"text": text, "label": "ab"[i % 2]}) + "\n")


def measure(
    case: str, folder: Path, device: str, dtype: torch.dtype, steps: int, made: set[str]
) -> dict[str, Any]:
    """Estimate, then train; bytes of both."""
    name, shape, *more = case.split(":")
    batch, tokens = map(int, shape.split("x"))
    place, data = folder / name, folder / f"{name}-{tokens}.jsonl"
    if name not in made:
        saved(name, device, dtype, place)
        made.add(name)
        release(device)
    rows(data, tokens, 4 * batch, MODELS[name]().vocab_size)
    overrides = [
        f"model={place}", "task=local", f"task.train={data}", f"task.eval={data}", "task.prompt='{text}'", "task.label=label",
        "task.choices={a: ' w5', b: ' w6'}", f"batch_size={batch}", f"steps={steps}", f"device={device}", "lr=1e-7",
        f"max_length={tokens + 8}", "save_model=false", *",".join(more).split(","),
    ]  # fmt: skip
    config: Config = configured.compose(None, [o for o in overrides if o])
    expected = estimate.estimate_run(config)
    release(device)
    before = _allocated(device)
    out = train_run(_in(config, folder / f"run-{len(list(folder.iterdir()))}"))
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0  # result.json has it rounded
    found = {
        "case": case, "estimated_bytes": expected["peak_bytes"], "measured_bytes": peak if peak else out["peak_memory_gb"] * 1e9,
        "left_before": before, "seconds_per_step": expected["seconds_per_step"], "notes": expected["notes"],
    }  # fmt: skip
    parts = {k: v for k, v in expected.items() if k.endswith("_bytes")}
    release(device)
    return found | parts


def _in(config: Config, folder: Path) -> Config:
    config.output_dir = str(folder)
    return config


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device.startswith("cuda") else 0


def release(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()  # of the streams of earlier runs
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def table(found: list[dict[str, Any]]) -> str:
    parts = ("weights", "scratch", "activation", "evaluation")
    head = [
        "model: batch × tokens",
        "estimate",
        "measured",
        "estimate ÷ measured",
        f"of the estimate: {parts[0]}",
        *parts[1:],
    ]
    lines = []
    for r in found:
        if "error" in r:
            lines.append([r["case"], r["error"]])
            continue
        sizes = [r["estimated_bytes"], r["measured_bytes"], *(r[f"{p}_bytes"] for p in parts)]
        gb = [f"{size / 1e9:.3f}" for size in sizes]
        lines.append([r["case"], *gb[:2], f"{sizes[0] / sizes[1]:.3f}", *gb[2:]])
    return markdown(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", metavar="MODEL:BxT[:KEY=VALUE,…]", help="repeatable")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="of the checkpoint; bf16 on a GPU, fp32 on a CPU"
    )
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    dtype = DTYPES[args.dtype or ("bf16" if args.device.startswith("cuda") else "fp32")]
    found: list[dict[str, Any]] = []
    made: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for case in args.case or DEFAULT:
            try:
                found.append(measure(case, Path(folder), args.device, dtype, args.steps, made))
            except Exception as error:  # one case that fails does not cost the others
                found.append({"case": case, "error": f"{type(error).__name__}: {error}"[:200]})
            print(found[-1], file=sys.stderr, flush=True)
    env = environment()
    where = env["gpus"] if args.device.startswith("cuda") else env["cpu"]
    print(f"{where}; torch {env['packages']['torch']}, transformers {env['packages']['transformers']}")
    print(f"`{shlex.join(['python', *sys.argv])}`\n\nGB.\n\n{table(found)}")
    if args.json:
        Path(args.json).write_text(json.dumps({"environment": env, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
