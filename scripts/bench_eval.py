"""Time the scoring of candidates: zoft's evaluation, and a plain loop of batched forwards over (row, candidate) pairs.

    python scripts/bench_eval.py --rows 1000 --threads 2
    python scripts/bench_eval.py --rows 200 --config mezo/trec task=trec

Both score the same encoded examples with the same model in fp32, without calibration. The plain loop takes the pairs by
length, --batch at a time, padded on the right, makes all logits, and reads the candidate's. Two sets of candidates are
timed: the task's own, and the task's own behind a word more (several tokens). Prints times, their ratio (of CPU
time, too: where others share the machine it says more) and the largest score difference (single-token candidates: of log softmax over candidates).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


@torch.no_grad()
def plain(model: Any, examples: list[Any], size: int) -> np.ndarray:
    """[n, C]: mean log p of each candidate's tokens, from rows of their own."""
    pairs = [(i, c) for i, e in enumerate(examples) for c in range(len(e.completions))]
    pairs.sort(key=lambda p: -len(examples[p[0]].contexts[p[1]]) - len(examples[p[0]].completions[p[1]]))
    found = np.full((len(examples), max(len(e.completions) for e in examples)), -np.inf)
    for at in range(0, len(pairs), size):
        rows = [examples[i].contexts[c] + examples[i].completions[c] for i, c in pairs[at : at + size]]
        width = max(map(len, rows))
        ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for r, (i, c) in enumerate(pairs[at : at + size]):
            start, tokens = len(examples[i].contexts[c]), torch.tensor(examples[i].completions[c])
            logp = logits[r, start - 1 : start - 1 + len(tokens)].float().log_softmax(-1)
            found[i, c] = logp.gather(1, tokens[:, None]).mean()
    return found


def compare(config: Any, model: Any, tokenizer: Any, rows: int, batch: int) -> dict[str, Any]:
    """Times of both ways on the training and evaluation rows of a task, the first `rows` of them."""
    from zoft.data import tasks
    from zoft.data.encode import encode
    from zoft.evaluation import evaluate

    data = tasks.load_task(config.task)
    examples = encode((data.eval + data.train)[:rows], tokenizer, data, config.max_length)
    evaluate.scores(model, examples[:8])  # first calls allocate
    ours, ours_seconds, ours_cpu = timed(lambda: evaluate.scores(model, examples))
    theirs, plain_seconds, plain_cpu = timed(lambda: plain(model, examples, batch))
    if examples[0].single:
        ours, theirs = evaluate.log_softmax(ours), evaluate.log_softmax(theirs)
    tokens = sorted({len(c) for e in examples for c in e.completions})
    return {
        "rows": len(examples), "candidates": ours.shape[1], "tokens": "–".join(map(str, tokens)),
        "prompt": float(np.mean([len(e.contexts[0]) for e in examples])),
        "zoft_seconds": ours_seconds, "plain_seconds": plain_seconds, "ratio": ours_seconds / plain_seconds,
        "cpu_ratio": ours_cpu / plain_cpu, "difference": float(np.abs(ours - theirs).max()),
    }  # fmt: skip


def timed(work: Callable[[], np.ndarray]) -> tuple[np.ndarray, float, float]:
    """(what it gives, seconds, seconds of CPU time, which other processes do not lengthen much)."""
    began, cpu = time.perf_counter(), time.process_time()
    return work(), time.perf_counter() - began, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", "-c", default="mezo/reviews", help="a packaged config or a .yaml file")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16, help="pairs a forward in the plain loop")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="a forward in zoft, in the place of its own number")
    parser.add_argument(
        "--word", default=" simply", help="what stands before each candidate in the second set"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for `zoft train`")
    args = parser.parse_intermixed_args()
    from dataclasses import replace

    from zoft.data import tasks
    from zoft.errors import UserError
    from zoft.evaluation import evaluate
    from zoft.method.configured import compose
    from zoft.models import load

    torch.set_num_threads(args.threads)
    if args.tokens:
        evaluate.TOKENS = evaluate.CPU_TOKENS = args.tokens
    try:
        config = compose(args.config, args.overrides)
        model, tokenizer = load.load_model(config.model, dtype=torch.float32)
        words = {k: args.word + v for k, v in tasks.load_task(config.task).choices.items()}
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{config.model}, {args.threads} threads of {platform.machine()}, torch {torch.__version__}\n")
    print(
        "| rows × candidates | tokens a candidate | tokens a prompt | zoft, s | plain loop, s | ratio | of CPU time | difference |"
    )
    print("| --- " * 8 + "|")
    found = []
    for choices in (config.task.choices, words):
        r = compare(
            replace(config, task=replace(config.task, choices=choices)),
            model,
            tokenizer,
            args.rows,
            args.batch,
        )
        found.append(r)
        print(f"| {r['rows']} × {r['candidates']} | {r['tokens']} | {r['prompt']:.0f} | {r['zoft_seconds']:.1f} "
              f"| {r['plain_seconds']:.1f} | {r['ratio']:.2f} | {r['cpu_ratio']:.2f} | {r['difference']:.1g} |", flush=True)  # fmt: skip
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
