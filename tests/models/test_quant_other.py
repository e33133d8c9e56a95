"""Other libraries' quantised layers, for real where they are installed: alive, trained, saved, replayed."""

import copy
import json
import warnings

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from test_cli import weights as file_bytes
from test_cli import zoft
from test_quant import wide
from test_trainer import build
from torch import nn

from zoft.errors import UserError
from zoft.models import load
from zoft.models.quant import other_libraries
from zoft.models.quant.linear import Scales
from zoft.noise import noise
from zoft.objectives.losses import losses

warnings.filterwarnings("ignore", module="bitsandbytes")


def plain(outs=64, ins=256):
    torch.manual_seed(0)
    return nn.Linear(ins, outs)


def bnb4(kind="nf4", nested=False):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(256, 64, quant_type=kind, compress_statistics=nested)
    layer.load_state_dict(plain().state_dict())
    return layer.to("cpu").eval()


def bnb8():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(256, 64, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict(plain().state_dict())
    return layer.to("cpu").eval()


def hqq(axis=1, dtype=torch.float32):
    pytest.importorskip("hqq")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    how = BaseQuantizeConfig(nbits=4, group_size=64, axis=axis)
    return HQQLinear(plain(), how, compute_dtype=dtype, device="cpu")


def gptq(linear=None):
    """gptqmodel's layer of a matrix in 4 bits and groups of 64, packed here from the format's facts."""
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    linear = linear or plain()
    outs, ins = linear.weight.shape
    w = linear.weight.detach().T.reshape(-1, 64, outs)  # [groups, group, out]
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    scales = ((high - low) / 15).half()  # [groups, out]
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = (w / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15).reshape(ins, outs)
    groups = torch.arange(ins) // 64
    layer = TorchLinear(
        bits=4, group_size=64, sym=False, desc_act=False, in_features=ins, out_features=outs,
        bias=linear.bias is not None,
    )  # fmt: skip

    def packed(values):  # eight numbers in an int32, the first one lowest, along dim 0
        words = sum(values[k::8].long() << 4 * k for k in range(8))
        return torch.where(words >= 2**31, words - 2**32, words).int()

    layer.qweight.copy_(packed(codes))
    layer.qzeros.copy_(packed(zeros.T).T)
    layer.scales.copy_(scales)
    layer.g_idx.copy_(groups)
    if linear.bias is not None:
        layer.bias.copy_(linear.bias)
    layer.qzero_format(2)
    layer.post_init()
    return layer.eval()


KINDS = {
    "gptqmodel": gptq,
    "nf4": bnb4, "nf4-nested": lambda: bnb4(nested=True), "fp4": lambda: bnb4("fp4"), "int8": bnb8,
    "hqq": hqq, "hqq-0": lambda: hqq(0), "hqq-bf16": lambda: hqq(1, torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_outputs_follow_scales(kind):
    model = nn.Sequential(KINDS[kind]())
    dtype = torch.bfloat16 if "bf16" in kind else torch.float32
    x = torch.randn(3, 256).to(dtype)
    linear = plain()
    (found,) = other_libraries.attach_scales(model)
    name, scales = found
    assert name == "0.scales" and isinstance(scales, Scales) and scales.dtype == torch.float32
    assert dict(model.named_parameters())[name] is scales
    before = model(x).float()
    assert float((before - linear(x.float())).abs().max()) < 0.3
    twin = copy.deepcopy(model)
    bias = linear.bias
    scales.data *= 2
    assert torch.allclose(model(x).float() - bias, 2 * (before - bias), rtol=0.05, atol=0.05)
    assert torch.equal(twin(x).float(), before)  # a copy has scales of its own
    scales.data /= 2
    assert torch.equal(model(x).float(), before)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_dequantised_layers_are_what_they_compute(kind):
    """Rows of the matrix one at a time, in the layer's own products, before and after its scales are attached."""
    model = nn.Sequential(KINDS[kind]())
    model.config = hf.LlamaConfig()
    dtype = torch.bfloat16 if "bf16" in kind else torch.float32
    x = torch.randn(3, 256).to(dtype)
    room = {"int8": 0.05, "hqq-bf16": 0.05}.get(kind, 1e-4)  # int8 rounds its inputs to 8 bits, too
    other_libraries.keep_other_layers(model)
    for attached in (False, True):
        if attached:
            ((_, scales),) = other_libraries.attach_scales(model)
            scales.data *= 1.25
        before, own = model(x).float(), model[0]
        with other_libraries.plain_form(model):
            assert type(model[0]) is nn.Linear and model[0].weight.shape == (64, 256)
            assert torch.allclose(model(x.float()), before, atol=room, rtol=room)
        assert model[0] is own and torch.equal(model(x).float(), before)
    other_libraries.dequantise_other_layers(model)
    assert type(model[0]) is nn.Linear and torch.allclose(model(x.float()), before, atol=room, rtol=room)


def test_scales_that_are_dead_are_refused():
    class HQQLinear(nn.Linear):  # a layer that has made its weights once and for all
        meta = {"scale": torch.ones(64, 1)}

        def set_backend(self, backend):
            pass

    pytest.importorskip("hqq")
    layer = HQQLinear(256, 64)
    HQQLinear.__module__ = "hqq.core.quantize"
    with pytest.raises(UserError, match="does not follow its scales"):
        list(other_libraries.attach_scales(nn.Sequential(layer)))


def test_a_kernel_of_gptqmodel_that_repacks_is_refused():
    layer = gptq()
    type(layer).__name__, name = "MarlinLinear", type(layer).__name__
    try:
        with pytest.raises(UserError, match=r"0 \(MarlinLinear\) has packed its scales .* torch or triton"):
            list(other_libraries.attach_scales(nn.Sequential(layer)))
    finally:
        type(layer).__name__ = name


def test_steps_on_a_model_of_gptqmodel_are_those_on_plain_matrices(tmp_path):
    """A plain model is given W = Δ·(c − zero), the codes found from what the layers were; its losses, its slopes."""
    model = wide("llama")
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and m is not model.lm_head]
    twin, parts = copy.deepcopy(model), {}
    for n in names:
        layer = gptq(model.get_submodule(n))
        model.set_submodule(n, layer)
        w, s = layer.dequantize_weight().float().T, layer.scales.float().T.repeat_interleave(64, 1)
        parts[n] = (w / s).round()  # [out, in]
    assert len(dict(other_libraries.attach_scales(model))) == len(names) == 7
    trainer = build(tmp_path, model, train="scales", eps=1e-3, lr=3e-4, clip=3.0, steps=5)
    for step in range(5):
        ours, found = {t.name: t for t in trainer.axis.trained}, []
        trainer.axis.flush()
        for s in (1e-3, -1e-3):
            for n in names:
                t = ours[f"{n}.scales"]
                z = noise.direction(t.stored.shape, t.id, seed=7, step=step, direction=0, noise="gaussian")
                moved = (t.stored + s * z).T.repeat_interleave(64, 1)
                twin.get_submodule(n).weight.data = moved * parts[n]
            with torch.no_grad():
                sums, counts = losses(twin, trainer.batches(step)[0])
            found.append(float(sums.sum() / counts.sum()))
        trainer.step()
        np.testing.assert_allclose(trainer.ledger.records[-1].losses, found, rtol=1e-5)
    assert len({r.losses for r in trainer.ledger.records}) == 5


def test_a_layer_of_gptqmodel_is_saved_with_the_scales_it_has():
    model = nn.Sequential(gptq())
    names = set(model.state_dict())
    ((_, scales),) = other_libraries.attach_scales(model)
    scales.data *= 1.5
    with other_libraries.own_form(model):
        found = model.state_dict()
        assert (
            set(found) == names and "scales" in model[0]._buffers and torch.equal(found["0.scales"], scales)
        )
    assert model[0].scales is scales and "scales" not in model[0]._buffers


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_on_a_model_of_bitsandbytes(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    how = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "int8": {"load_in_8bit": True},
    }[kind]
    wide("llama").save_pretrained(tmp_path / "plain")
    model = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain",
        quantization_config=hf.BitsAndBytesConfig(**how),
        dtype=torch.float32,
        device_map="cpu",
    )
    model.save_pretrained(tmp_path / "q")
    tiny.tokenizer().save_pretrained(tmp_path / "q")
    settings = "recipe: qzo\ntrain: scales\ndevice: cpu\nsteps: 6\nbatch_size: 4\nlr: 1e-3\nmax_length: 32\nthreads: 1\n"
    tiny.place(tmp_path, settings)
    done = zoft("train", "--config", "mine.yaml", "model=q", "output_dir=run", cwd=tmp_path)
    assert done.returncode == 0 and "7 quantised layers follow their scales" in done.stderr, done.stderr
    done = zoft("replay", "run", "--out", "again", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert file_bytes(tmp_path / "again") == file_bytes(tmp_path / "run" / "model")
    assert file_bytes(tmp_path / "again") != file_bytes(tmp_path / "q")
    done = zoft("eval", "run", "--json", cwd=tmp_path)
    after = json.loads((tmp_path / "run" / "result.json").read_text())["after"]
    # The run had its scales in fp32, and so has what it saved.
    assert json.loads(done.stdout)["loss"] == pytest.approx(after["loss"], rel=1e-5)
    keys = ["model=q", "eps_mode=relative", "output_dir=other"]
    done = zoft("train", "--config", "mine.yaml", *keys, cwd=tmp_path)
    assert done.returncode == 2 and "eps_mode=relative" in done.stderr
    done = zoft("estimate", "--config", "mine.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "was quantised by bitsandbytes" in done.stderr
    # Plain weights, by export and by the run itself, and a run beside layers that stand still.
    room = {"nf4": 1e-5, "int8": 0.02}[kind]  # int8 layers round what comes in to 8 bits, plain ones do not
    done = zoft("export", "run", "--merge", "--out", "plain-fp32", "--dtype", "fp32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "quantization_config" not in json.loads((tmp_path / "plain-fp32" / "config.json").read_text())
    opened = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain-fp32")
    own = load.load_model(str(tmp_path / "run" / "model"))[0]
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        got, want = opened(input_ids=ids).logits, own(input_ids=ids).logits.float()
    assert all(type(m) is nn.Linear for n, m in opened.named_modules() if n.endswith("proj"))
    assert float((got - want).abs().max()) < max(room, 0.01) * float(want.abs().max())
    for words in (["save_dequantised=true"], ["recipe=mezo", "train=norms"], ["recipe=mezo", "train=scales"]):
        name = words[-1].replace("=", "-")
        done = zoft("train", "--config", "mine.yaml", *words, f"output_dir={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        said = json.loads((tmp_path / name / "model" / "config.json").read_text())
        assert ("quantization_config" in said) == ("dequantised" not in name)
        done = zoft("eval", name, "--json", cwd=tmp_path)
        after = json.loads((tmp_path / name / "result.json").read_text())["after"]
        assert json.loads(done.stdout)["loss"] == pytest.approx(
            after["loss"], rel=room if "deq" in name else 1e-5
        ), name
