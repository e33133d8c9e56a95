"""Train with gradients, the yardstick: transformers' Trainer with AdamW on all weights, or on peft's LoRA pairs.

first-order and first-order-lora compute in fp32. checkpointed-lora is what a user with little memory would take: gradient
checkpointing (activations are kept at the blocks' ends and made again in the backward pass), a frozen base in bf16 on a
GPU under autocast, pairs in fp32.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from zoft.config.schema import Config
from zoft.data.example import Example
from zoft.errors import UserError
from zoft.evaluation import evaluate
from zoft.method import space
from zoft.models import kind
from zoft.models.adapters.attach import save_adapter
from zoft.models.kind import ADDED
from zoft.models.quant.linear import quantised_layers
from zoft.models.saving import save_model
from zoft.objectives import losses
from zoft.objectives.losses import collate
from zoft.replay.saved_model import folder_name

if TYPE_CHECKING:
    from zoft.baselines.ask import Ask

# Where the user sets nothing; a config's own values are its recipe's. 3 epochs and a linear schedule after 6 % of warm-up
# are what fine-tuning with AdamW commonly has.
DEFAULTS: dict[str, Any] = {
    "batch_size": 8,
    "accumulate": 1,
    "schedule": "linear",
    "warmup": 0.06,
    "weight_decay": 0.0,
}
LR = {"all": 2e-5, "lora": 5e-4}
EPOCHS = 3.0
CLIP = 1.0  # norm of the gradient


def first_order_defaults(config: Config, ask: Ask, rows: int) -> Config:
    """Return the config as it is trained: the user's keys, defaults for the others, epochs as steps of batch_size rows."""
    unset: dict[str, Any] = {"lr": LR[config.train], **DEFAULTS}
    if ask.method == "checkpointed-lora":
        unset["compute"] = "auto"
    unset["eval_every"] = 0
    config = replace(config, **{k: v for k, v in unset.items() if k not in ask.keys})
    if config.compute == "auto":
        bf16 = ask.method == "checkpointed-lora" and config.device.startswith("cuda")
        config = replace(config, compute="bf16" if bf16 else "fp32")
    if config.compute not in ("fp32", "bf16"):
        raise UserError(f"compute={config.compute}: --method {ask.method} computes in fp32 or bf16")
    if "steps" in ask.keys:
        return config
    each = config.batch_size * config.accumulate
    return replace(config, steps=max(1, math.ceil((ask.epochs or EPOCHS) * rows / each)))


class _Trainer(Trainer):
    """Minimises zoft's own loss, so that both kinds of training mean the same by it."""

    half = False  # whether forwards run under bf16 autocast

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.half):
            sums, counts = losses.losses(model, inputs["batch"].to(self.args.device))
        return sums.sum() / counts.sum()


class _Scores(TrainerCallback):
    """Scores the model every so many steps; `paused` are the seconds that this took.

    rows: {step, seconds of training so far, eval}, as metrics.jsonl has them.
    """

    def __init__(self, every: int, score: Callable[[], dict[str, Any]]) -> None:
        self.every, self.score = every, score
        self.rows: list[dict[str, Any]] = []
        self.began, self.paused = time.monotonic(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if not self.every or state.global_step % self.every or state.global_step == args.max_steps:
            return
        now, model = time.monotonic(), others["model"]
        model.eval()
        found = self.score()
        model.train()
        seconds = now - self.began - self.paused
        self.rows.append({"step": state.global_step, "seconds": round(seconds, 3), "eval": found})
        self.paused += time.monotonic() - now


def train_first_order(
    config: Config,
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    write: Any,
    checkpointed: bool = False,
) -> dict[str, Any]:
    """Train with AdamW and return {steps, forwards, backwards, train_seconds, before, after, between}; save the model where
    save_model asks.

    model: in fp32 from here on (its base in bf16 with config.compute=bf16), with untrained LoRA pairs where config.train says
    lora. checkpointed: forwards of the backward pass are not counted among `forwards`. The order of rows and dropout
    (where a model has it) are drawn by config.seed. between: the evaluations of eval_every, {step, seconds, eval}.
    """
    if quantised_layers(model):
        raise UserError("--method first-order: gradients do not pass quantised layers; leave bits out")
    before = evaluate.evaluate(model, held_out, examples, write=write)
    half = config.compute == "bf16"
    model, device = model.float(), next(model.parameters()).device
    pairs = config.train == "lora"  # else those that are in place stand still
    trained = [p for n, p in model.named_parameters() if bool(ADDED.search(n)) == pairs]
    for p in trained:
        p.requires_grad_(True)
    for p in model.parameters() if half else ():  # buffers stay in fp32, as a model loaded in bf16 has them
        p.data = p.data if p.requires_grad else p.data.bfloat16()
    thrift: dict[str, Any] = {}
    if checkpointed:
        thrift = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    schedule = {"constant": "constant_with_warmup"}.get(config.schedule, config.schedule)
    with tempfile.TemporaryDirectory() as place, kind.quiet():
        args = TrainingArguments(
            output_dir=place, per_device_train_batch_size=config.batch_size, max_steps=config.steps,
            gradient_accumulation_steps=config.accumulate, learning_rate=float(config.lr), lr_scheduler_type=schedule,
            warmup_steps=config.warmup, weight_decay=config.weight_decay, max_grad_norm=CLIP, seed=config.seed % (1 << 32),
            optim="adamw_torch", use_cpu=config.device == "cpu", report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
            **thrift,
        )  # fmt: skip
        args._n_gpu = min(args.n_gpu, 1)  # no DataParallel: one process, one device
        args.__dict__["_setup_devices"] = device  # what it found is the first GPU, whichever is asked for
        if device.type == "cuda":
            torch.cuda.set_device(device)
        scores = _Scores(config.eval_every, lambda: evaluate.evaluate(model, held_out, examples, write=write))
        trainer = _Trainer(
            model, args, train_dataset=_Rows(examples), data_collator=_batch, callbacks=[scores]
        )
        trainer.half = half
        assert all(p.device == device for p in model.parameters()), (device, args.device)
        began = scores.began = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - began - scores.paused
    if checkpointed:
        model.gradient_checkpointing_disable()
    model.eval().requires_grad_(False)
    model.zero_grad(set_to_none=True)
    seen = config.steps * config.batch_size * config.accumulate
    found: dict[str, Any] = {
        "steps": config.steps, "forwards": seen, "backwards": seen, "train_seconds": round(seconds, 3),
        "trained_numbers": sum(p.numel() for p in trained), "before": before, "between": scores.rows,
        "after": evaluate.evaluate(model, held_out, examples, write=write),
    }  # fmt: skip
    if config.save_model:
        save(config, model, tokenizer)
    return found


def save(config: Config, model: nn.Module, tokenizer: Any) -> None:
    """Write model/ or adapter/, as a run has it."""
    out = Path(str(config.output_dir)) / folder_name(config)
    if config.train == "lora":
        save_adapter(model, out, tokenizer=tokenizer)
        return
    dtype: Any = getattr(model, "checkpoint_dtype", torch.float32)
    save_model(model, tokenizer, out, dtype=space.DTYPES.get(config.save_dtype, dtype))


class _Rows(torch.utils.data.Dataset):
    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Example:
        return self.examples[i]


def _batch(rows: list[Example]) -> dict[str, Any]:
    return {"batch": collate(rows)}
