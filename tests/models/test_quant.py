"""Quantised layers: against NumPy done by hand, against plain layers, and through files."""

import copy
import json

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from safetensors.numpy import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from zoft.errors import UserError
from zoft.models import fingerprint, load, saving
from zoft.models.quant import linear as quant
from zoft.models.quant.linear import QuantLinear

# rows × columns, group: whole groups, a ragged last one, a row shorter than the group, odd widths
SHAPES = [((24, 64), 32), ((20, 160), 128), ((17, 100), 32), ((9, 17), 128), ((8, 31), 64), ((5, 1), 32)]


def matrix(shape, seed=0):
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)


def by_hand(w, bits, group, zero_points, clip=1.0):
    """Round to nearest in NumPy, a group at a time: (codes, scales, zeros, the matrix they stand for)."""
    top, half = 2**bits - 1, 2 ** (bits - 1)
    codes, back = np.zeros(w.shape, np.int64), np.zeros_like(w)
    scales, zeros = [], []
    for o in range(w.shape[0]):
        for start in range(0, w.shape[1], group):
            part = w[o, start : start + group]
            low, high = np.float32(min(part.min(), 0)), np.float32(max(part.max(), 0))
            if zero_points:
                s = np.float32(max((high - low) * np.float32(clip / top), 1e-7))
                z = np.clip(-low * np.float32(clip) / s, np.float32(0), np.float32(top))
                z = np.round(z * np.float32(128)) / np.float32(128)
            else:
                s = np.float32(max(max(high, -low) * np.float32(clip / (half - 1)), 1e-7))
                z = np.float32(half)
            c = np.clip(np.round(part / s + z), 0, top)
            codes[o, start : start + group] = c
            back[o, start : start + group] = s * (c - z).astype(np.float32)
            scales.append(s)
            zeros.append(z)
    return codes, np.array(scales).reshape(w.shape[0], -1), np.array(zeros).reshape(w.shape[0], -1), back


def layer(shape, bits=4, group=32, zero_points=False, bias=True, seed=0):
    linear = nn.Linear(shape[1], shape[0], bias=bias)
    linear.weight.data = torch.from_numpy(matrix(shape, seed))
    return quant.from_linear(linear, bits, group, zero_points), linear


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape, group", SHAPES)
def test_codes_and_back_as_by_hand(shape, group, bits, zero_points):
    w, own = matrix(shape), min(group, shape[1])
    codes, scales, zeros = quant.quantise(torch.from_numpy(w), bits, own, zero_points, clips=(1.0,))
    want, want_scales, want_zeros, back = by_hand(w, bits, own, zero_points)
    np.testing.assert_array_equal(scales.numpy(), want_scales)
    if zero_points:
        np.testing.assert_array_equal(zeros.numpy() / 128, want_zeros)
    flat = codes[..., :own].flatten(1)[:, : shape[1]]
    np.testing.assert_array_equal(flat.numpy(), want)
    packed = quant.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape[1] == codes[0].numel() * bits // 8
    assert torch.equal(quant.unpack(packed, bits, codes.shape[-1]), codes)
    made, _ = layer(shape, bits, group, zero_points)
    made.codes, made.scales.data, made.zeros = packed, scales, zeros
    assert made.group == own
    np.testing.assert_array_equal(made.weight.numpy(), back)
    half_way = np.abs(back - w) <= np.repeat(want_scales, own, 1)[:, : shape[1]] * 0.501
    clipped = (want == 0) | (want == 2**bits - 1)
    assert (half_way | clipped).all()


def test_one_byte_holds_two_columns_half_a_group_apart():
    codes = torch.arange(16).view(1, 2, 8)
    assert quant.pack(codes, 4).tolist() == [[0 + 16 * 4, 1 + 16 * 5, 2 + 16 * 6, 3 + 16 * 7, 8 + 16 * 12, 9 + 16 * 13, 10 + 16 * 14, 11 + 16 * 15]]  # fmt: skip


@pytest.mark.parametrize("zero_points", [False, True])
def test_the_clip_with_the_least_error_is_found(zero_points):
    w = matrix((16, 128))
    tried = [by_hand(w, 4, 64, zero_points, clip)[3] for clip in quant.CLIPS]
    error = np.stack([((b - w).astype(np.float64) ** 2).reshape(16, 2, 64).sum(-1) for b in tried])
    codes, scales, zeros = quant.quantise(torch.from_numpy(w), 4, 64, zero_points)
    zero = 8 if zeros is None else zeros.numpy()[..., None].astype(np.float32) / 128
    got = scales.numpy()[..., None] * (codes.numpy().astype(np.float32) - zero)
    mine = ((got.reshape(16, 128) - w).astype(np.float64) ** 2).reshape(16, 2, 64).sum(-1)
    np.testing.assert_allclose(mine, error.min(0), rtol=1e-6)
    assert error[0].sum() > 1.05 * mine.sum()  # and it pays


def test_zeros_and_great_numbers():
    w = torch.zeros(2, 64)
    w[1, 3] = 1e30
    for zero_points in (False, True):
        codes, scales, zeros = quant.quantise(w, 4, 32, zero_points)
        assert torch.isfinite(scales).all() and (scales >= quant.FLOOR).all()
        zero = 8.0 if zeros is None else zeros[..., None].float() / 128
        back = (scales[..., None] * (codes.float() - zero)).flatten(1)
        assert not back[0].any() and back[1, 3] == pytest.approx(1e30, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape, group", SHAPES)
def test_the_layer_is_the_linear_layer_of_its_weight(shape, group, dtype):
    for bits in (4, 8):
        made, _ = layer(shape, bits, group, zero_points=bits == 4)
        x = torch.randn(3, 2, shape[1]).to(dtype)
        made.bias.data = made.bias.data.to(dtype)
        want = nn.functional.linear(x.double(), made.weight.double(), made.bias.double())
        got = made(x)
        assert got.dtype == dtype and got.shape == want.shape
        assert float((got.double() - want).abs().max()) < (0.05 if dtype == torch.bfloat16 else 1e-5)


def test_probes_share_a_reading_of_the_codes():
    made, _ = layer((20, 96))
    scales = made.scales.detach() * torch.tensor([1.0, 0.9, -0.1])[:, None, None]
    for dtype in (torch.float32, torch.float64):
        both = quant.dequantise(made, scales.to(dtype), dtype)
        for p in range(3):
            assert torch.equal(both[p], quant.dequantise(made, scales[p : p + 1].to(dtype), dtype)[0])
        assert torch.allclose(both[1], both[0] * 0.9, rtol=1e-5)


def test_logarithms_stand_for_the_same_weights():
    model = tiny.llama()
    quant.quantise_model(model, bits=4, group=32)
    before = {n: m.weight for n, m in quant.quantised_layers(model).items()}
    quant.set_log(model, True)
    quant.set_log(model, True)
    for n, m in quant.quantised_layers(model).items():
        assert torch.allclose(m.weight, before[n], rtol=1e-5) and not torch.allclose(m.scales, m.scales.exp())
    quant.set_log(model, False)
    assert all(
        torch.allclose(m.weight, before[n], rtol=1e-5) for n, m in quant.quantised_layers(model).items()
    )


# ---- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_model_keeps_its_embeddings_and_head(name):
    model = tiny.MODELS[name]()
    plain = copy.deepcopy(model)
    line = quant.quantise_model(model, bits=8, group=32, zero_points=True)
    assert "rows of" in line and "shorter" in line
    ours = quant.quantised_layers(model)
    for n, m in plain.named_modules():
        if type(m) in (nn.Linear, Conv1D) and m is not plain.get_output_embeddings():
            assert torch.allclose(ours[n].weight, m.weight, atol=float(m.weight.abs().max()) / 100), n
        else:
            assert n not in ours
    ids = torch.randint(3, tiny.VOCAB, (2, 7))
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=0.1)
    assert quant.count_numbers(model) == sum(p.numel() for p in plain.parameters())
    with pytest.raises(UserError, match="quantised already"):
        quant.quantise_model(model, bits=4)


def test_the_head_when_asked_for_and_free():
    model = tiny.llama()
    quant.quantise_model(model, bits=4, group=32, head=True)
    assert isinstance(model.lm_head, QuantLinear)
    with pytest.raises(UserError, match="quantise_head"):
        quant.quantise_model(tiny.llama(tie=True), bits=4, group=32, head=True)


def test_a_model_on_meta_has_the_shapes():
    real, empty = tiny.llama(), None
    with torch.device("meta"):
        empty = hf.LlamaForCausalLM(real.config)
    for m in (real, empty):
        quant.quantise_model(m, bits=4, group=32, zero_points=True)
    shapes = [{n: (t.shape, t.dtype) for n, t in m.state_dict().items()} for m in (real, empty)]
    assert shapes[0] == shapes[1]
    assert empty(input_ids=torch.zeros(2, 5, dtype=torch.int64, device="meta")).logits.shape[:2] == (2, 5)


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "tied"])
def test_saved_and_loaded_again(name, bits, tmp_path):
    model = tiny.llama(tie=True) if name == "tied" else tiny.MODELS[name]()
    quant.quantise_model(model, bits=bits, group=32, zero_points=bits == 4)
    ids = torch.randint(3, tiny.VOCAB, (2, 7))
    want = model(input_ids=ids).logits
    saving.save_model(model, tiny.tokenizer(), tmp_path / "own")
    again, _ = load.load_model(str(tmp_path / "own"))
    assert torch.equal(again(input_ids=ids).logits, want)
    assert fingerprint.of_model(again) == fingerprint.of_model(model) and type(again) is type(model)
    saving.save_model(model, tiny.tokenizer(), tmp_path / "plain", dequantise=True)
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not quant.quantised_layers(plain)
    assert torch.allclose(plain(input_ids=ids).logits, want, atol=1e-5)
    saving.save_model(model, tiny.tokenizer(), tmp_path / "half", dtype=torch.bfloat16)
    half, _ = load.load_model(str(tmp_path / "half"))
    assert {m.scales.dtype for m in quant.quantised_layers(half).values()} == {torch.float32}
    assert half.checkpoint_dtype == half.dtype == torch.bfloat16
    for n, m in quant.quantised_layers(half).items():
        assert torch.equal(m.scales, quant.quantised_layers(model)[n].scales)


def gptq_folder(folder, model, *, bits, group, act_order=False, v2=False, old_config=False, seed=0):
    """A model's linear layers written as GPTQ has them, from the format's facts; returns their dequantised matrices.

    qweight [in·bits/32, out]: 32/bits consecutive inputs in one int32, lowest bits first; qzeros [G, out·bits/32]: the
    same along outputs, less one in version 1; scales fp16 [G, out]; g_idx [in]: each input's group.
    """
    rng, per, tensors, back = np.random.default_rng(seed), 32 // bits, {}, {}
    head = model.get_output_embeddings()

    def packed(values, axis):  # whole numbers along the axis into int32
        values = np.moveaxis(values.astype(np.uint64), axis, 0)
        words = np.zeros((values.shape[0] // per, *values.shape[1:]), np.uint64)
        for k in range(per):
            words |= values[k::per] << np.uint64(bits * k)
        return np.ascontiguousarray(np.moveaxis(words, 0, axis)).astype(np.uint32).view(np.int32)

    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not head:
            outs, ins = module.weight.shape
            size = ins if group == -1 else group
            groups = -(-ins // size)
            codes = rng.integers(0, 2**bits, (ins, outs))
            zeros = rng.integers(1 if not v2 else 0, 2**bits, (groups, outs))
            scales = rng.uniform(0.01, 0.05, (groups, outs)).astype(np.float16)
            index = np.arange(ins) // size
            if act_order:
                index = rng.permutation(index)
            stored = zeros if v2 else zeros - 1
            tensors |= {
                f"{name}.qweight": packed(codes, 0), f"{name}.qzeros": packed(stored, 1),
                f"{name}.scales": scales, f"{name}.g_idx": index.astype(np.int32),
            }  # fmt: skip
            back[name] = (scales.astype(np.float32)[index] * (codes - zeros[index]).astype(np.float32)).T
            if module.bias is not None:
                tensors[f"{name}.bias"] = module.bias.detach().numpy().astype(np.float16)
    linear = {n for n, m in model.named_modules() if type(m) is nn.Linear and m is not head}
    for key, value in model.state_dict().items():
        if key.rpartition(".")[0] not in linear:
            tensors[key] = value.numpy().astype(np.float16)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float16"}
    how = {"bits": bits, "group_size": group, "desc_act": act_order, "sym": False}
    how |= {"checkpoint_format": "gptq_v2"} if v2 else {}
    if old_config:
        (folder / "quantize_config.json").write_text(json.dumps(how))
    else:
        config["quantization_config"] = {"quant_method": "gptq", **how}
    (folder / "config.json").write_text(json.dumps(config))
    tiny.tokenizer().save_pretrained(folder)
    return back


@pytest.mark.parametrize("bits, group, act_order, v2, old_config", [
    (4, 32, False, False, False), (4, 32, True, False, True), (4, 32, True, True, False), (4, -1, False, True, False),
    (8, 64, True, False, False), (8, 32, False, True, True), (4, 128, False, False, False),
])  # fmt: skip
@pytest.mark.parametrize("make", ["llama", "opt"])
def test_a_gptq_checkpoint(make, bits, group, act_order, v2, old_config, tmp_path):
    model = wide(make)
    back = gptq_folder(
        tmp_path / "g", model, bits=bits, group=group, act_order=act_order, v2=v2, old_config=old_config
    )
    loaded, _ = load.load_model(str(tmp_path / "g"), dtype=torch.float32)
    found = quant.quantised_layers(loaded)
    assert found.keys() == back.keys() and loaded.checkpoint_dtype == torch.float16
    for name, m in found.items():
        np.testing.assert_allclose(m.weight.numpy(), back[name], rtol=1e-6)
        assert m.scales.dtype == torch.float32 and m.bits == bits
        assert (m.order is not None) == (act_order and m.scales.shape[1] > 1)
    plain = copy.deepcopy(model)
    for n, p in plain.named_parameters():
        name, _, own = n.rpartition(".")
        p.data = torch.from_numpy(back[name]) if own == "weight" and name in back else p.data.half().float()
    ids = torch.randint(3, tiny.VOCAB, (2, 7))
    with torch.no_grad():
        got, want = loaded(input_ids=ids).logits, plain(input_ids=ids).logits
    assert torch.allclose(got, want, atol=1e-3 * float(want.abs().max())), float((got - want).abs().max())
    saving.save_model(loaded, tiny.tokenizer(), tmp_path / "own")
    again, _ = load.load_model(str(tmp_path / "own"))
    assert torch.equal(again(input_ids=ids).logits, got)


def wide(make):
    """A tiny model whose rows are worth several groups."""
    if make == "opt":
        config = hf.OPTConfig(
            vocab_size=tiny.VOCAB, hidden_size=128, word_embed_proj_dim=128, ffn_dim=192, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=64, dropout=0.0, pad_token_id=0,
        )  # fmt: skip
        return tiny.build(hf.OPTForCausalLM, config)
    config = hf.LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return tiny.build(hf.LlamaForCausalLM, config)


@pytest.mark.parametrize("change, said", [
    ({"bits": 3}, "4 and 8 bits"), ({"checkpoint_format": "marlin"}, "marlin"), ({"group_size": 64}, "do not fit"),
    ({"dynamic": {"x": {}}}, "several ways"),
])  # fmt: skip
def test_a_gptq_checkpoint_that_cannot_be_read_is_one_line(change, said, tmp_path):
    gptq_folder(tmp_path / "g", wide("llama"), bits=4, group=32)
    path = tmp_path / "g" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=said) as error:
        load.load_model(str(tmp_path / "g"))
    assert "\n" not in str(error.value)
