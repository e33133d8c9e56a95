"""Other libraries' quantised layers, for real where they are installed: alive, trained, saved, replayed."""

import copy
import json
import warnings

import pytest
import tiny
import torch
import transformers as hf
from test_cli import weights as file_bytes
from test_cli import zoft
from test_quant import wide
from torch import nn

from zoft import quant_other
from zoft.errors import UserError
from zoft.quant import Scales

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


KINDS = {
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
    (found,) = quant_other.attach(model)
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


def test_scales_that_are_dead_are_refused():
    class HQQLinear(nn.Linear):  # a layer that has made its weights once and for all
        meta = {"scale": torch.ones(64, 1)}

        def set_backend(self, backend):
            pass

    pytest.importorskip("hqq")
    layer = HQQLinear(256, 64)
    HQQLinear.__module__ = "hqq.core.quantize"
    with pytest.raises(UserError, match="does not follow its scales"):
        list(quant_other.attach(nn.Sequential(layer)))


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
