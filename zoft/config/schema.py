"""The keys of a run: their types, defaults, one line of documentation each, and the values they may take.

Nothing here imports more than the standard library; `zoft.config.compose` reads YAML and `key=value`, `zoft.method.configured` makes a Config of them, and
`zoft.config.check` refuses values that do not go together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zoft import limits as bounds

DTYPE_NAMES = ("auto", "fp32", "fp16", "bf16", "fp64")
ADAPTERS = ("lora", "prefix", "prompt")  # values of `train` that add tensors to a frozen model
# Defaults that depend on what is trained. LoRA, prefix: of the MeZO paper's grids (arXiv 2305.17333); prompt:
# what those who compare on it use (SubZero, arXiv 2410.08989); scales: of the QZO paper (arXiv 2505.13430).
BY_TRAIN: dict[str, dict[str, Any]] = {
    "lora": {"lora_rank": 8, "lora_alpha": 16, "lr": 1e-4, "eps": 1e-2},
    "prefix": {"virtual_tokens": 5, "lr": 1e-2, "eps": 1e-1},
    "prompt": {"virtual_tokens": 10, "lr": 1e-3, "eps": 1e-2},
    "scales": {"lr": 1e-7, "eps": 1e-3},
}
# Objectives of text that the model writes, and others that have no gradient either.
GENERATED = ("exact_match", "f1", "reward")
NO_GRADIENT = ("accuracy", "macro_f1", *GENERATED)
# Keys that say something of some trained sets only.
LORA = ("lora_rank", "lora_alpha", "lora_targets", "lora_layers")
ONLY = {**dict.fromkeys(LORA, ("lora",)), "virtual_tokens": ("prefix", "prompt")}

SETS = rf"all|upper|last-\d+|norms|bias|head|scales|{'|'.join(ADAPTERS)}"  # what `train` may be besides a pattern


def key(default: Any, doc: str, **limits: Any) -> Any:
    """A dataclass field with its documentation and limits.

    limits: one_of (allowed words), pattern (a regular expression and its description), least (≥), above (>),
    below (<), most (≤), template (True: a backslash and n typed in a shell is a line break), example (of a map).
    """
    metadata = {"doc": doc, **limits}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Task:
    """Where examples come from and how each becomes a prompt and what is scored after it."""

    name: str = key("", "a task of configs/task: sst2, squad, …, reviews, or local (your own data)")
    train: str | None = key(
        None,
        "training data: a .jsonl, .csv, .tsv, .json or .parquet file, a folder of such or of .txt files, or a Hub "
        "data set id[:split]",
    )
    eval: str | None = key(None, "evaluation data, like train; null holds a fixed part of train out, by hash")
    subset: str | None = key(None, "configuration of a Hub data set that has several (glue has sst2, rte, …)")
    train_limit: int | None = key(
        None, "train on a fixed subset of this many examples; null takes all", least=1
    )
    max_words: int | None = key(
        None,
        "leave out rows with more words in the prompt's columns (of a recognised layout: in all it reads); null takes all",
        least=1,
    )
    prompt: str | None = key(
        None, "template with column names in braces: 'Review: {text}\\nSentiment:'", template=True
    )
    label: str | None = key(None, "column that holds the label")
    choices: dict[Any, str] = key(
        {},
        "label -> the text that stands for it: {negative: ' terrible', …}",
        example='{label: " text", other: " text"}',
    )
    target: str | None = key(
        None, "template of the text to learn, where labels do not fit (LM loss)", template=True
    )
    format: str = key(
        "auto",
        "layout of your own data, where no template names its columns; auto goes by their names and says what it found",
        one_of=("auto", "text", "completion", "instruction", "messages", "sharegpt", "label"),
    )
    columns: dict[Any, str] = key(
        {},
        "what a layout calls a column -> your column: {prompt: question, completion: reply}",
        example="{prompt: question, completion: reply}",
    )
    chat: str = key(
        "auto",
        "how turns are written: with the tokenizer's chat template, or plain, as text; auto is plain where prompt and "
        "completion are all there is and the tokenizer has no template",
        one_of=("auto", "template", "plain"),
    )
    pack: bool = key(False, "format=text: texts follow each other in rows of max_length, not one text a row")
    null_prompt: str | None = key(
        None,
        "the prompt without what it asks about, for `zoft baseline --method sfc`; null: the template, columns empty",
        template=True,
    )
    num_train: int | None = key(
        None, "train on so many rows, the first of a permutation by data_seed; null takes all", least=1
    )
    num_dev: int | None = key(
        None, "rows after them in that permutation, kept aside as the dev set; null has none", least=1
    )
    num_eval: int | None = key(
        None, "evaluate on so many rows, the first of a permutation by data_seed; null takes all", least=1
    )
    k_shot: int | None = key(
        None, "train on so many rows of each class, with as many more as the dev set", least=1
    )
    data_seed: int = key(
        0, "of those permutations (the papers: 0; k_shot: 13, 21, 42, 87, 100)", least=0, below=1 << 32
    )
    balanced: bool = key(False, "as many rows of each class in num_train and num_dev")


@dataclass
class Limits:
    """What a data file may hold; zoft.limits has the bounds that no key raises, docs/running.md all of them."""

    rows: int = key(bounds.ROWS, "rows of a data file or folder, at most", least=1)
    bytes: int = key(bounds.BYTES, "bytes of a data file, or of what a packed one holds, at most", least=1)
    cell: int = key(bounds.CELL, "characters of a cell or a line of a data file, at most", least=1)


@dataclass
class Config:
    """A run. Short names, one level, `task` and `limits` being the only groups with keys of their own."""

    recipe: str = key(
        "mezo", "the method: a file of recipes/, or on the command line a page of your own (--recipe FILE.py)"
    )
    model: str = key("", "a name of configs/model, a folder, a .gguf file, or a Hub id")
    task: Task = field(default_factory=Task, metadata={"doc": "a name of configs/task; its keys are task.…"})
    train: str = key(
        "all",
        "trained tensors: all, upper (linear layers of the upper half of the blocks), last-2, norms, bias, head, scales, or a pattern searched in their names; "
        "or lora, prefix, prompt: tensors added to a frozen model",
    )
    objective: str = key(
        "auto",
        "what is minimised: a loss (over candidates, or of the text to learn; auto: the task's own), or minus a metric: of "
        "predictions (accuracy, macro_f1) or of text that the model writes (exact_match, f1, a reward of your own)",
        one_of=("auto", "choice", "lm", *NO_GRADIENT),
    )
    reward: str | None = key(
        None,
        "my_reward.py:score, a function (rows, texts) -> a number a row; only on the command line, as --reward",
    )
    reward_seconds: float = key(60.0, "what one call of the reward may take", above=0, most=1e6)
    max_new_tokens: int = key(50, "tokens that are written after a prompt, at most", least=1)
    stop: str | None = key(
        "\n", "text that ends what is written, and is left out; null: end-of-text alone", template=True
    )
    hold_probe: bool | str = key(
        "auto",
        "text is written with a probe's weights made once, beside the model's own; false: anew for each token, in "
        "less memory; auto: once where half of the free memory holds what is trained",
        one_of=("auto",),
    )
    lora_rank: int | None = key(None, "rank of the LoRA pairs; null is 8", least=1)
    lora_alpha: int | None = key(None, "a LoRA pair counts lora_alpha / lora_rank times; null is 16", least=1)
    lora_targets: str | None = key(
        None,
        "modules that get a LoRA pair: ends of their names ('q_proj v_proj'), all-linear, or a pattern for whole names; "
        "null: query and value projections, as peft has them for the model's type",
    )
    lora_layers: str | None = key(
        None, "last-6: LoRA pairs in the last 6 blocks only", pattern=(r"last-[1-9]\d*", "last-1, last-2, …")
    )
    adapter: str | None = key(
        None,
        "folder of a saved LoRA adapter that is put in place, frozen, and stays there while other tensors are trained; "
        "train=lora trains on from it",
    )
    virtual_tokens: int | None = key(
        None, "length of the prefix (null is 5) or the prompt (null is 10)", least=1
    )
    lr: float | str = key(
        1e-6,
        "learning rate; all weights want 1e-7 to 1e-5; not set: lora 1e-4, prefix 1e-2, prompt 1e-3, "
        "scales 1e-7; auto: measured before the first step, along lines that `zoft lr` shows",
        least=0,
        one_of=("auto",),
    )
    schedule: str = key("constant", "learning rate over the steps", one_of=("constant", "linear", "cosine"))
    warmup: float = key(0, "warm-up steps; below 1, a fraction of all steps", least=0)
    estimator: str = key(
        "auto",
        "how a step's losses become its update: two_sided (the loss at θ ± eps·z of each direction, 2q forwards), one_sided "
        "(at θ + eps·z of each and once at θ, q + 1 forwards; wants a smaller eps), normalised (one_sided over the spread of "
        "the step's losses, q of 2 or more; lr is then the size of a step); auto: the recipe's, two_sided",
        one_of=("auto", "two_sided", "one_sided", "normalised"),
    )
    clip: float | None = key(
        None,
        "largest projected gradient, (l+ - l-)/2eps, that a step may use; null: any (recipe=qzo: 100)",
        above=0,
    )
    meazo: float = key(
        0.0,
        "divide steps by the root of the projected gradient's running second moment, of this decay (0.99); lr is then "
        "the size of a step; 0 does not",
        least=0,
        below=1,
    )
    max_forwards: int | None = key(
        None, "stop at so many forwards (examples × probes): fewer steps than `steps` if need be", least=1
    )
    weight_decay: float = key(0.0, "decoupled decay, times lr, not for biases and norms", least=0)
    anchor: float = key(
        0.0,
        "decay towards the weights that training began with, times lr, of all trained tensors; keeps a second copy of them",
        least=0,
    )
    update: str = key(
        "auto",
        "how a step moves the weights: by lr times the estimate (sgd), by lr against its sign (sign), or as Adam does, with "
        "two fp32 moments for each trained number (adam), lr being the size of a step with these two; conservative: to the best of "
        "θ and θ ± lr times the estimate on the same batch, 3 more forwards; momentum: with the directions of past steps drawn again, for noise that is cheap to draw; auto is the recipe's own (sgd)",
        one_of=("auto", "sgd", "sign", "adam", "momentum", "conservative"),
    )
    momentum: float = key(
        0.0,
        "what each step keeps of the one before: update=sgd has a buffer for each trained number (0: none), update=momentum has none",
        least=0,
        below=1,
    )
    eps: float = key(
        1e-3,
        "probe size: the loss is asked at θ ± eps·z; not set: lora 1e-2, prefix 1e-1, prompt 1e-2",
        above=0,
        most=1000,
    )
    noise: str = key(
        "gaussian",
        "what z is drawn from: gaussian, rademacher (signs), or rank1 (signs a bᵀ of rank 1 for each matrix, which no "
        "scratch copy of the weights is made for)",
        one_of=("gaussian", "rademacher", "rank1"),
    )
    directions: str = key(
        "shared",
        "shared: all examples of a step are asked about the same directions; example: each about its own, at no more "
        "forwards (of gaussian and rademacher noise one draw serves all of a step, its signs flipped for each example)",
        one_of=("shared", "example"),
    )
    mask: str = key(
        "auto",
        "recipe=sparse_mezo: which numbers of each matrix move: those that are small in the base (magnitude; auto), as "
        "many at random, or all",
        one_of=("auto", "magnitude", "random", "none"),
    )
    sparsity: float = key(
        0.75, "recipe=sparse_mezo: share of each matrix that stays as it is", least=0, below=1
    )
    mask_every: int = key(
        0,
        "recipe=sparse_mezo, mask=random: steps between new draws of which numbers move (1: each step anew); 0 draws once",
        least=0,
        below=1 << 32,
    )
    blocks: str = key(
        "all",
        "which trained tensors a step probes and moves: all, or those of one block of the model (tensors outside of its blocks "
        "are one more), drawn for each step (random) or in turn (cyclic)",
        one_of=("all", "random", "cyclic"),
    )
    q: int = key(
        1, "directions a step; `estimator` says at which points each is probed", least=1, most=1 << 16
    )
    steps: int = key(1000, "updates in all", least=1, below=1 << 32)
    batch_size: int = key(16, "examples a batch, those of all processes together", least=1, most=1 << 20)
    accumulate: int = key(1, "batches a step, under one set of directions", least=1, most=1 << 20)
    seed: int = key(0, "of noise and data order", least=0, below=1 << 64)
    eval_every: int = key(0, "steps between evaluations; 0 evaluates before and after only", least=0)
    eval_limit: int | None = key(
        None, "evaluate on a fixed subset of this many examples; null takes all", least=1
    )
    max_length: int = key(512, "tokens an example, cut on the left of the prompt", least=2)
    bits: int | None = key(
        None, "quantise the linear layers, as the model is loaded, to whole numbers of 4 or 8 bits and scales"
    )
    group: int = key(128, "columns that share a scale: 32, 64 or 128 (a row that is shorter is one group)")
    zero_points: bool = key(True, "a zero point for each scale; false: codes are symmetric about 0")
    quantise_head: bool = key(False, "the output matrix, too, where it is not the embedding")
    eps_mode: str = key(
        "absolute",
        "recipe=qzo: scales are probed and moved as they are, or relative: their logarithms, and none can reach 0",
        one_of=("absolute", "relative"),
    )
    storage: str = key("auto", "dtype trained tensors are kept in", one_of=DTYPE_NAMES)
    compute: str = key("auto", "dtype of the forward pass", one_of=DTYPE_NAMES)
    save_dtype: str = key(
        "auto", "dtype of the saved model; auto is the checkpoint's own", one_of=DTYPE_NAMES
    )
    perturb: str = key(
        "auto",
        "how probes are made: the weights are probed beside themselves (probes) or moved and moved back (inplace), or the outputs of "
        "linear layers are probed (nodes, for recipe=node)",
        one_of=("auto", "probes", "inplace", "nodes"),
    )
    rho: float = key(
        0.1,
        "recipe=node: what is added to the covariance of a layer's inputs before it is inverted, times its mean eigenvalue",
        above=0,
        most=1e6,
    )
    calibration_rows: int = key(
        256, "recipe=node: training examples that the layers are measured on at the start", least=1
    )
    node_rank: int = key(
        32, "recipe=node: eigenpairs kept of each covariance; all others are taken at their mean", least=1
    )
    probes_per_forward: int | str = key("auto", "probes that share one forward", least=1, one_of=("auto",))
    cache_frozen: bool | str = key(
        "auto",
        "run the frozen first blocks once a row, not every step; where they are at least half, on a CPU",
        one_of=("auto",),
    )
    device: str = key(
        "auto", "auto, cpu, cuda or cuda:N", pattern=(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda, cuda:0")
    )
    threads: int | str = key(
        "auto", "CPU threads; of each process, where there are several", least=1, most=4096, one_of=("auto",)
    )
    parallel: str = key(
        "auto",
        "what several processes (--nproc, torchrun) share out: the examples of each batch, the probes of each step, or both; "
        "auto: the probes as far as they go, then the examples",
        one_of=("auto", "data", "probes", "2d"),
    )
    elastic: bool = key(
        False,
        "a run that goes on when a worker dies, and that others may join at any time (`zoft join`): pairs of a probe and a "
        "batch are dealt out each step, so more than 2 processes want q or accumulate above 1",
    )
    listen: str = key("127.0.0.1:0", "elastic=true: HOST:PORT where workers connect; port 0 is any free one")
    check_every: int = key(
        100,
        "steps between comparisons of the weights of several processes, by a checksum; 0 compares at both ends",
        least=0,
    )
    max_skipped: int = key(
        20, "steps in a row whose loss is not finite, each of them skipped, that stop the run", least=1
    )
    on_divergence: str = key(
        "warn", "what a loss that stays above its start does to the run", one_of=("warn", "stop")
    )
    sync: int | str = key(
        "end",
        "when the ledger's steps are forced to the disk, where a power cut cannot take them: at the end (and before "
        "anything that depends on them), after each step, or with the first step after so many seconds",
        least=1,
        one_of=("end", "step"),
    )
    denoise_every: int = key(
        0,
        "steps between rebuilds of 16-bit weights from base and ledger, summed in fp32 and rounded once; "
        "the end of the run has one too, 0 has none",
        least=0,
    )
    snapshot_every: int = key(0, "steps between snapshots, which shorten a resume; 0 takes none", least=0)
    keep_last: int = key(2, "snapshots to keep, the newest ones", least=1)
    keep_best: int = key(0, "snapshots to keep besides, the best ones by best_by", least=0)
    best_by: str = key(
        "loss",
        "metric that keep_best, save_best and early_stop go by, on the dev set where there is one",
        one_of=("loss", "perplexity", "accuracy", "macro_f1", "auc", "calibrated_accuracy", *GENERATED),
    )
    save_best: bool = key(
        False, "model/ holds the weights of the best evaluation by best_by, not the last ones"
    )
    early_stop: int = key(
        0, "evaluations in a row without a better best_by that end the run; 0 goes on", least=0
    )
    limits: Limits = field(
        default_factory=Limits, metadata={"doc": "how much of the data is read; its keys are limits.…"}
    )
    output_dir: str | None = key(None, "folder of the run; null is runs/<config>-seed<seed>")
    save_model: bool = key(True, "write model/ at the end")
    save_dequantised: bool = key(
        False,
        "save a quantised model as plain weights, which any library opens; false keeps codes and scales",
    )
    track: str = key("none", "log elsewhere too; metrics.jsonl is always written", one_of=("none", "wandb"))
    trust_remote_code: bool = key(False, "run code that comes with a model; only on the command line")


def filled(tree: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Fill a tree of keys with its recipe's defaults, then with those of what it trains, where it does not set them."""
    for some in (defaults, None):
        found = BY_TRAIN.get(str(tree.get("train")), {}) if some is None else some
        unset = {k: v for k, v in found.items() if tree.get(k) is None}
        if tree.get("adapter"):  # which has a rank and an alpha of its own
            unset = {k: v for k, v in unset.items() if not k.startswith("lora_")}
        tree = {**tree, **unset}
    return tree


SECTIONS: dict[str, type[Task] | type[Limits]] = {"task": Task, "limits": Limits}  # groups of keys


def fields() -> dict[str, dataclasses.Field[Any]]:
    """Return every settable key by its dotted name, in order: lr, …, task.prompt."""
    flat: dict[str, dataclasses.Field[Any]] = {}
    for f in dataclasses.fields(Config):
        flat[f.name] = f
        if f.name in SECTIONS:
            flat |= {f"{f.name}.{g.name}": g for g in dataclasses.fields(SECTIONS[f.name])}
    return flat


def values(config: Config) -> dict[str, Any]:
    """Return a config as one level: {key or group.key: value}, maps and lists copied."""
    tree = dataclasses.asdict(config)
    groups = {name: tree.pop(name) for name in SECTIONS}
    return tree | {f"{name}.{k}": v for name, group in groups.items() for k, v in group.items()}


def describe_keys() -> str:
    """A line a key: name, type, default, meaning."""
    lines = []
    for name, f in fields().items():
        if name in SECTIONS:
            default = "(choose)" if name == "task" else ""
        elif f.default is dataclasses.MISSING:
            default = "{}"
        else:
            default = (
                "(choose)"
                if f.default == ""
                else "null"
                if f.default is None
                else str(f.default).replace("\n", "\\n")
            )
        if name not in SECTIONS:
            kind = str(f.type).replace("dict[Any, str]", "map").replace(" | None", "").replace(" | str", "")
        else:
            kind = "group"
        words = [w for w in f.metadata.get("one_of", ()) if w != "auto" or "least" not in f.metadata]
        doc = f.metadata["doc"] + (f": {', '.join(words)}" if words else "")
        lines.append(f"{name:20} {kind:6} {default:12} {doc}")
    return "\n".join(lines)
