"""Digest what runs leave behind, to show that a change of the code changes no bit of any of them.

    python scripts/run_digests.py --out before.json --tree ../zoft-before
    python scripts/run_digests.py --out after.json --compare before.json
    python scripts/run_digests.py --device cuda --out gpu.json --cases tiny

Every case is one `zoft train` of the tree, on a tiny random model ("tiny": recipes, precisions, policies, processes), a
shipped config with a tiny model in place of its own ("hub"), or a shipped config on the packaged model ("real"). Its
digest is that of the ledger's header (each key of it), of the ledger's records, and of each saved tensor.
Exit code 1 where a case of --compare differs, with its name and what differs; keys that only the newer header has
are named and are no difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BASE = """
steps: 6
batch_size: 4
lr: 0.01
max_length: 32
threads: 1
eval_limit: 8
weight_decay: 0.01
"""
SMALL = [
    "steps=3",
    "batch_size=2",
    "max_length=32",
    "threads=1",
    "eval_limit=8",
    "eval_every=0",
    "task.train_limit=24",
]
TINY: dict[str, list[str]] = {
    "mezo": [],
    "mezo-rademacher-cosine": ["noise=rademacher", "schedule=cosine", "warmup=0.3", "q=3"],
    "mezo-q3-accumulate": ["q=3", "accumulate=2"],
    "mezo-last": ["train=last-1", "cache_frozen=true"],
    "mezo-norms": ["train=norms"],
    "mezo-fp16": ["storage=fp16"],
    "mezo-bf16-momentum": ["storage=bf16", "momentum=0.9"],
    "mezo-fp64": ["storage=fp64", "compute=fp64", "steps=3"],
    "mezo-clip": ["clip=0.5"],
    "mezo-one-a-forward": ["probes_per_forward=1", "q=2"],
    "mezo-inplace": ["perturb=inplace"],
    "mezo-inplace-q2-momentum": ["perturb=inplace", "q=2", "momentum=0.5", "noise=rademacher"],
    "mezo-accuracy": ["objective=accuracy", "eps=0.5"],
    "mezo-f1": ["objective=f1", "max_new_tokens=3", "eps=0.3", "steps=3"],
    "mezo-snapshots-denoise": ["storage=bf16", "snapshot_every=2", "denoise_every=3"],
    "sparse-magnitude": ["recipe=sparse_mezo"],
    "sparse-magnitude-bf16": ["recipe=sparse_mezo", "storage=bf16", "sparsity=0.5"],
    "sparse-random-momentum": ["recipe=sparse_mezo", "mask=random", "momentum=0.9"],
    "lora": ["recipe=lora_zo"],
    "lora-q2-bits": ["recipe=lora_zo", "q=2", "bits=4"],
    "prefix": ["recipe=lora_zo", "train=prefix"],
    "prompt": ["recipe=lora_zo", "train=prompt"],
    "qzo": ["recipe=qzo", "bits=4"],
    "qzo-relative": ["recipe=qzo", "bits=8", "eps_mode=relative", "lr=0.03", "eps=0.01"],
    "qzo-all": ["recipe=qzo", "bits=4", "train=all"],
    "two-probes": ["--nproc", "2", "parallel=probes", "q=2"],
    "two-data": ["--nproc", "2", "parallel=data"],
}  # fmt: skip


def main() -> int:
    """Run the cases and write their digests; the exit code says whether they equal those of --compare."""
    about = (__doc__ or "").strip()
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tree", type=Path, default=ROOT, help="checkout whose zoft is run (default: this one)"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--compare", type=Path, help="JSON file of another tree")
    parser.add_argument(
        "--cases", nargs="+", choices=("tiny", "hub", "real"), default=["tiny", "hub", "real"]
    )
    parser.add_argument("--only", default="", help="run the cases whose names contain this")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="zoft-digests-") as folder:
        place = Path(folder)
        _models(place)
        todo = {n: words for n, words in _cases(args.tree, args.cases).items() if args.only in n}
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = {n: pool.submit(_digest, args.tree, place, n, w, args.device) for n, w in todo.items()}
            found = {n: job.result() for n, job in jobs.items()}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    if args.compare is None:
        return 0
    before = json.loads(args.compare.read_text())
    lines = [line for n in found if n in before for line in differences(n, before[n], found[n])]
    new = sorted({k for n in found if n in before for k in {*found[n]["header"]} - {*before[n]["header"]}})
    print("\n".join(lines) or f"{sum(n in before for n in found)} runs are equal to the bit")
    print(f"keys that only the newer headers have: {', '.join(new) or 'none'}")
    return 1 if lines else 0


def differences(name: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each digest that two runs do not share; new keys of a header are none."""
    if "failed" in before or "failed" in now:
        return [f"{name}: {before.get('failed', 'ran')} before, {now.get('failed', 'ran')} now"]
    wrong = [f"header {k}" for k, v in before["header"].items() if now["header"].get(k) != v]
    wrong += ["records"] if before["records"] != now["records"] else []
    tensors = {*before["tensors"], *now["tensors"]}
    wrong += [t for t in sorted(tensors) if before["tensors"].get(t) != now["tensors"].get(t)]
    return [f"{name}: {', '.join(wrong[:5])}{' …' * (len(wrong) > 5)}"] if wrong else []


def _cases(tree: Path, kinds: list[str]) -> dict[str, list[str]]:
    """Return the words after `zoft train` of each case."""
    found = {}
    if "tiny" in kinds:
        found |= {f"tiny/{n}": ["--config", "mine.yaml", *words] for n, words in TINY.items()}
    for path in sorted((tree / "configs").glob("*/*.yaml")):
        name = path.relative_to(tree / "configs").with_suffix("").as_posix()
        if path.parent.name in ("task", "model", "bench"):
            continue
        packaged = "smollm2-135m" in path.read_text(encoding="utf-8")
        if packaged and "real" in kinds:
            found[f"real/{name}"] = ["--config", name, *SMALL]
        elif not packaged and "hub" in kinds:
            mine = "masked" if "roberta" in name else "mine"
            found[f"hub/{name}"] = ["--config", name, *SMALL, *_instead(mine)]
    return found


def _instead(mine: str) -> list[str]:
    """Return the overrides that put the tiny model and its data in place of a config's own."""
    end = "[MASK]" if mine == "masked" else ""
    return [
        f"model={'masked' if mine == 'masked' else 'tiny'}", "task=local", "task.train=data.jsonl",
        f"task.prompt={{text}} {end}", "task.label=label", "task.choices={a: a, b: b}",
    ]  # fmt: skip


def _digest(tree: Path, place: Path, name: str, words: list[str], device: str) -> dict[str, Any]:
    """Run one case and digest its folder; {"failed": its last line} where the run ended with an error."""
    out = place / "runs" / name.replace("/", "-")
    paths = [str(tree.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    told = [*words, f"output_dir={out}", f"device={device}"]
    if device == "cuda" and "--nproc" in told:
        return {"failed": "two processes are for the CPU"}
    done = subprocess.run(
        [sys.executable, "-m", "zoft", "train", *told], cwd=place, env=env, capture_output=True, text=True
    )
    print(f"{name}: {'done' if not done.returncode else 'FAILED'}", file=sys.stderr, flush=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["?"])[-1][:300]}
    data = (out / "ledger").read_bytes()
    end = 16 + int.from_bytes(data[12:16], "little")
    header = json.loads(data[16:end])
    flat = {k: v for k, v in header.items() if k not in ("config", "plan")}
    flat |= {f"{part}.{k}": v for part in ("config", "plan") for k, v in header[part].items()}
    return {
        "header": {k: _hash(json.dumps(v, sort_keys=True).encode()) for k, v in flat.items()},
        "records": _records(data[end + 4 :]),
        "tensors": _tensors(out),
    }


def _records(data: bytes) -> str:
    """Return the digest of a ledger's records but for their checksums, which go on from the header's."""
    return _hash(b"".join(data[i : i + 28] for i in range(0, len(data), 32)))


def _tensors(out: Path) -> dict[str, str]:
    import torch
    from safetensors import safe_open

    found = {}
    for path in sorted([*out.glob("model/*.safetensors"), *out.glob("adapter/*.safetensors")]):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                t = file.get_tensor(key)
                found[key] = _hash(t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    assert found, f"{out} has no saved tensors"
    return found


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def _models(place: Path) -> None:
    """Write tiny/, masked/, data.jsonl and mine.yaml."""
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = [*" abcdenoyst:.0123456789"]
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "mask_token": "[MASK]"}
    words = [*special.values(), *letters]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=core, **special)
    small = {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3}  # fmt: skip
    torch.manual_seed(0)
    hf.LlamaForCausalLM(
        hf.LlamaConfig(**small, num_key_value_heads=2, tie_word_embeddings=True)
    ).save_pretrained(place / "tiny")
    hf.BertForMaskedLM(hf.BertConfig(**small)).save_pretrained(place / "masked")
    for folder in ("tiny", "masked"):
        tokenizer.save_pretrained(place / folder)
    rows = [{"text": "bad no " * (i % 3) + str(i), "label": "ab"[i % 2]} for i in range(60)]
    (place / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = "{name: local, train: data.jsonl, prompt: '{text} ', label: label, choices: {a: a, b: b}}"
    (place / "mine.yaml").write_text(f"model: tiny\ntask: {task}\n{BASE}")


if __name__ == "__main__":
    sys.exit(main())
