"""Models from anybody: refused in one line, no pickle loaded, no code run, nothing read from outside their folder."""

import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import hostile
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from zoft.cli.main import app
from zoft.models import checkpoint

UP = "model.layers.0.mlp.up_proj.weight"
ROOT = Path(__file__).resolve().parents[2]


class Evil:
    """What a malicious checkpoint holds: a pickle that runs a command when it is loaded."""

    def __reduce__(self):
        return os.system, (f"touch {Evil.mark}",)

    mark = "pwned"


def evil(path):
    Evil.mark = path.parent.parent / "pwned"
    path.write_bytes(pickle.dumps(Evil()))


def evil_torch(path):
    Evil.mark = path.parent.parent / "pwned"
    torch.save({UP: torch.ones(2), "x": Evil()}, path)


def tensors(**changes):
    """Save the weights with some changed; None leaves one out."""

    def spoil(m):
        state = load_file(m / "model.safetensors")
        for name, change in changes.items():
            name = UP if name == "up" else name
            state[name] = change(state[name]) if callable(change) else change
        state = {n: t.contiguous() for n, t in state.items() if t is not None}
        save_file(state, m / "model.safetensors", metadata={"format": "pt"})

    return spoil


def file(name, content):
    return lambda m: (m / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def gone(*names):
    return lambda m: [(m / name).unlink() for name in names]


def cut(name, keep):
    def spoil(m):
        data = (m / name).read_bytes()
        (m / name).write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])

    return spoil


def both(*spoils):
    return lambda m: [spoil(m) for spoil in spoils]


def config(**changes):
    """config.json with keys changed; None removes one."""

    def spoil(m):
        found = json.loads((m / "config.json").read_text()) | changes
        (m / "config.json").write_text(json.dumps({k: v for k, v in found.items() if v is not None}))

    return spoil


def header(change):
    """The safetensors header changed, its length put right."""

    def spoil(m):
        data = (m / "model.safetensors").read_bytes()
        n = struct.unpack_from("<Q", data)[0]
        found = change(json.loads(data[8 : 8 + n]))
        text = found if isinstance(found, bytes) else json.dumps(found).encode()
        (m / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n :])

    return spoil


def entry(**changes):
    return header(lambda h: h | {UP: h[UP] | changes})


def index(**files):
    """Sharded weights whose index names these files."""

    def spoil(m):
        (m / "model.safetensors").rename(m / "model-00001-of-00001.safetensors")
        names = list(load_file(m / "model-00001-of-00001.safetensors"))
        table = dict.fromkeys(names, "model-00001-of-00001.safetensors") | {UP: files["up"]}
        (m / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))

    return spoil


def bad_value(value):
    def change(t):
        t[1, 1] = value
        return t

    return change


# name -> (what is done to the model's folder, what the answer must name)
CASES = {
    "an empty folder": (lambda m: [p.unlink() for p in m.iterdir()], "config.json"),
    "no config": (gone("config.json"), "config.json"),
    "config, empty": (file("config.json", ""), "config.json"),
    "config, cut": (cut("config.json", 0.5), "config.json"),
    "config, a list": (file("config.json", "[]"), "config.json"),
    "config, a word": (file("config.json", '"llama"'), "config.json"),
    "config, an empty object": (file("config.json", "{}"), "model_type"),
    "config, not UTF-8": (file("config.json", b'{"model_type": "ll\xe9ma"}'), "config.json"),
    "config, zero bytes": (file("config.json", b"\0" * 100), "config.json"),
    "config, deep": (file("config.json", "[" * 20000), "config.json"),
    "config, a key twice": (file("config.json", '{"model_type": "llama", "model_type": "opt"}'), "twice"),
    "config, a pickle": (lambda m: evil(m / "config.json"), "config.json"),
    "config, html": (file("config.json", "<html>404</html>"), "config.json"),
    "unknown architecture": (config(model_type="no-such"), "no-such"),
    "architecture, a number": (config(model_type=3), "cannot be loaded"),
    "architecture, a path": (config(model_type="../../x"), "cannot be loaded"),
    "architecture, none": (config(model_type=None, architectures=None), "model_type"),
    "another architecture": (config(model_type="opt"), "tensor"),
    "an architecture of images": (config(model_type="vit"), "cannot be loaded"),
    "code of its own": (both(config(model_type="x", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}), file("c.py", "open('../pwned', 'w')")), "trust_remote_code"),
    "code from the Hub": (config(model_type="x", auto_map={"AutoConfig": "evil/repo--c.C"}), "trust_remote_code"),
    "kernels from the Hub": (config(attn_implementation="evil/kernel"), "code from elsewhere"),
    "kernels from the Hub, hidden": (config(_attn_implementation="evil/kernel@v1"), "code from elsewhere"),
    "kernels from the Hub, below": (config(_attn_implementation_internal={"": "evil/kernel:f"}), "code from elsewhere"),
    "an attention that is none": (config(attn_implementation="no-such"), "cannot be loaded"),
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers"),
    "minus one layer": (config(num_hidden_layers=-1), "num_hidden_layers"),
    "layers, a word": (config(num_hidden_layers="two"), "cannot be loaded"),
    "one layer more": (config(num_hidden_layers=3), "model.layers.2"),
    "hidden size, a word": (config(hidden_size="big"), "cannot be loaded"),
    "hidden size, none": (config(hidden_size=0), "model="),
    "hidden size, negative": (config(hidden_size=-16), "cannot be loaded"),
    "hidden size, another": (config(hidden_size=32), "another shape"),
    "hidden size, huge": (config(hidden_size=1 << 40), "describes a model of"),
    "heads, none": (config(num_attention_heads=0), "cannot be loaded"),
    "heads that do not divide": (config(num_attention_heads=3), "model="),
    "vocabulary, another": (config(vocab_size=7), "another shape"),
    "vocabulary, huge": (config(vocab_size=1 << 50), "describes a model of"),
    "vocabulary, negative": (config(vocab_size=-1), "model="),
    "an activation that is none": (config(hidden_act="os.system"), "cannot be loaded"),
    "rope that is none": (config(rope_parameters={"rope_type": "evil"}), "cannot be loaded"),
    "dtype that is none": (config(dtype="float13"), "cannot be loaded"),
    "dtype, a function": (config(dtype="save"), "cannot be loaded"),
    "dtype, whole numbers": (config(dtype="int8"), "model="),
    "quantised without a method": (config(quantization_config={}), "quant_method=None is none that is read"),
    "weights named elsewhere": (config(transformers_weights="../../../etc/passwd"), "transformers_weights"),
    "weights named, a pickle": (both(config(transformers_weights="w.bin"), lambda m: evil_torch(m / "w.bin")), "transformers_weights"),
    "no weights": (gone("model.safetensors"), "no model.safetensors"),
    "pickled weights only": (both(gone("model.safetensors"), lambda m: evil(m / "pytorch_model.bin")), "is a pickle"),
    "torch's pickles only": (both(gone("model.safetensors"), lambda m: evil_torch(m / "pytorch_model.bin")), "is a pickle"),
    "pickled shards only": (both(gone("model.safetensors"), lambda m: evil_torch(m / "pytorch_model-00001-of-00001.bin"), file("pytorch_model.bin.index.json", '{"weight_map": {"x": "pytorch_model-00001-of-00001.bin"}}')), "is a pickle"),
    "weights of flax only": (both(gone("model.safetensors"), file("flax_model.msgpack", b"x")), "flax_model.msgpack"),
    "weights of keras only": (both(gone("model.safetensors"), file("tf_model.h5", b"x")), "tf_model.h5"),
    "weights as .pt": (both(gone("model.safetensors"), lambda m: evil_torch(m / "model.pt")), "is a pickle"),
    "an adapter": (file("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "evil/base"}'), "adapter"),
    "a pickled adapter": (both(file("adapter_config.json", "{}"), lambda m: evil_torch(m / "adapter_model.bin")), "adapter"),
    "weights, empty": (file("model.safetensors", b""), "model.safetensors"),
    "weights, seven bytes": (cut("model.safetensors", 7), "model.safetensors"),
    "weights, eight bytes": (cut("model.safetensors", 8), "model.safetensors"),
    "weights, cut in the header": (cut("model.safetensors", 500), "model.safetensors"),
    "weights, cut in the middle": (cut("model.safetensors", 0.5), "model.safetensors"),
    "weights, the last byte gone": (cut("model.safetensors", -1), "model.safetensors"),
    "weights, a byte more": (lambda m: (m / "model.safetensors").open("ab").write(b"x"), "model.safetensors"),
    "weights, zero bytes": (file("model.safetensors", b"\0" * 10000), "model.safetensors"),
    "weights, a huge header": (file("model.safetensors", struct.pack("<Q", 1 << 62) + b"x" * 100), "header"),
    "weights, a pickle": (lambda m: evil(m / "model.safetensors"), "model.safetensors"),
    "weights, torch's pickle": (lambda m: evil_torch(m / "model.safetensors"), "model.safetensors"),
    "weights, git lfs": (file("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"), "model.safetensors"),
    "weights, html": (file("model.safetensors", "<!DOCTYPE html><html>" * 20), "model.safetensors"),
    "header, no JSON": (header(lambda h: b"{" + b"x" * 500), "model.safetensors"),
    "header, a list": (header(lambda h: []), "model.safetensors"),
    "header, not UTF-8": (header(lambda h: b'{"\xff": 1}'), "model.safetensors"),
    "header, deep": (header(lambda h: b"[" * 50000), "model.safetensors"),
    "header, a tensor twice": (header(lambda h: json.dumps(h).encode().replace(b"layers.1.mlp.up", b"layers.0.mlp.up")), "twice"),
    "header, an unknown dtype": (entry(dtype="F13"), UP),
    "header, a dtype of another size": (entry(dtype="F64"), UP),
    "header, no dtype": (header(lambda h: h | {UP: {"shape": [1]}}), UP),
    "header, a word for a tensor": (header(lambda h: h | {UP: "x"}), UP),
    "header, another shape": (entry(shape=[24, 17]), UP),
    "header, a negative shape": (entry(shape=[-24, -16]), UP),
    "header, a huge shape": (entry(shape=[1 << 40, 1 << 40]), UP),
    "header, a shape of floats": (entry(shape=[24.0, 16.0]), UP),
    "header, offsets beyond the end": (entry(data_offsets=[1 << 40, (1 << 40) + 1536]), "model.safetensors"),
    "header, offsets backwards": (entry(data_offsets=[1536, 0]), UP),
    "header, tensors that overlap": (entry(data_offsets=[0, 1536]), "overlap"),
    "nan in a weight": (tensors(up=bad_value(float("nan"))), UP),
    "infinity in a weight": (tensors(up=bad_value(float("inf"))), UP),
    "nan in a norm": (tensors(**{"model.norm.weight": lambda t: t * float("nan")}), "model.norm.weight"),
    "half a tensor": (tensors(up=lambda t: t[:12]), "another shape"),
    "a tensor turned round": (tensors(up=lambda t: t.T), "another shape"),
    "a tensor missing": (tensors(up=None), f"{UP} is missing"),
    "the embedding missing": (tensors(**{"model.embed_tokens.weight": None}), "embed_tokens"),
    "the head missing": (tensors(**{"lm_head.weight": None}), "lm_head"),
    "whole numbers": (tensors(up=lambda t: t.long()), "I64"),
    "truth values": (tensors(up=lambda t: t > 0), "BOOL"),
    "bytes": (tensors(up=lambda t: t.to(torch.uint8)), "U8"),
    "no tensor": (lambda m: save_file({"x": torch.ones(1)}, m / "model.safetensors", metadata={"format": "pt"}), "is missing"),
    "index out of the folder": (index(up="../model.safetensors"), "no safetensors file in the model's folder"),
    "index, absolute": (index(up="/etc/passwd"), "/etc/passwd"),
    "index, a pickle": (both(index(up="evil.bin"), lambda m: evil_torch(m / "evil.bin")), "evil.bin"),
    "index, a number": (index(up=3), "3"),
    "index, a file that is missing": (index(up="model-2.safetensors"), "model-2.safetensors is missing"),
    "index, a damaged file": (both(index(up="b.safetensors"), file("b.safetensors", b"xx")), "b.safetensors"),
    "index, empty": (both(index(up="x"), file("model.safetensors.index.json", "{}")), "weight_map"),
    "index, a list": (both(index(up="x"), file("model.safetensors.index.json", "[]")), "index.json"),
    "index, cut": (both(index(up="x"), cut("model.safetensors.index.json", 0.5)), "index.json"),
    "no tokenizer": (lambda m: [p.unlink() for p in m.glob("tokenizer*")], "cannot be loaded"),
    "tokenizer, empty": (file("tokenizer.json", ""), "cannot be loaded"),
    "tokenizer, cut": (cut("tokenizer.json", 0.5), "cannot be loaded"),
    "tokenizer, an empty object": (file("tokenizer.json", "{}"), "cannot be loaded"),
    "tokenizer, a pickle": (lambda m: evil(m / "tokenizer.json"), "cannot be loaded"),
    "tokenizer, not UTF-8": (file("tokenizer.json", b'{"x": "\xff"}'), "cannot be loaded"),
    "tokenizer's config, cut": (cut("tokenizer_config.json", 0.5), "cannot be loaded"),
    "tokenizer's config, a list": (file("tokenizer_config.json", "[]"), "cannot be loaded"),
    "tokenizer of more words": (both(config(vocab_size=7), tensors(**{n: lambda t: t[:7] for n in ("model.embed_tokens.weight", "lm_head.weight")})), "do not belong together"),
    "weights, a folder": (both(gone("model.safetensors"), lambda m: (m / "model.safetensors").mkdir()), "model="),
    "weights, a link to itself": (both(gone("model.safetensors"), lambda m: (m / "model.safetensors").symlink_to("model.safetensors")), "model="),
    "weights, a link to nowhere": (both(gone("model.safetensors"), lambda m: (m / "model.safetensors").symlink_to("gone")), "model="),
    "weights, a link to a device": (both(gone("model.safetensors"), lambda m: (m / "model.safetensors").symlink_to("/dev/zero")), "model="),
    "config, a link to a device": (both(gone("config.json"), lambda m: (m / "config.json").symlink_to("/dev/zero")), "config.json"),
    "config, a folder": (both(gone("config.json"), lambda m: (m / "config.json").mkdir()), "config.json"),
}  # fmt: skip


@pytest.fixture
def place(tmp_path_factory, tmp_path):
    return hostile.copy(tmp_path_factory.getbasetemp(), tmp_path / "place")


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_folder(place, name):
    spoil, part = CASES[name]
    spoil(place / "tiny")
    hostile.refused(place, hostile.TRAIN, part)
    assert not (place / "pwned").exists()


@pytest.mark.parametrize(
    "name", ["pickled weights only", "config, cut", "header, another shape", "no tokenizer"]
)
@pytest.mark.parametrize("verb", ["data", "eval", "estimate"])
def test_every_verb_refuses_it(place, name, verb):
    spoil, _ = CASES[name]
    spoil(place / "tiny")
    if (name, verb) == ("no tokenizer", "estimate"):
        return  # it has use for shapes alone and says what it assumes
    hostile.refused(place, [verb, "--config", "mine.yaml"], "model=")


def test_an_evil_pickle_is_one(tmp_path):
    """The proof that the cases above would show: loading one runs its command."""
    (tmp_path / "a").mkdir()
    evil(tmp_path / "a" / "x.bin")
    pickle.loads((tmp_path / "a" / "x.bin").read_bytes())
    assert (tmp_path / "pwned").exists()


def test_permissions(place):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        path = place / "tiny" / name
        path.chmod(0)
        with hostile.no_privileges(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(hostile, "digest", lambda folder: None)
            hostile.refused(place, hostile.TRAIN, "model=")
        path.chmod(0o644)


def test_flipped_bits_are_refused_or_harmless(place):
    """Anywhere in the small files and the weights' header: one line, or a model that runs; never more."""
    rng = random.Random(0)
    refusals = 0
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        path = place / "tiny" / name
        whole = path.read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little") if name.endswith("safetensors") else len(whole)
        for _ in range(12):
            at = rng.randrange(end)
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
            with hostile.working(place):
                done = CliRunner().invoke(app, ["eval", "--config", "mine.yaml"])
            lines = [x for x in done.stderr.splitlines() if not x.startswith(hostile.PROGRESS)]
            assert done.exit_code in (0, 2), (name, at, done.exception)
            assert len(lines) == (done.exit_code == 2) or done.exit_code == 0, (name, at, lines)
            refusals += done.exit_code == 2
        path.write_bytes(whole)
    assert refusals >= 15


# --- GGUF -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    pytest.importorskip("gguf")
    from test_models import gguf_llama, write_gguf

    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, gguf_llama(tie=False))
    return path.read_bytes()


def put(at, code, *values):
    return lambda data: data[:at] + struct.pack(code, *values) + data[at + struct.calcsize(code) :]


def after(name, code, *values):
    """Overwrite what stands so many bytes behind a key: its type, then its value."""

    def spoil(data):
        at = data.index(name) + len(name)
        return put(at, code, *values)(data)

    return spoil


GGUFS = {
    "empty": lambda d: b"",
    "three bytes": lambda d: d[:3],
    "magic only": lambda d: d[:4],
    "no numbers": lambda d: d[:20],
    "cut in the keys": lambda d: d[:300],
    "cut in the words": lambda d: d[:3000],
    "cut in the tensors": lambda d: d[:-1000],
    "another magic": lambda d: b"GGML" + d[4:],
    "big-endian": put(4, ">I", 3),
    "version 1": put(4, "<I", 1),
    "version 99": put(4, "<I", 99),
    "2^60 tensors": put(8, "<Q", 1 << 60),
    "2^60 keys": put(16, "<Q", 1 << 60),
    "no keys": put(16, "<Q", 0),
    "a key of 2^60 bytes": put(24, "<Q", 1 << 60),
    "an unknown type": after(b"llama.block_count", "<I", 77),
    "an array of 2^60": after(b"tokenizer.ggml.tokens", "<IIQ", 9, 8, 1 << 60),
    "an array of an unknown type": after(b"tokenizer.ggml.tokens", "<II", 9, 55),
    "arrays in arrays": after(b"tokenizer.ggml.tokens", "<IIQ", 9, 9, 1 << 40),
    "no layers": after(b"llama.block_count", "<II", 4, 0),
    "a layer more": after(b"llama.block_count", "<II", 4, 3),
    "2^31 layers": after(b"llama.block_count", "<II", 4, 1 << 31),
    "no heads": after(b"llama.attention.head_count", "<II", 4, 0),
    "another width": after(b"llama.embedding_length", "<II", 4, 48),
    "another architecture": lambda d: d.replace(b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama", b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0lxama"),
    "a tensor of unknown type": after(b"token_embd.weight", "<IQQI", 2, 32, 264, 9999),
    "a tensor beyond the end": after(b"token_embd.weight", "<IQQIQ", 2, 32, 264, 0, 1 << 50),
    "a tensor of 2^62 numbers": after(b"token_embd.weight", "<IQQ", 2, 1 << 31, 1 << 31),
    "a tensor of 2^30 dimensions": after(b"token_embd.weight", "<I", 1 << 30),
    "words that are no UTF-8": lambda d: d.replace(b"<pad>", b"\xff\xfe\xff\xfe\xff", 1),
    "a pickle": lambda d: pickle.dumps(Evil()),
    "html": lambda d: b"<html>404</html>",
}  # fmt: skip


@pytest.mark.parametrize("name", GGUFS)
def test_a_hostile_gguf(place, gguf_file, name):
    path = place / "m.gguf"
    path.write_bytes(GGUFS[name](gguf_file))
    assert path.read_bytes() != gguf_file
    hostile.refused(place, [*hostile.TRAIN, "model=m.gguf"], "model=")


def test_flipped_bits_of_a_gguf_are_refused_or_harmless(place, gguf_file):
    from zoft.errors import UserError
    from zoft.models import load

    rng = random.Random(1)
    path = place / "m.gguf"
    refusals = 0
    for _ in range(60):
        at = rng.randrange(gguf_file.index(b"blk.1.ffn_down.weight"))
        flipped = bytes([gguf_file[at] ^ 1 << rng.randrange(8)])
        path.write_bytes(gguf_file[:at] + flipped + gguf_file[at + 1 :])
        try:
            load.load_model(str(path))
        except UserError as error:
            refusals += 1
            assert len(str(error).splitlines()) == 1, error
    assert refusals > 5


def test_real_processes_say_one_line_too(place):
    """What another thread or a library writes to stderr shows only here."""
    cases = (
        ("pickled weights only", "is a pickle"),
        ("header, tensors that overlap", "overlap"),
        ("a tensor missing", "is missing"),
        ("tokenizer, cut", "cannot be loaded"),
    )
    for name, part in cases:
        m = place / "tiny"
        shutil.rmtree(m)
        tiny.save(m)
        CASES[name][0](m)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "zoft", *hostile.TRAIN]
        done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
        lines = [x for x in done.stderr.splitlines() if not x.startswith(hostile.PROGRESS)]
        assert done.returncode == 2 and len(lines) == 1 and part in lines[0], (name, done.stderr)
        assert not (place / "pwned").exists() and not (place / "out").exists()


def test_what_is_checked_is_what_is_written(place):
    """The check takes every file that transformers writes: one file, shards, 16 bits."""
    model = tiny.llama()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model.to(dtype).save_pretrained(place / "one")
        assert UP in checkpoint.check_folder("one", place / "one")
    model.save_pretrained(place / "many", max_shard_size="2KB")
    assert len(list((place / "many").glob("*.safetensors"))) > 2
    assert set(checkpoint.check_folder("many", place / "many")) == set(
        checkpoint.check_folder("one", place / "one")
    )
