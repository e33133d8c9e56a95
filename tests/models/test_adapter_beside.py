"""LoRA pairs beside quantised layers, and adapters that stay in place: against slow twins, and what others load."""

import dataclasses
import json
import shutil

import numpy as np
import peft
import pytest
import tiny
import torch
import transformers as hf
from test_adapters import attach, moved, rows_losses, zoft
from test_qzo import Twin, quantised
from test_trainer import build, z
from zoo import PROBES, apart, batch, make, off, twin

from zoft.config.schema import Config
from zoft.errors import UserError
from zoft.method import space
from zoft.method.configured import compose
from zoft.models import kind, load, saving
from zoft.models.adapters import attach as adapters
from zoft.models.adapters import kept_in_place
from zoft.models.quant import linear
from zoft.objectives.losses import losses
from zoft.probe import lora_forward, site_forwards


def place(tmp_path, model, **keys):
    """The model with an adapter, saved and put back, in place."""
    torch.manual_seed(0)
    made = moved(attach(model, "lora", lora_rank=4, **keys))
    adapters.save_adapter(made, tmp_path / "adapter")
    with kept_in_place.without(made) as base:
        pass
    for name, layer in kept_in_place.lora_pairs(made).items():
        kept_in_place.put(base, name, layer.base_layer)
    return adapters.load_adapter(base, tmp_path / "adapter")


# ---- where pairs go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_pairs_are_those_of_the_plain_model(name, targets):
    """Same places, same start, same settings, whether the layers beside them are quantised or not."""
    keys = {"lora_targets": targets} if targets else {}
    plain = attach(tiny.MODELS[name](), "lora", **keys)
    beside = attach(quantised(tiny.MODELS[name]), "lora", **keys)
    a, b = dict(adapters.named(plain)), dict(adapters.named(beside))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert len(linear.quantised_layers(beside)) == len(linear.quantised_layers(quantised(tiny.MODELS[name])))
    said = [m.peft_config["default"].to_dict() for m in (plain, beside)]
    assert said[0] == said[1]
    some = attach(quantised(tiny.llama), "lora", lora_layers="last-1", lora_targets="all-linear")
    assert len(adapters.named(some)) == 2 * 7
    ids = torch.arange(12).view(2, 6) + 3
    assert torch.equal(beside(ids).logits, quantised(tiny.MODELS[name])(ids).logits)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_stacked_losses_are_those_of_moved_tensors(tmp_path, name):
    b = batch("right")
    b.inputs["input_ids"] %= tiny.VOCAB
    for train, way in (("lora", lora_forward.lora), ("scales", site_forwards.quantised)):
        model = place(tmp_path / train, quantised(tiny.MODELS[name]), lora_targets="all-linear")
        made = make(model, b, train, run=rows_losses)
        assert made.found.stacked and not made.found.note, made.found.note
        assert {site_forwards.fast(s) for s in made.found.sites} == {way}
        expected = twin(made.untouched, made.trained, b, PROBES, run=rows_losses)
        assert apart(expected) > 1e-5, apart(expected)
        for group in (1, 2, len(PROBES)):
            assert off(made.losses(b, PROBES, group), expected) < min(1e-5, apart(expected) / 20)


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_base, bits", [(tiny.llama, 4), (tiny.gpt2, 8)])
def test_steps_on_pairs_are_those_of_a_slow_twin(tmp_path, make_base, bits):
    """A plain model whose matrices are W + s·B A, W dequantised by hand, each moved tensor written out."""
    model = quantised(make_base, bits)
    other = Twin(model, np.float32)
    other.write({n: p[2] for n, p in other.parts.items()})
    matrices = {n.removesuffix(".scales"): p[0] for n, p in other.parts.items()}
    model = moved(attach(model, "lora", lora_rank=4, lora_alpha=6))
    lr, eps = 3e-3, 1e-2
    trainer = build(tmp_path, model, train="lora", steps=12, lr=lr, eps=eps)
    ours = {t.name: t for t in trainer.axis.trained}
    theta = {n: t.stored.clone().numpy() for n, t in ours.items()}
    start = {n: t.copy() for n, t in theta.items()}
    plain = {n: m.weight.data.clone() for n, m in matrices.items()}

    def loss(moved_, batch_):
        for a in (n for n in moved_ if "lora_A" in n):
            name = kind.own_name(a).removesuffix(".lora_A.default.weight")
            delta = torch.from_numpy(moved_[a.replace("lora_A", "lora_B")] @ moved_[a]) * (6 / 4)
            delta = delta.T if make_base is tiny.gpt2 else delta
            matrices[name].weight.data = plain[name] + delta
        sums, counts = losses(other.plain, batch_)
        return float(sums.sum() / counts.sum())

    with torch.no_grad():
        for step in range(12):
            (batch_,) = trainer.batches(step)
            draw = {n: z(t, step).numpy() for n, t in ours.items()}
            both = [
                loss({n: t + np.float32(s * eps) * draw[n] for n, t in theta.items()}, batch_)
                for s in (1, -1)
            ]
            slope = (both[0] - both[1]) / (2 * eps)
            theta = {n: t - np.float32(lr * slope) * draw[n] for n, t in theta.items()}
            trainer.step()
    trainer.axis.flush()
    for n, t in ours.items():
        far = np.abs(theta[n] - start[n]).max()
        assert far > 1e-4 and np.abs(t.stored.numpy() - theta[n]).max() < 5e-3 * far, n


def test_steps_on_scales_are_those_of_a_slow_twin(tmp_path):
    """QZO's rule on W = Δ·(c − zero) + s·B A, the pairs standing still."""
    base = quantised()
    other = Twin(base, np.float64)
    model = place(tmp_path, base)
    deltas = {n: m.scaling["default"] * (m.lora_B["default"].weight @ m.lora_A["default"].weight).detach().double()
              for n, m in kept_in_place.lora_pairs(model).items()}  # fmt: skip
    assert len(deltas) == 4

    class Beside(Twin):
        def write(self, scales):
            super().write(scales)
            for n, delta in deltas.items():
                layer = self.parts[f"{n}.scales"][0]
                layer.weight.data = (layer.weight.data + delta).float()
            for layer, *_ in self.parts.values():
                layer.weight.data = layer.weight.data.float()

    other.__class__ = Beside
    trainer = build(tmp_path, model, train="scales", eps=1e-3, lr=3e-4, clip=3.0, steps=12)
    named = [dataclasses.replace(t, name=kind.own_name(t.name)) for t in trainer.axis.trained]
    assert {t.name for t in named} == other.parts.keys()
    pairs = {n: p.clone() for n, p in adapters.named(model)}
    before = {n: p[2].copy() for n, p in other.parts.items()}
    for t in range(12):
        (batch_,) = trainer.batches(t)
        other.step(t, named, batch_, eps=1e-3, lr=3e-4, clip=3.0, floor=linear.FLOOR)
        trainer.step()
    trainer.axis.flush()
    for t in trainer.axis.trained:
        want = other.parts[kind.own_name(t.name)][2]
        far = np.abs(want - before[kind.own_name(t.name)]).max()
        assert np.abs(t.stored.numpy() - want).max() < 5e-3 * far, t.name
    assert all(torch.equal(p, pairs[n]) for n, p in adapters.named(model))


# ---- what is selected, saved, refused ------------------------------------------------------------------------------


def test_pairs_in_place_are_selected_by_nothing_but_lora(tmp_path):
    model = place(tmp_path, tiny.llama())
    for train in ("all", "last-1", "norms", "proj.weight", r"^model\.norm", "lora_"):
        if train == "lora_":
            with pytest.raises(UserError, match="selects no tensor"):
                space.train_names(model, train)
        else:
            names = space.train_names(model, train)
            plain = space.train_names(tiny.llama(), train)
            assert [kind.own_name(n) for n in names] == plain
    assert len(space.train_names(model, "lora")) == 8
    # An adapter in fp32 beside a 16-bit model does not widen it.
    model = place(tmp_path, quantised().bfloat16())
    assert (
        space.resolve_dtypes(model, space.train_names(model, "scales"), "auto", "auto", "cuda")[1] == "bf16"
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_saved_model_has_its_pairs_merged_or_beside_its_codes(tmp_path, name):
    ids = torch.arange(12).view(2, 6) + 3
    keys = {} if name == "gpt2" else {"lora_targets": "all-linear"}
    for codes in (False, True):
        base = quantised(tiny.MODELS[name]) if codes else tiny.MODELS[name]()
        model = place(tmp_path / str(codes), base, **keys)
        model.beside = kept_in_place.adapter_files(tmp_path / str(codes) / "adapter")
        want = model(ids).logits.detach()
        ways = [("plain", True), ("codes", False)] if codes else [("plain", False)]
        for form, dequantise in ways:
            out = tmp_path / str(codes) / form
            saving.save_model(model, tiny.tokenizer(), out, dequantise=dequantise)
            assert torch.equal(model(ids).logits, want)  # the model in memory is as it was
            assert (out / "adapter").is_dir() == (form == "codes")
            if form == "plain":
                got = hf.AutoModelForCausalLM.from_pretrained(out)(ids).logits.detach()
                assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max())
            else:
                saved, _ = load.load_model(str(out))
                assert torch.equal(adapters.load_adapter(saved, out / "adapter")(ids).logits, want)


def test_a_pair_on_a_tied_matrix_is_kept_beside_it(tmp_path):
    model = place(tmp_path, tiny.llama(tie=True), lora_targets="lm_head")
    model.beside = kept_in_place.adapter_files(tmp_path / "adapter")
    saving.save_model(model, tiny.tokenizer(), tmp_path / "out")
    assert (tmp_path / "out" / "adapter").is_dir()
    ids = torch.arange(12).view(2, 6) + 3
    again = adapters.load_adapter(load.load_model(str(tmp_path / "out"))[0], tmp_path / "out" / "adapter")
    assert torch.equal(again(ids).logits, model(ids).logits)


def changed(folder, **keys):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_adapters_that_cannot_be_put_in_place_are_one_line(tmp_path):
    place(tmp_path, tiny.llama())
    folder = tmp_path / "adapter"
    small = tiny.build(
        hf.LlamaForCausalLM, hf.LlamaConfig(**{**tiny.llama().config.to_dict(), "num_hidden_layers": 1})
    )
    with pytest.raises(UserError, match="it belongs to another model: .*fits no layer"):
        adapters.load_adapter(small, folder)
    with pytest.raises(UserError, match="size mismatch"):
        adapters.load_adapter(tiny.build(hf.LlamaForCausalLM, hf.LlamaConfig(**{**tiny.llama().config.to_dict(), "hidden_size": 32})), folder)  # fmt: skip
    for keys, said in (
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "it is IA3"),
        ({"bias": "all"}, "with bias"),
    ):
        other = tmp_path / said.replace(" ", "")
        shutil.copytree(folder, other)
        changed(other, **keys)
        with pytest.raises(UserError, match=f"adapter=.*{said}"):
            kept_in_place.adapter_files(other)
    assert kept_in_place.folder_fingerprint(folder) == kept_in_place.folder_fingerprint(folder)
    before = kept_in_place.folder_fingerprint(folder)
    changed(folder, base_model_name_or_path="elsewhere")
    assert kept_in_place.folder_fingerprint(folder) == before
    changed(folder, lora_alpha=3)
    assert kept_in_place.folder_fingerprint(folder) != before
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:-4])
    with pytest.raises(UserError, match="is damaged"):
        kept_in_place.adapter_files(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors only"):
        kept_in_place.adapter_files(folder)


@pytest.mark.parametrize("keys, part", [
    (["train=prefix", "adapter=a"], "train=prefix: does not go with adapter"),
    (["train=lora", "adapter=a", "lora_rank=4"], "lora_rank=4: the adapter has its own"),
    (["adapter=a", "storage=bf16", "denoise_every=5"], "denoise_every=5: rebuilds weights"),
    (["adapter= "], "adapter is empty"),
])  # fmt: skip
def test_keys_that_do_not_go_with_an_adapter_are_refused(keys, part):
    with pytest.raises(UserError, match=part):
        compose(None, ["model=a/b", "task=reviews", *keys])


def test_an_adapter_has_its_own_rank():
    config = compose(None, ["model=a/b", "task=reviews", "train=lora", "adapter=a"])
    assert (config.lora_rank, config.lora_alpha, config.lr) == (None, None, 1e-4)
    assert Config().adapter is None


# ---- the two commands ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Zeroth-order LoRA beside 4-bit codes, then the codes' scales with that adapter in place: the QZO paper's schedule."""
    folder = tmp_path_factory.mktemp("stages")
    settings = "bits: 4\ngroup: 32\nsteps: 6\nbatch_size: 4\nmax_length: 32\nthreads: 1\n"
    tiny.place(folder, settings, choices="{a: a b, b: 'no'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in (
            ["recipe=lora_zo", "lr=1e-2", "output_dir=one"],
            ["recipe=qzo", "train=scales", "lr=1e-3", "adapter=one/adapter", "output_dir=two"],
        ):
            done = zoft("train", "--config", "mine.yaml", *words)
            assert done.exit_code == 0, done.stderr
        yield folder


def result(run):
    return json.loads((run / "result.json").read_text())


def cut(run, to, steps=2):
    """The run as a kill would have left it, some steps before its end."""
    to.mkdir()
    shutil.copy(run / "config.yaml", to)
    (to / "ledger").write_bytes((run / "ledger").read_bytes()[: -32 * steps])
    return to


def metrics(*words):
    done = zoft("eval", *words, "--json", "--resamples", "0")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    found.pop("ci95", None)
    return found


def test_the_second_stage_starts_where_the_first_ended(runs):
    assert result(runs / "two")["before"] == pytest.approx(result(runs / "one")["after"], rel=1e-5)
    assert result(runs / "two")["after"]["loss"] != result(runs / "two")["before"]["loss"]
    base, saved = load.load_model(str(runs / "tiny"))[0], load.load_model(str(runs / "two" / "model"))[0]
    linear.quantise_model(base, bits=4, group=32, zero_points=True)
    moved_ = [
        not torch.equal(m.scales, linear.quantised_layers(base)[n].scales)
        for n, m in linear.quantised_layers(saved).items()
    ]
    assert len(moved_) == 14 and all(moved_)
    name = "adapter_model.safetensors"
    assert (runs / "two/model/adapter" / name).read_bytes() == (runs / "one/adapter" / name).read_bytes()
    for run in ("one", "two"):
        assert metrics(runs / run) == pytest.approx(result(runs / run)["after"], rel=1e-5)
    again = metrics(
        "--config", "mine.yaml", "bits=null", "group=128", "model=two/model"
    )  # the adapter goes along
    assert again == pytest.approx(result(runs / "two")["after"], rel=1e-5)


@pytest.mark.parametrize("run, part", [("one", "adapter"), ("two", "model")])
def test_resume_and_replay_are_the_run_bit_for_bit(runs, tmp_path, run, part):
    def saved(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.safetensors")}

    want = saved(runs / run / part)
    assert len(want) == (1 if run == "one" else 2)
    done = zoft("train", "--resume", cut(runs / run, tmp_path / "cut"))
    assert done.exit_code == 0, done.stderr
    assert saved(tmp_path / "cut" / part) == want
    assert (tmp_path / "cut" / "ledger").read_bytes() == (runs / run / "ledger").read_bytes()
    done = zoft("replay", runs / run, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert saved(tmp_path / "out") == want
    assert "6 of 6 steps" in zoft("replay", runs / run).stdout


def test_another_adapter_is_refused(runs, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(runs / "one" / "adapter", tmp_path / "other")
    path = tmp_path / "other" / "adapter_model.safetensors"
    kept = load_file(path)
    name = next(n for n in kept if "lora_B" in n)
    save_file(kept | {name: kept[name] * 1.001}, path)
    where = cut(runs / "two", tmp_path / "cut")
    text = (where / "config.yaml").read_text()
    for place_, said in (
        (f"{tmp_path / 'other'}", "starts from"),
        ("null", "starts from"),
        (f"{tmp_path / 'none'}", "no such folder"),
    ):
        (where / "config.yaml").write_text(
            text.replace(f"adapter: {runs / 'one' / 'adapter'}", f"adapter: {place_}")
        )
        for words in (
            ["train", "--resume", where],
            ["replay", where],
            ["replay", where, "--out", tmp_path / "x"],
        ):
            done = zoft(*words)
            assert done.exit_code == 2 and said in done.stderr, (words, done.stderr)
    (where / "config.yaml").write_text(text)
    assert zoft("replay", where).exit_code == 0


def test_what_stage_one_saves_is_plain_peft(runs, tmp_path):
    """Beside the dequantised model, opened by transformers and peft alone, it gives the logits of zoft's own export."""
    base, tokenizer = load.load_model(str(runs / "tiny"))
    linear.quantise_model(base, bits=4, group=32, zero_points=True)
    saving.save_model(base, tokenizer, tmp_path / "plain", dequantise=True)
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    ids = torch.arange(12).view(2, 6) + 3
    without = plain(ids).logits.detach()
    opened = peft.PeftModel.from_pretrained(plain, runs / "one" / "adapter").eval()
    with torch.no_grad():
        got = opened(input_ids=ids).logits
        want = adapters.load_adapter(base, runs / "one" / "adapter")(ids).logits
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert (want - without).abs().max() > 1e-3
        done = zoft("export", runs / "one", "--merge", "--out", tmp_path / "merged", "--dtype", "fp32")
        assert done.exit_code == 0, done.stderr
        whole = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(whole(ids).logits, want, rtol=1e-4, atol=1e-4)
    assert zoft("export", runs / "one", "--adapter", "--out", tmp_path / "a").exit_code == 0
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (runs / "one/adapter/adapter_model.safetensors").read_bytes()  # fmt: skip


def test_stage_two_exported_is_one_plain_model(runs, tmp_path):
    done = zoft("export", runs / "two", "--merge", "--out", tmp_path / "plain", "--dtype", "fp32")
    assert done.exit_code == 0, done.stderr
    found = metrics("--config", "mine.yaml", "bits=null", "group=128", f"model={tmp_path / 'plain'}")
    assert found == pytest.approx(result(runs / "two")["after"], rel=1e-3)
    done = zoft("export", runs / "two", "--adapter", "--out", tmp_path / "x")
    assert done.exit_code == 2 and "use --merge" in done.stderr


def test_training_on_from_an_adapter(runs, tmp_path):
    words = ["--config", "mine.yaml", "recipe=lora_zo", "lr=1e-2", "seed=1", "adapter=one/adapter"]
    done = zoft("train", *words, f"output_dir={tmp_path / 'on'}")
    assert done.exit_code == 0, done.stderr
    assert result(tmp_path / "on")["before"] == pytest.approx(result(runs / "one")["after"], rel=1e-5)
    assert metrics(tmp_path / "on") == pytest.approx(result(tmp_path / "on")["after"], rel=1e-5)
    files = [
        (x / "adapter" / "adapter_model.safetensors").read_bytes() for x in (runs / "one", tmp_path / "on")
    ]
    assert files[0] != files[1]
    assert zoft("replay", tmp_path / "on", "--out", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == files[1]
    assert zoft("export", tmp_path / "on", "--adapter", "--out", tmp_path / "a").exit_code == 0


@pytest.mark.parametrize(
    "words", [["train=norms"], ["train=all", "storage=fp32", "recipe=sparse_mezo", "momentum=0.5"]]
)
def test_a_plain_model_with_an_adapter_in_place_is_saved_merged(runs, tmp_path, words):
    run = tmp_path / "run"
    keys = [
        "--config",
        "mine.yaml",
        "bits=null",
        "group=128",
        "adapter=one/adapter",
        "lr=1e-3",
        "snapshot_every=3",
        *words,
    ]
    done = zoft("train", *keys, f"output_dir={run}")
    assert done.exit_code == 0 and "4 LoRA pairs in place, frozen" in done.stderr, done.stderr
    assert not (run / "model" / "adapter").exists()
    assert metrics(run) == pytest.approx(result(run)["after"], rel=1e-4)
    assert zoft("replay", run, "--out", tmp_path / "out").exit_code == 0
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (run / "model" / name).read_bytes()
    if "train=all" in words:
        done = zoft("replay", run, "--denoise", "--out", tmp_path / "d")
        assert done.exit_code == 2


def test_a_model_with_an_adapter_in_place_takes_no_other(runs, tmp_path):
    keys = [
        "--config",
        "mine.yaml",
        "bits=null",
        "group=128",
        "model=two/model",
        f"output_dir={tmp_path / 'x'}",
    ]
    for words in (["recipe=lora_zo"], ["recipe=qzo", "train=scales", "adapter=one/adapter"]):
        done = zoft("train", *keys, *words)
        assert done.exit_code == 2 and "has an adapter in place already" in done.stderr, done.stderr
    done = zoft("train", *keys, "recipe=qzo", "train=scales", "steps=2", "eps_mode=relative")
    assert done.exit_code == 0, done.stderr  # and goes on with its own
    assert result(tmp_path / "x")["before"] == pytest.approx(result(runs / "two")["after"], rel=1e-4)
    assert (tmp_path / "x" / "model" / "adapter").is_dir()
    assert metrics(tmp_path / "x") == pytest.approx(result(tmp_path / "x")["after"], rel=1e-4)


def test_estimate_knows_of_both(runs, monkeypatch):
    from zoft.run import estimate

    monkeypatch.setattr(estimate, "MEASURED", 0.0)
    words = ["estimate", "--config", "mine.yaml", "--json"]
    pairs = json.loads(zoft(*words, "recipe=lora_zo").stdout)
    assert (pairs["trained"], pairs["notes"]) == (2 * 8 * (16 + 16 + 16 + 8), [])
    scales = json.loads(zoft(*words, "recipe=qzo", "train=scales").stdout)
    beside = json.loads(zoft(*words, "recipe=qzo", "train=scales", "adapter=one/adapter").stdout)
    assert beside["trained"] == scales["trained"]
    assert beside["weights_bytes"] - scales["weights_bytes"] == 4 * pairs["trained"]


def test_a_mistake_with_an_adapter_is_one_line(runs, tmp_path):
    for words, said in (
        (["adapter=nowhere"], "adapter=nowhere: no such folder"),
        (["adapter=tiny"], "no adapter_config.json in this folder"),
    ):
        done = zoft(
            "train",
            "--config",
            "mine.yaml",
            "recipe=qzo",
            "train=scales",
            f"output_dir={tmp_path / 'x'}",
            *words,
        )
        assert done.exit_code == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1, (
            done.stderr
        )
