"""What is exported loads elsewhere, is the run's model, and is not the base."""

import json

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_replay import bits, configured, place, train, write_run  # noqa: F401 (place is a fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from zoft.cli import replay
from zoft.errors import UserError


def export(run, out, **how):
    return replay.export_run(run, out, merge=True, adapter=False, **how)


@pytest.mark.parametrize("dtype", [None, "fp32", "fp16"])
def test_a_merged_model_is_the_runs(place, tmp_path, dtype):  # noqa: F811
    run = place / "exported"
    if not run.exists():
        train(
            place, "exported", "storage=fp16", "compute=bf16", "train=last-1", "eps=1e-2", "save_dtype=bf16"
        )
    line = export(run, tmp_path / "out", dtype=dtype)
    state = load_file(tmp_path / "out" / "model.safetensors")
    kept = {None: torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[dtype]
    assert {t.dtype for t in state.values()} == {kept}
    base = load_file(place / "half" / "model.safetensors")
    changed = sum(int((state[n].float() != base[n].to(kept).float()).sum()) for n in state)
    total = sum(t.numel() for t in base.values())
    assert f"{changed:,} of {total:,} numbers differ" in line and 0 < changed < total
    if dtype is None:
        assert bits(tmp_path / "out") == bits(run / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == kept and model.config.tie_word_embeddings
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("no").input_ids == tiny.tokenizer()("no").input_ids
    assert GenerationConfig.from_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    result = json.loads((run / "result.json").read_text())
    after = result["after"]["accuracy"]
    assert f"## Base\n\n{place / 'half'}\n" in card and f"| {after:.4g} |\n" in card


def test_a_chat_template_goes_with_it(place, tmp_path):  # noqa: F811
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model = tiny.opt()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    run = train(place, "chatty", "steps=1", model=tmp_path / "chat")
    export(run, tmp_path / "out")
    replay.replay_run_folder(run, tmp_path / "again")
    for out in ("out", "again"):
        assert AutoTokenizer.from_pretrained(tmp_path / out).chat_template == tokenizer.chat_template
        assert GenerationConfig.from_pretrained(tmp_path / out).max_new_tokens == 7


def test_an_unfinished_run_exports_what_it_has(place, tmp_path):  # noqa: F811
    whole = train(place, "part", "storage=bf16")
    part = tmp_path / "part"
    part.mkdir()
    (part / "config.yaml").write_text((whole / "config.yaml").read_text())
    (part / "ledger").write_bytes((whole / "ledger").read_bytes()[: -2 * 32])
    export(part, tmp_path / "out")
    replay.replay_run_folder(whole, tmp_path / "four", step=4)
    assert bits(tmp_path / "out") == bits(tmp_path / "four")
    assert "| steps | 4 of 6 |" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_quantised_is_said_once(place, tmp_path, capfd):  # noqa: F811
    """Although the model is loaded twice, to compare with its base."""
    scales = train(place, "scales", "recipe=qzo", "bits=8", "group=32", "lr=1e-2", "eps=1e-2")
    pairs = train(place, "pairs", "recipe=lora_zo", "bits=8", "group=32", "lr=1e-2", "eps=1e-2")
    for run, kind in ((scales, "merge"), (pairs, "merge"), (pairs, "adapter")):
        capfd.readouterr()
        replay.export_run(
            run, tmp_path / f"{run.name}-{kind}", merge=kind == "merge", adapter=kind == "adapter"
        )
        assert capfd.readouterr().err.count("linear layers quantised to 8 bits") == 1, (run, kind)


def test_what_would_be_the_base_is_not_written(place, tmp_path):  # noqa: F811
    """A change below the grid of the dtype, or no change at all."""
    run = tmp_path / "faint"
    run.mkdir()
    config = configured(
        place, "faint", "storage=fp32", "compute=fp32", "perturb=inplace", "train=mlp", model="full"
    )
    write_run(run, config, tiny.llama(tie=True), steps=1, multiplier=float(np.float32(1e-9)))
    with pytest.raises(UserError, match="in bf16 its model is the base: 1 steps .* use --dtype fp32"):
        export(run, tmp_path / "out", dtype="bf16")
    assert not (tmp_path / "out").exists() and [p.name for p in tmp_path.iterdir()] == ["faint"]
    with pytest.raises(UserError, match="exists"):
        export(run, run)


def test_there_is_no_adapter_in_a_full_parameter_run(place, tmp_path):  # noqa: F811
    run = train(place, "no-adapter", "steps=1")
    with pytest.raises(UserError, match="its own weights|model's own weights"):
        replay.export_run(run, tmp_path / "out", merge=False, adapter=True)


def test_an_export_that_is_not_the_run_is_a_bug_that_shows(place, tmp_path, monkeypatch):  # noqa: F811
    """The check is a check: one weight of what is loaded again, changed, stops it."""
    from zoft.replay import export as exports

    run = train(place, "checked", "storage=bf16")
    reloaded = exports.reloaded

    def other(folder, config):
        model = reloaded(folder, config)
        model.model.layers[0].mlp.up_proj.weight[0] += 1
        return model

    monkeypatch.setattr(exports, "reloaded", other)
    with torch.no_grad(), pytest.raises(AssertionError, match="from the run's"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_an_adapter_is_the_runs_in_plain_peft(place, tmp_path, kind, arch):  # noqa: F811
    from peft import PeftModel

    if not (place / arch).exists():
        tiny.MODELS[arch]().bfloat16().save_pretrained(place / arch)
        tiny.tokenizer().save_pretrained(place / arch)
    run = train(
        place, f"{arch}-{kind}", "recipe=lora_zo", f"train={kind}", "lr=1e-1", "steps=3", model=place / arch
    )
    line = replay.export_run(run, tmp_path / "out", merge=False, adapter=True)
    assert "gives the run's logits" in line
    weights, own = (load_file(p / "adapter_model.safetensors") for p in (tmp_path / "out", run / "adapter"))
    assert weights.keys() == own.keys() and all(torch.equal(weights[n], own[n]) for n in own)
    base = AutoModelForCausalLM.from_pretrained(place / arch, dtype=torch.float32)
    ids = {"input_ids": torch.tensor([tiny.ids("a", "b", "no")]), "use_cache": False}
    with torch.no_grad():
        before = base(**ids).logits
        model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
        after = model(**ids, attention_mask=torch.ones(1, 3, dtype=torch.long)).logits
        assert not torch.allclose(before, after[:, -3:], atol=1e-4)
        if kind != "lora":
            with pytest.raises(UserError, match="use --adapter"):
                replay.export_run(run, tmp_path / "merged", merge=True, adapter=False)
            return
        line = replay.export_run(run, tmp_path / "merged", merge=True, adapter=False, dtype="fp32")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert merged.dtype == torch.float32 and "numbers differ from the base" in line
        assert torch.allclose(merged(**ids).logits, after, atol=1e-5)
    with pytest.raises(UserError, match="--dtype bf16: an adapter is written as it is kept"):
        replay.export_run(run, tmp_path / "x", merge=False, adapter=True, dtype="bf16")


def test_an_adapter_that_has_not_moved_is_not_written(place, tmp_path):  # noqa: F811
    run = train(place, "still", "recipe=lora_zo", "lr=1e-1", "steps=2")
    still = tmp_path / "still"
    still.mkdir()
    (still / "config.yaml").write_text((run / "config.yaml").read_text())
    (still / "ledger").write_bytes((run / "ledger").read_bytes()[: -2 * 32])
    for how, part in (
        ({"merge": False, "adapter": True}, "as it started"),
        ({"merge": True, "adapter": False}, "is the base"),
    ):
        with pytest.raises(UserError, match=part):
            replay.export_run(still, tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_steps_of_an_adapter_are_replayed_too(place, tmp_path):  # noqa: F811
    short, long = (train(place, f"lora-{n}", "recipe=lora_zo", "lr=1e-1", f"steps={n}") for n in (2, 4))
    assert "2 steps replayed" in replay.replay_run_folder(long, tmp_path / "two", step=2)
    name = "adapter_model.safetensors"
    assert (tmp_path / "two" / name).read_bytes() == (short / "adapter" / name).read_bytes()
    assert "4 of 4 steps" in replay.replay_run_folder(long)
    with pytest.raises(UserError, match="stores its weights in fp32"):
        replay.replay_run_folder(long, tmp_path / "x", denoise=True)
