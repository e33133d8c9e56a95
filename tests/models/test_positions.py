"""How many tokens fit: against the models themselves, which fail one token later where a table ends."""

import json

import pytest
import tiny
import torch
import transformers as hf
from test_trainer import bert
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.config.schema import Config
from zoft.errors import UserError
from zoft.models import kind
from zoft.models.adapters import attach


def roberta():
    config = hf.RobertaConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=40, pad_token_id=1, type_vocab_size=1,
    )  # fmt: skip
    return tiny.build(hf.RobertaForMaskedLM, config)


def prompted():
    return attach.attach_adapter(tiny.gpt2(), Config(train="prompt", virtual_tokens=7))


def prefixed():
    return attach.attach_adapter(tiny.opt(), Config(train="prefix", virtual_tokens=6))


@pytest.mark.parametrize("make", [tiny.opt, tiny.gpt2, bert, roberta, prompted, prefixed])
@torch.no_grad()
def test_as_many_tokens_fit_as_the_model_reads(make):
    model = make()
    most = kind.longest_row(model)
    kind.refuse_longer_rows(model, most)
    with pytest.raises(UserError, match=f"rows of {most + 1} tokens, and this model has {most} positions"):
        kind.refuse_longer_rows(model, most + 1)
    for n in (most, most + 1):
        ids = torch.full((1, n), 5)
        if n == most:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        else:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_computed_positions_have_no_end():
    model = tiny.llama()
    ids = torch.full((1, 2 * kind.trained_positions(model)), 5)
    assert kind.longest_row(model) is None and torch.isfinite(model(ids).logits).all()
    kind.refuse_longer_rows(model, ids.numel())


def test_longer_rows_are_one_line_in_every_command(tmp_path, monkeypatch):
    tiny.opt().save_pretrained(tmp_path / "opt")
    tiny.tokenizer().save_pretrained(tmp_path / "opt")
    rows = [{"text": "ab " * 90 + "ab"[i % 2] * (i % 7), "label": "ab"[i % 2]} for i in range(60)]
    tiny.write_rows(tmp_path / "rows.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    words = ["task=local", "task.train=rows.jsonl", "task.prompt={text} ", "task.label=label",
             "task.choices={a: a, b: b}", "max_length=300"]  # fmt: skip
    train, probe = (
        ["train", "model=opt", "steps=2", "lr=1e-4", "output_dir=out"],
        ["baseline", "model=opt", "-m"],
    )
    for verb in (
        train,
        ["eval", "opt"],
        [*probe, "linear-probe", "output_dir=a"],
        [*probe, "zero-shot", "output_dir=b"],
    ):
        done = CliRunner().invoke(app, [*verb, *words])
        assert done.exit_code == 2 and "set max_length=64 or less" in done.stderr.splitlines()[-1], (
            done.stderr
        )
    written = [
        json.dumps({"prompt": "ab " * 15 + "ab"[i % 2] * (i % 17), "completion": " a"}) for i in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(written))
    words = ["eval", "opt", "task=local", "task.train=rows.jsonl", "max_new_tokens=60"]
    done = CliRunner().invoke(app, [*words, "max_length=100"])
    assert done.exit_code == 2 and "max_new_tokens=60: after prompts of" in done.stderr, done.stderr
    assert CliRunner().invoke(app, [*words, "max_length=64"]).exit_code == 0
