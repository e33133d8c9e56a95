"""Drawn files of models against readers of others: the same content, or one line that refuses them; never anything else."""

import json
import os
import struct
import time

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from zoft.errors import UserError
from zoft.models.adapters.attach import load_adapter
from zoft.models.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter, read_header
from zoft.models.gguf import read_gguf
from zoft.models.load import load_model

CASES = int(os.environ.get("FUZZ_CASES", "600"))
checks = [
    HealthCheck.function_scoped_fixture,
    HealthCheck.too_slow,
    HealthCheck.filter_too_much,
    HealthCheck.data_too_large,
]


def drawn(share):
    """Settings of a test of so many cases for each that a fast one has."""
    return settings(
        max_examples=max(1, int(CASES * share)),
        derandomize=True,
        deadline=10_000,
        database=None,
        suppress_health_check=checks,
    )


pytestmark = pytest.mark.slow

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=10)
numbers = (
    st.integers(-3, 40)
    | st.sampled_from([1 << 20, 1 << 31, 1 << 62, 1 << 63, 1 << 64, -(1 << 63), 10**30])
    | st.floats()
)
scalars = (
    st.none()
    | st.booleans()
    | numbers
    | text
    | st.sampled_from(["F32", "BF16", "I8", "float32", "all-linear", "q_proj", "("])
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(text, v, max_size=3), max_leaves=8
)


def attempt(act):
    """(what act gives, "") or (None, the line that refuses); nothing else may come of it, and not later than in 10 s."""
    began = time.monotonic()
    try:
        return act(), ""
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, error
        return None, str(error)
    finally:
        assert time.monotonic() - began < 10


# ---- safetensors ---------------------------------------------------------------------------------------------------

entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "U8", "F8_E4M3", "F4", "X"]) | scalars,
        "shape": st.lists(st.integers(0, 4), max_size=3) | st.lists(numbers, max_size=4) | values,
        "data_offsets": st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted) | values,
    }
)
headers = st.dictionaries(text | st.just("a"), entries | values, max_size=4)


@st.composite
def sound(draw):
    """A header that fits its data, of tensors side by side."""
    found, at = {}, 0
    for name in draw(st.lists(text.filter(lambda t: t != "__metadata__"), unique=True, max_size=4)):
        dtype, size = draw(st.sampled_from([("F32", 4), ("F16", 2), ("I64", 8), ("U8", 1)]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        n = size
        for k in shape:
            n *= k
        found[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + n]}
        at += n
    if draw(st.booleans()):
        found["__metadata__"] = {"format": "pt"}
    return found, at


@drawn(1.5)
@given(
    sound() | st.tuples(headers, st.integers(0, 60)),
    st.binary(max_size=3),
    st.integers(-2, 2) | st.integers(0, 1 << 63),
    st.booleans(),
)
def test_safetensors(tmp_path, header, tail, off, spoil):
    found, size = header
    head = json.dumps(found).encode()
    length = max(0, min(len(head) + off, (1 << 64) - 1)) if spoil else len(head)
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", length) + head + b"\1" * size + (tail if spoil else b""))
    held, said = attempt(lambda: read_header("m", path))
    if held is None:
        assert path.name in said
        return
    try:
        with safe_open(path, "pt") as file:
            theirs = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
    except SafetensorError:  # it refuses more; what reads the tensors says so
        return
    assert {n: tuple(e["shape"]) for n, e in held.items()} == theirs


# ---- GGUF ----------------------------------------------------------------------------------------------------------

CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def encoded(kind, value):
    if kind == 8:
        data = value.encode()
        return struct.pack("<Q", len(data)) + data
    return struct.pack("<" + CODES[kind], value)


@st.composite
def ggufs(draw):
    """(bytes of a header, its fields): sound."""
    fields, data = {}, b""
    for key in draw(st.lists(text | st.just("general.alignment"), unique=True, max_size=4)):
        kind = draw(st.sampled_from([0, 3, 4, 7, 8, 10, 12]))
        one = {8: text, 7: st.booleans(), 12: st.floats(allow_nan=False)}.get(kind, st.integers(0, 100))
        if draw(st.booleans()):
            items = draw(st.lists(one, max_size=5))
            body = struct.pack("<IIQ", 9, kind, len(items)) + b"".join(encoded(kind, x) for x in items)
            fields[key] = items
        else:
            fields[key] = draw(one)
            body = struct.pack("<I", kind) + encoded(kind, fields[key])
        data += encoded(8, key) + body
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, len(fields)) + data + b"\0" * 64, fields


@drawn(1)
@given(ggufs())
def test_gguf_is_read_as_it_was_written(tmp_path, made):
    data, fields = made
    (tmp_path / "m.gguf").write_bytes(data)
    found, said = attempt(lambda: read_gguf(tmp_path / "m.gguf"))
    align = fields.get("general.alignment", 32)
    if isinstance(align, bool) or not isinstance(align, int) or not 0 < align <= 1 << 20:
        assert found is None and "general.alignment" in said
    else:
        assert found.fields == fields


@drawn(1.5)
@given(
    ggufs(), st.lists(st.tuples(st.integers(0, 200), st.sampled_from([0, 1, 7, 9, 127, 128, 255])), min_size=1, max_size=4),
    st.integers(0, 60),
)  # fmt: skip
def test_gguf_with_other_bytes(tmp_path, made, changes, cut):
    data = bytearray(made[0])
    for at, byte in changes:
        data[at % len(data)] = byte
    (tmp_path / "m.gguf").write_bytes(bytes(data[: len(data) - cut]))
    _, said = attempt(lambda: read_gguf(tmp_path / "m.gguf"))
    assert not said or "m.gguf" in said


# ---- config.json, adapter_config.json ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("fuzz") / "m"
    tiny.save(place)
    return place


KEYS = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "rms_norm_eps", "hidden_act",
        "model_type", "architectures", "tie_word_embeddings", "max_position_embeddings", "rope_parameters", "dtype", "head_dim",
        "attention_bias", "pad_token_id", "eos_token_id", "transformers_weights", "auto_map", "quantization_config",
        "attn_implementation", "num_labels", "id2label", "intermediate_size", "initializer_range", "use_cache"]  # fmt: skip


@drawn(0.5)
@given(st.dictionaries(st.sampled_from(KEYS), values, min_size=1, max_size=2))
def test_config(folder, changes):
    from transformers import AutoModelForCausalLM

    path = folder / "config.json"
    whole = path.read_bytes()
    path.write_text(json.dumps(json.loads(whole) | changes))
    try:
        found, said = attempt(lambda: load_model(str(folder)))
        if found is None:
            assert said.startswith("model=")
            return
        ids = torch.arange(8).view(1, 8)
        again = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()
        try:
            own = again(input_ids=ids).logits
        except Exception:  # a config that no forward runs with: what the model does is not the reader's
            return
        assert torch.equal(found[0](input_ids=ids).logits, own) or not own.isfinite().all()
    finally:
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def adapter(folder):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        load_model(str(folder))[0], LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
    )
    model.save_pretrained(folder.parent / "a")
    return folder.parent / "a"


LORA = ["r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_to_transform",
        "layers_pattern", "use_rslora", "lora_dropout", "fan_in_fan_out", "peft_type", "task_type", "bias", "modules_to_save",
        "use_dora", "init_lora_weights", "base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "x"]  # fmt: skip
patterns = st.sampled_from(
    [".*q_proj", "(.*)*x", "(a|aa)+$", "[", "q_proj|v_proj", "^", "(?:self_attn).*", "(?P<a>.)(?P=a)"]
)


@drawn(1)
@given(st.dictionaries(st.sampled_from(LORA), values | patterns, min_size=1, max_size=2))
def test_adapter_config(folder, adapter, changes):
    from peft import PeftModel

    from zoft.models.adapters import attach

    attach.PATTERN_SECONDS = 2.0  # a case has 10 s in all

    path = adapter / ADAPTER_CONFIG
    whole = path.read_bytes()
    path.write_text(json.dumps(json.loads(whole) | changes))
    try:
        _, said = attempt(lambda: check_adapter("a", adapter))
        if said:
            assert said.startswith("adapter=a: ")
            return
        made, said = attempt(lambda: load_adapter(load_model(str(folder))[0], adapter))
        if made is None:
            return
        ids = torch.arange(8).view(1, 8)
        theirs = PeftModel.from_pretrained(load_model(str(folder))[0], str(adapter)).eval()
        assert torch.equal(made(input_ids=ids).logits, theirs(input_ids=ids).logits)
    finally:
        path.write_bytes(whole)


@drawn(0.5)
@given(st.data())
def test_adapter_tensors(folder, adapter, data):
    path = adapter / ADAPTER_WEIGHTS
    whole = path.read_bytes()
    held = load_file(path)
    name = data.draw(st.sampled_from(sorted(held)))
    change = data.draw(st.sampled_from(["nan", "inf", "shape", "gone", "more", "none", "dtype", "name"]))
    t = held[name]
    if change in ("nan", "inf"):
        t.view(-1)[data.draw(st.integers(0, t.numel() - 1))] = float(change)
    elif change == "shape":
        held[name] = t[:, :-1].contiguous()
    elif change == "dtype":
        held[name] = t.to(data.draw(st.sampled_from([torch.float16, torch.float64, torch.int32])))
    elif change == "more":
        held[name + ".x"] = t.clone()
    elif change in ("gone", "name"):
        held.pop(name)
        if change == "name":
            held[name.replace("lora_", "lore_")] = t
    save_file(held, path)
    try:
        made, said = attempt(lambda: load_adapter(load_model(str(folder))[0], adapter))
        assert (made is None) == (change not in ("none", "dtype")), (change, said)
        if change in ("nan", "inf"):
            assert "lora_" in said and "NaN or infinity" in said
    finally:
        path.write_bytes(whole)
