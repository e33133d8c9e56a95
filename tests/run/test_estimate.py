"""The estimate against real models: bytes counted tensor by tensor, and allocations as the profiler saw them."""

import dataclasses
import json

import pytest
import tiny
import torch
import transformers as hf

from zoft.config.schema import Config, Task
from zoft.data.example import Example
from zoft.evaluation import evaluate
from zoft.ledger.log import Ledger
from zoft.method import space
from zoft.models import footprint
from zoft.objectives.losses import collate, losses
from zoft.run import estimate
from zoft.train import axis as setup_axis
from zoft.train import batches, parts
from zoft.train.trainer import Trainer

SHAPE = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


def llama():
    config = hf.LlamaConfig(
        **SHAPE, intermediate_size=160, num_key_value_heads=2, max_position_embeddings=128
    )
    return tiny.build(hf.LlamaForCausalLM, config)


def opt():
    config = hf.OPTConfig(**SHAPE, word_embed_proj_dim=64, ffn_dim=256, max_position_embeddings=128)
    return tiny.build(hf.OPTForCausalLM, config)


MODELS = {"llama": llama, "opt": opt}


@pytest.fixture(autouse=True)
def one_call_a_rate(monkeypatch):
    monkeypatch.setattr(estimate, "MEASURED", 0.0)


def row(tokens, first=3):
    context = (first % 300, *range(4, 3 + tokens))
    return Example((context, context), ((5,), (9,)), 1, "choice", True)


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    MODELS[request.param]().save_pretrained(tmp_path / "model")
    return tmp_path


def config(folder, **settings):
    keys = {
        "model": str(folder / "model"),
        "task": Task(name="local"),
        "device": "cpu",
        "threads": 1,
        "batch_size": 8,
    }
    return Config(**keys | settings)


def allocated(call):
    """Most bytes alive at once that call() allocated, from the allocator's own record."""
    events = []

    def walk(nodes):
        for node in nodes:
            if node.tag.name == "Allocation":
                events.append((node.start_time_ns, node.extra_fields.alloc_size))
            walk(node.children)

    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        call()
    walk(profile.profiler.kineto_results.experimental_event_tree())
    now = most = 0
    for _, size in sorted(events, key=lambda e: e[0]):
        now += size
        most = max(most, now)
    return most


@pytest.mark.parametrize("train", ["all", "last-1", "norms"])
@pytest.mark.parametrize("storage,compute", [("fp16", "bf16"), ("fp32", "fp32"), ("bf16", "bf16")])
def test_weights_are_those_of_the_placed_model(folder, train, storage, compute):
    found = estimate.estimate_run(config(folder, train=train, storage=storage, compute=compute), [row(8)])
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "model")
    trained = space.adopt(model, space.train_names(model, train))
    space.place_in_precision(model, trained, storage, compute)
    tensors = [*model.parameters(), *model.buffers()]
    sizes = {}
    for t in tensors:
        name = str(t.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + t.numel() * t.element_size()
    assert found["weights"] == sizes
    assert found["trained"] == sum(t.stored.numel() for t in trained)


@pytest.mark.parametrize("batch,tokens", [(4, 16), (8, 64)])
def test_activations_are_those_of_a_real_forward(folder, batch, tokens):
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    real = collate([row(tokens)] * batch)
    losses(model, real)
    found = estimate.estimate_run(config(folder, batch_size=batch, probes_per_forward=1), [row(tokens)])
    assert found["activation_bytes"] == pytest.approx(allocated(lambda: losses(model, real)), rel=0.1)


@pytest.mark.parametrize(
    "keys", [{}, {"noise": "rank1"}, {"directions": "example"}, {"noise": "rank1", "directions": "example"}]
)
def test_memory_of_a_step_of_the_trainer(folder, tmp_path, keys):
    """Scratch and activations against all that the first step of a real run allocates."""
    plan = parts.resolve_device(config(folder, **keys))
    rows = [row(48)] * 16
    found = estimate.estimate_run(plan, rows)
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    plan = parts.resolve_precision(plan, model, space.train_names(model, "all"))
    plan, trained, axis = setup_axis.make_axis(
        plan, model, space.adopt(model, space.train_names(model, "all")), rows
    )
    with Ledger.create(tmp_path / "ledger", {"seed": 0}) as ledger:
        trainer = Trainer(model, axis, batches.batches_of(plan, rows), ledger, parts.trainer_settings(plan))
        measured = allocated(trainer.step)
    assert found["scratch_bytes"] + found["activation_bytes"] == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("train,momentum", [("last-1", 0.0), ("last-1", 0.9), ("all", 0.0)])
def test_peak_of_a_whole_run(folder, train, momentum):
    """All that evaluation, training and evaluation allocate, frozen blocks kept, beside the estimate's peak."""
    plan = parts.resolve_device(config(folder, train=train, momentum=momentum, steps=20, cache_frozen="auto"))
    rows = [row(30 + i % 29, i) for i in range(400)]
    found = estimate.estimate_run(plan, rows)
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    names = space.train_names(model, train)
    plan, trained, axis = setup_axis.make_axis(
        parts.resolve_precision(plan, model, names), model, space.adopt(model, names), rows
    )
    assert plan.cache_frozen is (train == "last-1") is bool(found["frozen_bytes"])

    def whole():
        evaluate.evaluate(model, rows, rows, context=axis.clean)
        trainer.run()
        evaluate.evaluate(model, rows, rows, context=axis.clean)

    with Ledger.create(folder / "ledger", {"seed": 0}) as ledger:
        trainer = Trainer(model, axis, batches.batches_of(plan, rows), ledger, parts.trainer_settings(plan))
        measured = allocated(whole)
    assert found["peak_bytes"] - found["weights_bytes"] == pytest.approx(measured, rel=0.25)


def test_more_rows_longer_rows_and_gradients_take_more(folder):
    sizes = [estimate.estimate_run(config(folder, batch_size=b), [row(16)]) for b in (2, 8, 32)]
    for less, more in zip(sizes, sizes[1:]):
        assert less["activation_bytes"] < more["activation_bytes"]
        assert less["adamw"]["peak_bytes"] < more["adamw"]["peak_bytes"]
        assert less["flops_per_step"] < more["flops_per_step"]
    longer = estimate.estimate_run(config(folder, batch_size=8), [row(64)])
    assert longer["activation_bytes"] > sizes[1]["activation_bytes"]
    large = estimate.estimate_run(config(folder, batch_size=512), [row(64)])
    assert large["adamw"]["peak_bytes"] > large["lora"]["peak_bytes"] > large["peak_bytes"]


def test_flops_of_a_llama(folder):
    """Two a weight and token in the blocks, 4·T·H a token in attention, and two candidate rows of the head."""
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "model")
    blocks = sum(p.numel() for n, p in model.named_parameters() if "layers" in n and p.ndim == 2)
    rows, tokens, width, layers = 8, 16, 64, 3
    batch = collate([row(tokens)] * rows).to("meta")
    with torch.device("meta"):
        shape = hf.AutoModelForCausalLM.from_config(model.config).eval()
    found = footprint.cost(shape, lambda: losses(shape, batch))
    expected = 2 * blocks * rows * tokens + layers * 4 * rows * tokens * tokens * width + 2 * rows * 2 * width
    assert found.flops == pytest.approx(expected, rel=0.01)


def test_kept_for_a_backward_is_what_autograd_keeps():
    """y = relu(x Wᵀ): the input of the product and the output of relu are kept, once each."""
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.ReLU())
        x = torch.empty(4, 8)
    assert footprint.kept(model, lambda: model(x)) == 4 * (4 * 8 + 4 * 16)


def test_frozen_blocks_and_text(folder):
    tokens = tiny.tokenizer()
    tokens.save_pretrained(folder / "model")
    data = folder / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"text": "a" * (i % 7) + f"b{i}", "label": i % 2}) + "\n" for i in range(60))
    )
    task = Task(
        name="local", train=str(data), prompt="{text}:", label="label", choices={"0": " no", "1": " y"}
    )
    plan = config(folder, task=task, train="last-1", cache_frozen=True)
    found = estimate.estimate_run(plan)
    assert not found["notes"]
    whole = estimate.estimate_run(dataclasses.replace(plan, cache_frozen=False))
    assert found["flops_per_step"] == pytest.approx(whole["flops_per_step"] / 3, rel=0.02)
    assert found["frozen_bytes"] > 0 == whole["frozen_bytes"]
    shown = estimate.estimate_text(found)
    assert "AdamW, all weights" in shown and "frozen outputs" in shown


def test_data_that_is_not_there_is_said(folder):
    plan = config(
        folder,
        task=Task(name="local", train=str(folder / "none.jsonl"), prompt="{a}", label="b"),
        max_length=32,
    )
    found = estimate.estimate_run(plan)
    assert found["tokens"] == 32 and "max_length=32" in found["notes"][0]
