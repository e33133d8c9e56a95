"""Files of other tools: what is dropped is said, what is damaged is refused by name, what was not there is not added."""

import json
import struct
import time

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification

from zoft.errors import UserError
from zoft.models.checkpoint import check_adapter, check_folder
from zoft.models.gguf import read_gguf
from zoft.models.load import load_model
from zoft.models.saving import save_model

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    tiny.save(tmp_path / "m")
    return tmp_path / "m"


def change(folder, make):
    file = folder / "model.safetensors"
    save_file({n: t.contiguous() for n, t in make(load_file(file)).items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name", ["mtp.layers.0.proj.weight", "v_head.summary.weight", "model.layers.9.x.weight"]
)
def test_a_tensor_that_no_one_uses_is_named(folder, capsys, name):
    change(folder, lambda s: s | {name: torch.ones(2, 2)})
    load_model(str(folder))
    assert capsys.readouterr().err == f"model={folder}: 1 tensor is neither used nor saved: {name}\n"


def test_a_name_that_the_class_hides_is_named_too(folder, capsys, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp.*"])
    change(
        folder,
        lambda s: (
            s
            | {
                "mtp.proj.weight": torch.ones(2),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
            }
        ),
    )
    load_model(str(folder))
    assert "1 tensor is neither used nor saved: mtp.proj.weight" in capsys.readouterr().err


def test_nothing_is_said_of_a_whole_model(folder, capsys):
    load_model(str(folder))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base.module."])
def test_a_prefix_is_named(folder, prefix):
    change(folder, lambda s: {prefix + n: t for n, t in s.items()})
    with pytest.raises(UserError, match=rf"its tensors are named {prefix}…"):
        load_model(str(folder))


def test_a_tied_classifier_is_no_language_model(folder):
    config = tiny.llama(tie=True).config
    tiny.build(LlamaForSequenceClassification, config).save_pretrained(folder)
    with pytest.raises(UserError, match="architectures=LlamaForSequenceClassification: it has a head"):
        load_model(str(folder))


def test_a_tokenizer_is_saved_as_the_base_had_it(folder, tmp_path):
    held = json.loads((folder / "tokenizer_config.json").read_text())
    held.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(held | {"eos_token": "</s>"}))
    base = AutoTokenizer.from_pretrained(folder)
    assert base.pad_token is None
    model, tokenizer = load_model(str(folder))
    assert tokenizer.pad_token is not None
    tokenizer(["a", "a b"], padding=True)
    save_model(model, tokenizer, tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.pad_token is None and again.eos_token == base.eos_token
    assert again("a b a").input_ids == base("a b a").input_ids
    assert tokenizer.pad_token is not None  # the run still has it


def test_a_tokenizer_with_a_pad_token_keeps_it(folder, tmp_path):
    model, tokenizer = load_model(str(folder))
    save_model(model, tokenizer, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == tokenizer.pad_token == "<pad>"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_a_non_finite_tensor_is_not_written(folder, tmp_path, value, dtype):
    model, tokenizer = load_model(str(folder))
    model.get_parameter(UP).data[1, 1] = value
    with pytest.raises(UserError, match=f"{UP} holds NaN or infinity"):
        save_model(model, tokenizer, tmp_path / "out", dtype=dtype)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


# ---- adapters ------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(folder):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_model(str(folder))[0], LoraConfig(task_type="CAUSAL_LM", r=2))
    model.save_pretrained(folder.parent / "a")
    return folder.parent / "a"


def settings(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BAD = [
    {"r": "x"}, {"r": 0}, {"r": -3}, {"r": 2.5}, {"r": True}, {"r": None}, {"r": 10**9}, {"lora_alpha": None},
    {"lora_alpha": "8"}, {"lora_alpha": float("nan")}, {"target_modules": 5}, {"target_modules": [1]}, {"target_modules": {"a": 1}},
    {"target_modules": "("}, {"exclude_modules": "*"}, {"rank_pattern": []}, {"rank_pattern": {"q_proj": "x"}},
    {"rank_pattern": {"(": 2}}, {"alpha_pattern": {"q_proj": None}}, {"layers_to_transform": "a"}, {"layers_pattern": 3},
    {"lora_dropout": "no"}, {"use_rslora": "yes"}, {"init_lora_weights": 1}, {"rank_pattern": None}, {"alpha_pattern": None}, {"fan_in_fan_out": 3}, {"target_modules": "x" * 20000},
]  # fmt: skip


@pytest.mark.parametrize("changes", BAD, ids=lambda c: str(c)[:50])
def test_values_of_an_adapter_are_checked(adapter, changes):
    settings(adapter, **changes)
    with pytest.raises(UserError, match=f"adapter_config.json: {next(iter(changes))}"):
        check_adapter("a", adapter)


MORE = [{"megatron_config": "x", "megatron_core": "planted"}, {"use_qalora": True}, {"arrow_config": {"a": 1}}, {"monteclora_config": {"a": 1}},
        {"alora_invocation_tokens": [1]}, {"use_dora": True}, {"bias": "all"}, {"of_a_later_peft": 1}]  # fmt: skip


@pytest.mark.parametrize("changes", MORE, ids=str)
def test_an_adapter_that_is_more_than_its_pairs_is_refused(folder, adapter, changes, tmp_path, monkeypatch):
    from zoft.models.adapters.attach import load_adapter

    (tmp_path / "planted.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')"
    )  # peft imports megatron_core
    monkeypatch.syspath_prepend(str(tmp_path))
    settings(adapter, **changes)
    model = load_model(str(folder))[0]
    for read in (lambda: check_adapter("a", adapter), lambda: load_adapter(model, adapter)):
        with pytest.raises(UserError, match=f"with {next(iter(changes))}; plain"):
            read()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["XLORA", "VERA", "CPT", 5, None, ["LORA"], {}])
def test_an_adapter_of_another_kind_is_refused(folder, adapter, kind):
    from zoft.models.adapters.attach import load_adapter

    settings(adapter, peft_type=kind)
    with pytest.raises(UserError, match="plain ones of LORA, PREFIX_TUNING, PROMPT_TUNING are read"):
        load_adapter(load_model(str(folder))[0], adapter)


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"num_virtual_tokens": 10**9}, "its prompt has 16,000,000,000 numbers, and its largest tensor 48"),
        ({"token_dim": 10**9}, "its prompt has 3,000,000,000 numbers"),
        ({"num_virtual_tokens": "3"}, 'num_virtual_tokens="3" is not a whole number'),
        ({"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "planted/elsewhere"}, "with tokenizer_name_or_path"),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, "with tokenizer_kwargs"),
        ({"prompt_tuning_init": "SAMPLE_VOCAB"}, "with prompt_tuning_init"),
    ],
)  # fmt: skip
def test_a_prompts_values_are_checked(folder, tmp_path, changes, part):
    from peft import PromptTuningConfig, get_peft_model

    from zoft.models.adapters.attach import load_adapter

    model = load_model(str(folder))[0]
    get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).save_pretrained(
        tmp_path / "a"
    )
    settings(tmp_path / "a", **changes)
    with pytest.raises(UserError, match=part):
        load_adapter(load_model(str(folder))[0], tmp_path / "a")


@pytest.mark.parametrize("changes", [{"r": 3}, {"r": 65_536}, {"rank_pattern": {"v_proj": 40_000}}])
def test_a_rank_without_tensors_is_refused_before_it_is_made(adapter, changes):
    settings(adapter, **changes)
    with pytest.raises(UserError, match="and its tensors have rank 2 at most"):
        check_adapter("a", adapter)


@pytest.mark.parametrize(
    "changes",
    [{"target_modules": r"(([a-z_.0-9]+)+)+!"}, {"rank_pattern": {r"(.|..|...)*!": 2}},
     {"exclude_modules": r"(.*)*(.*)*(.*)*(.*)*(.*)*!"}],
)  # fmt: skip
def test_a_pattern_is_bounded(folder, adapter, changes, monkeypatch):
    from zoft.models.adapters import attach

    monkeypatch.setattr(attach, "PATTERN_SECONDS", 0.5)
    settings(adapter, **changes)
    began = time.monotonic()
    with pytest.raises(UserError, match="its patterns take more than 0.5 s"):
        attach.load_adapter(load_model(str(folder))[0], adapter)
    assert time.monotonic() - began < 10


def test_a_pattern_as_others_write_it_is_taken(folder, adapter):
    from zoft.models.adapters.attach import load_adapter

    pattern = r"^(?!.*visual).*(?:layers|text).*(?:self_attn|mlp).*(?:q_proj|v_proj).*$"
    settings(adapter, target_modules=pattern)
    made = load_adapter(load_model(str(folder))[0], adapter)
    held = load_file(adapter / "adapter_model.safetensors")
    assert sum("lora_" in n for n, _ in made.named_parameters()) == len(held)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_adapter_is_refused_by_name(folder, adapter, value):
    from zoft.models.adapters.attach import load_adapter

    file = adapter / "adapter_model.safetensors"
    held = load_file(file)
    name = sorted(held)[0]
    held[name][0, 0] = value
    save_file(held, file)
    with pytest.raises(UserError, match="q_proj.lora_A.*holds NaN or infinity; the adapter is damaged"):
        load_adapter(load_model(str(folder))[0], adapter)


# ---- bounds --------------------------------------------------------------------------------------------------------


def test_a_shape_of_many_factors_takes_no_time(folder):
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as held:
        assert UP in held.keys()  # noqa: SIM118
    data = file.read_bytes()
    n = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + n])
    header[UP]["shape"] = [1 << 62] * 20_000
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n :])
    began = time.monotonic()
    with pytest.raises(UserError, match=f"'{UP}' is described wrongly"):
        check_folder("m", folder)
    assert time.monotonic() - began < 1


def gguf(path, *fields, version=3):
    """Write a GGUF header of (key, its type and value as bytes) and no tensor."""
    head = b"GGUF" + struct.pack("<IQQ", version, 0, len(fields))
    for key, value in fields:
        head += struct.pack("<Q", len(key)) + key.encode() + value
    path.write_bytes(head + b"\0" * 64)
    return path


def u32(n):
    return struct.pack("<II", 4, n)


def nested(depth):
    return struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 4, 0)


HEADERS = {
    "alignment 0": ([("general.alignment", u32(0))], "general.alignment='0'"),
    "alignment, text": ([("general.alignment", struct.pack("<IQ", 8, 1) + b"x")], "general.alignment='x'"),
    "alignment, a truth": ([("general.alignment", struct.pack("<I?", 7, True))], "general.alignment"),
    "alignment, a fraction": ([("general.alignment", struct.pack("<If", 6, 1.5))], "general.alignment"),
    "alignment, huge": ([("general.alignment", u32(2**31))], "general.alignment"),
    "arrays nested": ([("x", nested(3000))], "nested more than 4 deep"),
    "10^8 bytes": ([("x", struct.pack("<IIQ", 9, 0, 10**8))], "an array of 100,000,000 values"),
    "many arrays": ([(f"x{i}", struct.pack("<IIQ", 9, 0, 2_000_000) + b"\0" * 2_000_000) for i in range(3)], "5,000,000"),
    "2^31 blocks": ([("llama.block_count", u32(2**31))], "llama.block_count=2147483648, and it has 0 tensors"),
    "blocks, text": ([("qwen2.block_count", struct.pack("<IQ", 8, 1) + b"x")], "qwen2.block_count=x, and it has 0 tensors"),
    "a key twice": ([("x", u32(1)), ("x", u32(2))], "x is there twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_gguf_header_is_bounded(tmp_path, name):
    fields, part = HEADERS[name]
    began = time.monotonic()
    with pytest.raises(UserError, match="not a whole GGUF file") as told:
        read_gguf(gguf(tmp_path / "m.gguf", *fields))
    assert part in str(told.value) and str(told.value).isprintable()
    assert time.monotonic() - began < 2


def test_a_gguf_of_the_gguf_package_is_read(tmp_path):
    """An alignment of its own and an array in an array, as the format allows them."""
    package = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    made = package.GGUFWriter(path, "llama")
    made.add_custom_alignment(64)
    made.add_array("x", [1, 2, 3])
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.close()
    found = read_gguf(path).fields
    assert (found["general.alignment"], found["x"]) == (64, [1, 2, 3])


@pytest.mark.parametrize("layers", [1001, 10_000])
def test_layers_are_bounded(folder, layers):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": layers}))
    with pytest.raises(UserError, match=f"num_hidden_layers={layers}"):
        check_folder("m", folder)


def test_layers_without_tensors_are_refused_before_they_are_made(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1000}))
    began = time.monotonic()
    with pytest.raises(UserError, match="num_hidden_layers=1000"):
        check_folder("m", folder)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    "key, value", [("hidden_size", 1_600_000), ("intermediate_size", 100_000_000), ("vocab_size", 10_000_000), ("head_dim", 10_000_000)]
)  # fmt: skip
def test_a_model_is_no_larger_than_its_checkpoint(folder, key, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=r"describes a model of [\d,]+ numbers, and the checkpoint has 4,944"):
        load_model(str(folder))


def test_laying_a_model_out_draws_no_number(folder):
    before = torch.get_rng_state()
    load_model(str(folder))
    assert torch.equal(torch.get_rng_state(), before)


def rules(folder, **changes):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_a_tokenizer_that_lengthens_texts_without_bounds_is_refused(folder, part):
    one = {"type": "Replace", "pattern": {"Regex": "(.)"}, "content": "aaaaaaaaaa"}
    key = part + "s"
    rules(folder, **{part: {"type": "Sequence", key: [one] * 8}})
    with pytest.raises(
        UserError, match=rf"its tokenizer's {part} makes a text up to 2.14e\+08 times as long"
    ):
        load_model(str(folder))


def test_rules_of_honest_tokenizers_are_taken(folder):
    pairs = [
        ({"String": " "}, "▁"),
        ({"Regex": r"\s+"}, " "),
        ({"String": "``"}, '"'),
        ({"Regex": "n't"}, " not"),
    ]
    rules(folder, normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Prepend", "prepend": "▁"}]
          + [{"type": "Replace", "pattern": p, "content": c} for p, c in pairs]})  # fmt: skip
    load_model(str(folder))


@pytest.mark.parametrize("value", ["many", None, True, [5]])
def test_a_length_of_a_tokenizer_is_a_number(folder, value):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": value}))
    if value is None:  # transformers takes it as none given
        load_model(str(folder))
        return
    with pytest.raises(UserError, match="model_max_length=.* is no number"):
        load_model(str(folder))


def test_a_sparse_file_of_a_tokenizer_is_refused(folder):
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(50 << 30)
    with pytest.raises(UserError, match="tokenizer.json has more than 200,000,000 bytes"):
        check_folder("m", folder)


def test_complex_numbers_are_no_weights(folder):
    change(folder, lambda s: s | {UP: s[UP].to(torch.complex64)})
    with pytest.raises(UserError, match=f"tensor {UP} is C64 in the checkpoint"):
        load_model(str(folder))


@pytest.mark.parametrize("method", ["x", "", None, ["gptq"]])
def test_an_unknown_way_to_quantise_is_refused(folder, method):
    path = folder / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}})
    )
    with pytest.raises(UserError):
        load_model(str(folder))
