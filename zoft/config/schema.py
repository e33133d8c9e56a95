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
GENERATED = ("exact_match", "f1", "reward", "rank")
NO_GRADIENT = ("accuracy", "macro_f1", *GENERATED)
VERIFIED = ("countdown", "arithmetic", "gsm8k")  # tasks whose answers a program checks
ROLLOUT = ("temperature", "members_per_batch", "shaping", "shaping_group")  # keys of written text alone
# Keys that say something of some trained sets only.
LORA = ("lora_rank", "lora_alpha", "lora_targets", "lora_layers")
ONLY = {**dict.fromkeys(LORA, ("lora",)), "virtual_tokens": ("prefix", "prompt")}

SETS = rf"all|upper|last-\d+|norms|bias|head|scales|{'|'.join(ADAPTERS)}"  # what `train` may be besides a pattern


def key(default: Any, doc: str, **limits: Any) -> Any:
    """Return a dataclass field with its documentation and limits.

    limits: one_of (allowed words), pattern (a regular expression and its description), least (≥), above (>),
    below (<), most (≤), template (True: a backslash and n typed in a shell is a line break), example (of a map).
    """
    metadata = {"doc": doc, **limits}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Task:
    """Describe where examples come from, how each becomes a prompt, and what is scored after it."""

    name: str = key("", "name of a packaged task (`zoft ls` lists them), or local for your own data")
    train: str | None = key(
        None,
        "training data: a .jsonl, .csv, .tsv, .json or .parquet file, a folder of such files or of .txt "
        "files, or a Hub data set id[:split]",
    )
    eval: str | None = key(
        None,
        "evaluation data, in the form of task.train; null holds out a fixed part of task.train, chosen by"
        " a hash",
    )
    subset: str | None = key(None, "configuration of a Hub data set that has several (glue has sst2, rte, …)")
    train_limit: int | None = key(
        None, "train on a fixed subset of this many examples; null takes all", least=1
    )
    max_words: int | None = key(
        None,
        "leave out rows with more words than this in the columns that are read; null takes all rows",
        least=1,
    )
    prompt: str | None = key(
        None,
        "template of the prompt, with column names in braces: 'Review: {text}\\nSentiment:'",
        template=True,
    )
    label: str | None = key(None, "column that holds the label")
    choices: dict[Any, str] = key(
        {},
        "map from each label to the text that is scored for it: {negative: ' terrible', …}",
        example='{label: " text", other: " text"}',
    )
    target: str | None = key(
        None, "template of the text to learn, for data without labels (LM loss)", template=True
    )
    format: str = key(
        "auto",
        "layout of your own data, if no template names its columns; auto recognises it by the column "
        "names and prints what it found",
        one_of=("auto", "text", "completion", "instruction", "messages", "sharegpt", "preference", "label"),
    )
    columns: dict[Any, str] = key(
        {},
        "map from a layout's column names to yours: {prompt: question, completion: reply}",
        example="{prompt: question, completion: reply}",
    )
    chat: str = key(
        "auto",
        "how turns are written: with the tokenizer's chat template, or as plain text; auto writes plain "
        "text only for pairs of prompt and completion when the tokenizer has no template",
        one_of=("auto", "template", "plain"),
    )
    pack: bool = key(
        False,
        "fill rows of max_length tokens with several texts, instead of one text per row; needs task.format=text",
    )
    null_prompt: str | None = key(
        None,
        "prompt without its content, for `zoft baseline --method sfc`; null takes task.prompt with empty "
        "columns",
        template=True,
    )
    num_train: int | None = key(
        None, "train on this many rows, the first of a permutation by task.data_seed; null takes all", least=1
    )
    num_dev: int | None = key(
        None, "use the next rows of that permutation, this many, as the dev set; null has no dev set", least=1
    )
    num_eval: int | None = key(
        None,
        "evaluate on this many rows, the first of a permutation by task.data_seed; null takes all",
        least=1,
    )
    k_shot: int | None = key(
        None, "train on this many rows of each class, and take as many more for the dev set", least=1
    )
    rows: int | None = key(
        None,
        "largest number of rows that task=countdown or task=arithmetic makes; null makes 2,000",
        least=1,
        most=1000000,
    )
    level: int | None = key(
        None,
        "for task=countdown and task=arithmetic, difficulty from 1 (two numbers below 10) to 4; null is 2",
        least=1,
        most=4,
    )
    data_seed: int = key(
        0,
        "seed of these permutations (the papers use 0; for k_shot 13, 21, 42, 87, 100), and of the rows that a task makes",
        least=0,
        below=1 << 32,
    )
    balanced: bool = key(False, "share num_train and num_dev evenly among the classes")


@dataclass
class Limits:
    """Limit what a data file may hold; zoft.limits has the bounds that no key raises, docs/running.md all of them."""

    rows: int = key(bounds.ROWS, "largest number of rows of a data file or folder", least=1)
    bytes: int = key(
        bounds.BYTES, "largest number of bytes of a data file, or of what a packed one holds", least=1
    )
    cell: int = key(
        bounds.CELL, "largest number of characters of a cell, or of a line, of a data file", least=1
    )


@dataclass
class Config:
    """Describe a run. Names are short and on one level; only `task` and `limits` are groups with keys of their own."""

    recipe: str = key(
        "mezo",
        "method: a packaged one (mezo, sparse_mezo, lora_zo, qzo, node); on the command line also a page "
        "of your own (--recipe FILE.py)",
    )
    model: str = key("", "name of a packaged model, a folder, a .gguf file, or a Hub id")
    task: Task = field(default_factory=Task, metadata={"doc": "a name of configs/task; its keys are task.…"})
    train: str = key(
        "all",
        "which tensors are trained: all, upper (linear layers of the upper half of the blocks), last-2 "
        "(the last two blocks), norms, bias, head, scales, or a pattern that is searched in tensor names;"
        " or an adapter: lora, prefix, prompt",
    )
    objective: str = key(
        "auto",
        "what is minimised: a loss over label words (choice), over text (lm) or over pairs of answers of which one is "
        "preferred (preference), or minus a metric: accuracy or macro_f1 of predictions, exact_match, f1 or a reward of "
        "generated text; rank uses a ranking of what a step's members wrote, by a score or by people; auto is the task's "
        "own loss",
        one_of=("auto", "choice", "lm", "preference", *NO_GRADIENT),
    )
    preference_beta: float = key(
        0.1,
        "for objective=preference, weight of a pair's log-probabilities against those of the base",
        above=0,
        most=1e6,
    )
    reward: str | None = key(
        None,
        "my_reward.py:score, a function of rows and texts that returns a number per row, or "
        "http://127.0.0.1:PORT/PATH, a server that returns them; only on the command line, as --reward",
    )
    reward_seconds: float = key(60.0, "longest time of one call of the reward, in seconds", above=0, most=1e6)
    max_new_tokens: int = key(50, "largest number of tokens that are generated after a prompt", least=1)
    stop: str | None = key(
        "\n",
        "text at which generation ends, itself left out; null ends at the end-of-text token only",
        template=True,
    )
    temperature: float = key(
        0.0,
        "temperature of generation in training: 0 takes the most probable token; above 0 tokens are drawn, with random "
        "numbers per step, row and token that all probes share. Evaluation takes the most probable token",
        least=0,
        most=100,
    )
    members_per_batch: int | str = key(
        "auto",
        "number of members (probes of a step) that generate text in one batch, with one copy of the weights; for noise=rank1 and "
        "train=lora, prefix, prompt. 1 takes one member after another; auto takes as many as fit into half of the free memory",
        least=1,
        one_of=("auto",),
    )
    shaping: str = key(
        "none",
        "how a step shapes its members' rewards: not at all, z-scores over members, or centred ranks. With ranks and z-scores "
        "lr is the size of a step, and a step whose rewards are all equal is skipped",
        one_of=("none", "zscore", "ranks"),
    )
    rank_by: str = key(
        "score",
        "objective=rank: who ranks a step's members: a score (the reward that is named, or the task's, else f1) or people, whose "
        "answers are read from files of the run's folder, which `zoft rank RUN` writes (file)",
        one_of=("score", "file"),
    )
    rank_best: int | None = key(
        None, "objective=rank, rank_by=score: how many members are named in order; null: all", least=1
    )
    rank_line: int = key(
        0,
        "objective=rank: how many points of the step's line (the whole step, half, a quarter, …) are written at and ranked beside "
        "the weights as they are; the best one is taken; 0 takes the whole step",
        least=0,
        most=16,
    )
    shaping_group: str = key(
        "all",
        "scope of the shaping: each member's mean reward (all), or the rewards after each prompt (prompt)",
        one_of=("all", "prompt"),
    )
    hold_probe: bool | str = key(
        "auto",
        "keep a probe's weights in memory while it generates text (faster, one more copy of what is "
        "trained); false computes them for each token; auto keeps them if half of the free memory has "
        "room",
        one_of=("auto",),
    )
    lora_rank: int | None = key(None, "rank of the LoRA pairs; null is 8", least=1)
    lora_alpha: int | None = key(
        None, "scale of the LoRA pairs: B A is multiplied by lora_alpha / lora_rank; null is 16", least=1
    )
    lora_targets: str | None = key(
        None,
        "modules that get a LoRA pair: ends of their names ('q_proj v_proj'), all-linear, or a pattern "
        "for whole names; null takes query and value projections, as peft lists them for the model",
    )
    lora_layers: str | None = key(
        None,
        "last-6 puts LoRA pairs into the last 6 blocks only; null takes all blocks",
        pattern=(r"last-[1-9]\d*", "last-1, last-2, …"),
    )
    adapter: str | None = key(
        None,
        "folder of a saved LoRA adapter that stays in place, frozen, while other tensors are trained; "
        "train=lora continues to train it",
    )
    virtual_tokens: int | None = key(
        None, "length of the prefix (null is 5) or of the prompt (null is 10)", least=1
    )
    lr: float | str = key(
        1e-6,
        "learning rate: θ moves by lr times the gradient estimate; all weights of a large model need 1e-7"
        " to 1e-5. auto measures it before the first step, along lines that `zoft lr` shows. If unset: lora 1e-4, prefix 1e-2, "
        "prompt 1e-3, scales 1e-7",
        least=0,
        one_of=("auto",),
    )
    schedule: str = key(
        "constant", "how the learning rate changes over the steps", one_of=("constant", "linear", "cosine")
    )
    warmup: float = key(0, "number of warm-up steps; below 1 it is a fraction of all steps", least=0)
    estimator: str = key(
        "auto",
        "how a step's losses become its update: two_sided (the loss at θ ± eps·z of each direction, 2q "
        "forwards per example), one_sided (at θ + eps·z of each direction and once at θ, q + 1 forwards; "
        "use a smaller eps), normalised (one_sided divided by the spread of the step's losses; needs q of"
        " 2 or more, and lr is the size of a step); auto is the recipe's own",
        one_of=("auto", "two_sided", "one_sided", "normalised"),
    )
    clip: float | None = key(
        None,
        "largest projected gradient (l₊ − l₋)/(2·eps) that a step may use; null has no limit (recipe=qzo:"
        " 100)",
        above=0,
    )
    meazo: float = key(
        0.0,
        "divide steps by the root of the projected gradient's running second moment with this decay "
        "(0.99); lr is then the size of a step; 0 turns it off",
        least=0,
        below=1,
    )
    max_forwards: int | None = key(
        None, "stop after this many counted forwards (examples × probes), even if `steps` is larger", least=1
    )
    weight_decay: float = key(
        0.0,
        "decoupled weight decay: θ is multiplied by 1 − lr·weight_decay in each step; not for biases and "
        "norms",
        least=0,
    )
    anchor: float = key(
        0.0,
        "pull all trained tensors towards the weights that training began with: θ moves by −lr·anchor·(θ "
        "− θ₀); keeps a second copy of them",
        least=0,
    )
    update: str = key(
        "auto",
        "how the estimate g moves θ: sgd (by lr·g), sign (by lr·sign(g)), adam (two fp32 moments per "
        "trained number; lr is the size of a step, as with sign), conservative (to the best of θ and θ ± "
        "lr·g on the same batch, 3 more forwards), momentum (draws the directions of past steps again; "
        "needs cheap noise); auto is the recipe's own, sgd",
        one_of=("auto", "sgd", "sign", "adam", "momentum", "conservative"),
    )
    momentum: float = key(
        0.0,
        "share of the previous step's update that is added to this one; update=sgd keeps a buffer for it "
        "(0 keeps none), update=momentum needs no buffer",
        least=0,
        below=1,
    )
    eps: float = key(
        1e-3,
        "size of a probe: the loss is evaluated at θ ± eps·z. If unset: lora 1e-2, prefix 1e-1, prompt 1e-2",
        above=0,
        most=1000,
    )
    noise: str = key(
        "gaussian",
        "distribution of z: gaussian, rademacher (random signs), or rank1 (z = a bᵀ per matrix with sign "
        "vectors a and b; needs no scratch copy of the weights)",
        one_of=("gaussian", "rademacher", "rank1"),
    )
    directions: str = key(
        "shared",
        "shared: all examples of a step use the same directions; example: each example has its own, with "
        "as many forwards (with gaussian and rademacher noise their signs differ and the draw is shared)",
        one_of=("shared", "example"),
    )
    mask: str = key(
        "auto",
        "for recipe=sparse_mezo, which numbers of each matrix move: the small ones of the base "
        "(magnitude), as many at random (random), or all (none); auto is magnitude there",
        one_of=("auto", "magnitude", "random", "none"),
    )
    sparsity: float = key(
        0.75, "for recipe=sparse_mezo, share of each matrix that stays fixed", least=0, below=1
    )
    mask_every: int = key(
        0,
        "for recipe=sparse_mezo with mask=random, steps between new draws of the mask (1: every step); 0 "
        "draws it once",
        least=0,
        below=1 << 32,
    )
    blocks: str = key(
        "all",
        "which trained tensors a step probes and moves: all, or those of one transformer block, drawn at "
        "random or taken in turn (cyclic); tensors outside of the blocks count as one more block",
        one_of=("all", "random", "cyclic"),
    )
    q: int = key(
        1,
        "number of directions per step; `estimator` decides how often each is probed",
        least=1,
        most=1 << 16,
    )
    steps: int = key(1000, "number of updates", least=1, below=1 << 32)
    batch_size: int = key(16, "examples per batch, over all processes together", least=1, most=1 << 20)
    accumulate: int = key(1, "batches per step; all of them use the step's directions", least=1, most=1 << 20)
    seed: int = key(0, "seed of the noise and of the data order", least=0, below=1 << 64)
    eval_every: int = key(0, "steps between evaluations; 0 evaluates before and after training only", least=0)
    eval_limit: int | None = key(
        None, "evaluate on a fixed subset of this many examples; null takes all", least=1
    )
    max_length: int = key(
        512, "largest number of tokens per example; a longer prompt is cut on its left", least=2
    )
    bits: int | None = key(
        None, "quantise the linear layers to 4 or 8 bits while the model is loaded; null does not"
    )
    group: int = key(128, "number of columns that share a scale: 32, 64 or 128 (a shorter row is one group)")
    zero_points: bool = key(True, "use a zero point for each scale; false makes codes symmetric about 0")
    quantise_head: bool = key(False, "quantise the output matrix too, unless it is tied to the embedding")
    eps_mode: str = key(
        "absolute",
        "for recipe=qzo, train the scales themselves (absolute) or their logarithms (relative), which never let a scale reach 0",
        one_of=("absolute", "relative"),
    )
    storage: str = key("auto", "dtype in which trained tensors are kept", one_of=DTYPE_NAMES)
    compute: str = key("auto", "dtype of the forward pass", one_of=DTYPE_NAMES)
    save_dtype: str = key(
        "auto", "dtype of the saved model; auto is the checkpoint's own", one_of=DTYPE_NAMES
    )
    perturb: str = key(
        "auto",
        "how a probe reaches the model: probes (perturbed copies in scratch memory, the weights are only "
        "read), inplace (the weights are moved and moved back), nodes (noise on the outputs of linear "
        "layers, for recipe=node); auto takes probes where the recipe allows it",
        one_of=("auto", "probes", "inplace", "nodes"),
    )
    rho: float = key(
        0.1,
        "for recipe=node, damping that is added to the covariance of a layer's inputs before it is "
        "inverted, in units of its mean eigenvalue",
        above=0,
        most=1e6,
    )
    calibration_rows: int = key(
        256, "for recipe=node, number of training examples that measure the layers at the start", least=1
    )
    node_rank: int = key(
        32,
        "for recipe=node, number of leading eigenpairs kept of each covariance; the others are replaced "
        "by their mean",
        least=1,
    )
    node_tokens: int | str = key(
        "all",
        "for recipe=node, which tokens of a row get noise and move the weights: all, or this many tokens that end with the "
        "scored ones; fewer tokens mean less noise and need a lower lr",
        least=1,
        one_of=("all",),
    )
    node_inputs: str = key(
        "pass",
        "for recipe=node, source of the layers' inputs: pass (a third forward pass, in which each layer moves; no memory), "
        "kept (the inputs of the two probes, kept in memory for a step; a third fewer forwards)",
        one_of=("pass", "kept"),
    )
    probes_per_forward: int | str = key(
        "auto",
        "number of probes that share one forward pass; auto takes as many as fit into memory",
        least=1,
        one_of=("auto",),
    )
    cache_frozen: bool | str = key(
        "auto",
        "compute the frozen first blocks once per row and keep their outputs; auto does so on a CPU if at"
        " least half of the blocks are frozen",
        one_of=("auto",),
    )
    device: str = key(
        "auto",
        "auto, cpu, cuda or cuda:N; auto takes the first GPU, if there is one",
        pattern=(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda, cuda:0"),
    )
    threads: int | str = key(
        "auto", "number of CPU threads of each process", least=1, most=4096, one_of=("auto",)
    )
    parallel: str = key(
        "auto",
        "what several processes (--nproc, torchrun) divide among them: the examples of each batch (data),"
        " the probes of each step (probes), or both (2d); auto divides the probes first, then the "
        "examples",
        one_of=("auto", "data", "probes", "2d"),
    )
    elastic: bool = key(
        False,
        "continue when a worker dies, and let others join at any time (`zoft join`); each step hands out "
        "pairs of a probe and a batch, so more than 2 processes need q or accumulate above 1",
    )
    listen: str = key(
        "127.0.0.1:0", "for elastic=true, HOST:PORT at which workers connect; port 0 is any free one"
    )
    check_every: int = key(
        100,
        "steps between comparisons of the processes' weights by a checksum; 0 compares at the start and "
        "the end only",
        least=0,
    )
    max_skipped: int = key(
        20,
        "number of steps in a row with a loss that is not finite (each is skipped) after which the run stops",
        least=1,
    )
    on_divergence: str = key(
        "warn",
        "what happens if the loss stays above its start: a warning, or the end of the run",
        one_of=("warn", "stop"),
    )
    sync: int | str = key(
        "end",
        "when ledger records are forced to the disk, safe from a power cut: at the end (and before "
        "anything that depends on them), after each step, or after this many seconds",
        least=1,
        one_of=("end", "step"),
    )
    denoise_every: int = key(
        0,
        "steps between rebuilds of 16-bit weights from base and ledger, summed in fp32 and rounded once; "
        "the end of the run has one, too; 0 has none",
        least=0,
    )
    snapshot_every: int = key(
        0, "steps between snapshots of the weights, which shorten a resume; 0 takes none", least=0
    )
    keep_last: int = key(2, "number of newest snapshots to keep", least=1)
    keep_best: int = key(0, "number of snapshots to keep in addition, the best ones by best_by", least=0)
    best_by: str = key(
        "loss",
        "metric that keep_best, save_best and early_stop use, on the dev set if there is one",
        one_of=(
            "loss",
            "perplexity",
            "accuracy",
            "macro_f1",
            "auc",
            "calibrated_accuracy",
            "exact_match",
            "f1",
            "reward",
        ),
    )
    save_best: bool = key(False, "save the weights of the best evaluation by best_by, not the last ones")
    early_stop: int = key(
        0, "end the run after this many evaluations in a row without a better best_by; 0 never does", least=0
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
    track: str = key(
        "none",
        "also log to Weights & Biases (wandb); metrics.jsonl is always written",
        one_of=("none", "wandb"),
    )
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


def lacks_reward(config: Any) -> bool:
    """Say whether a config asks for a reward that neither the command line nor its task gives."""
    return config.objective == "reward" and config.reward is None and config.task.name not in VERIFIED


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
