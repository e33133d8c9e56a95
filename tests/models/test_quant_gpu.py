"""The Triton kernels of quantised layers against the CPU's, which test_quant.py holds against NumPy.

On a machine without a GPU the same comparisons run in Triton's interpreter, and the kernels are compiled to PTX.
"""

import re

import pytest
import tiny
import torch
from test_noise_gpu import run_python, without_gpu
from test_quant import SHAPES, layer
from test_trainer import examples, same_bits, weights

from zoft.models.quant import cpu, linear

# These hold groups of 32, 64 and 128, which the fused product takes.
SHAPES = [*SHAPES, ((70, 256), 128), ((33, 128), 64)]


def agree(device, dtypes, shapes=SHAPES):
    """Both kernels, at one and two probes, with and without zero points, logarithms and a bias."""
    from zoft.models.quant import triton as quant_triton

    for shape, group in shapes:
        for bits, zero_points, log in (
            (4, True, False),
            (4, False, True),
            (8, True, True),
            (8, False, False),
        ):
            made, _ = layer(shape, bits, group, zero_points)
            for probes in (1, 2):
                scales = torch.stack([made.scales.data * (1.0 + 0.1 * p) for p in range(probes)])
                want = torch.empty(probes, *shape)
                cpu.dequantise(made, scales, want)
                on = made.to(device)
                held = (scales.log() if log else scales).to(device)
                for dtype in dtypes:
                    out = torch.full((probes, *shape), 7.0, dtype=dtype, device=device)
                    quant_triton.dequantise(on, held, out, log)
                    step = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0) + (
                        3e-6 if log else 0
                    )
                    case = (shape, group, bits, zero_points, log, probes, dtype)
                    assert ((out.cpu().float() - want).abs() <= step * want.abs() + 1e-7).all(), case
                    if group in (32, 64, 128) and made.group == group:
                        _product_agrees(quant_triton, on, held, want, dtype, log, case)
                made = on.cpu()


def _product_agrees(quant_triton, on, held, want, dtype, log, case):
    outs, ins = want.shape[1:]
    for rows in (3, 40):
        x = torch.randn(len(want), rows, ins).to(dtype)
        for bias in (None, torch.randn(outs), torch.randn(len(want), outs)):
            y = torch.full((len(want), rows, outs), 9.0, dtype=dtype, device=on.codes.device)
            there = None if bias is None else bias.to(y.device)
            quant_triton.product(on, x.to(y.device), held, there, y, log)
            right = torch.einsum("pni,poi->pno", x.float(), want)
            if bias is not None:
                right = right + (bias if bias.ndim == 1 else bias[:, None])
            tolerance = 1e-5 if dtype == torch.float32 else 0.02
            assert torch.allclose(y.cpu().float(), right, rtol=tolerance, atol=tolerance), (case, rows)


@without_gpu
def test_interpreted():
    # The interpreter does not round to bf16: it truncates.
    code = "t.agree('cpu', [torch.float32], [((20, 160), 64), ((9, 17), 128)])"
    run_python(f"import torch, test_quant_gpu as t; {code}", TRITON_INTERPRET="1", PYTHONWARNINGS="ignore")


@without_gpu
@pytest.mark.slow
def test_interpreted_in_full():
    code = "t.agree('cpu', [torch.float32, torch.float16])"
    run_python(f"import torch, test_quant_gpu as t; {code}", TRITON_INTERPRET="1", PYTHONWARNINGS="ignore")


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from zoft import quant_triton as q

def ptx(kernel, types, constants, **options):
    names = kernel.arg_names
    signature = {n: types.get(n, "constexpr") for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in types if types[n][0] == "*" or n in ("width", "size", "outs")}
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

for bits, group in ((4, 128), (8, 64)):
    held = group * bits // 8
    types = dict(codes="*u8", scales="*fp32", zeros="*i16", out="*bf16", count="i32", groups="i32", width="i32", size="i32")
    fixed = dict(BITS=bits, GROUP=group, HELD=held, WHOLE=True, HAS_ZEROS=True, LOG=False, PROBES=2, GROUPS=4096 // group, BLOCK=held)
    print(ptx(q._dequantise, types, fixed, num_warps=4, enable_fp_fusion=False))
    types = dict(x="*bf16", codes="*u8", scales="*fp32", zeros="*i16", bias="*bf16", y="*bf16", rows="i32", width="i32", outs="i32", groups="i32")
    fixed = dict(BITS=bits, GROUP=group, HELD=held, HAS_ZEROS=True, HAS_BIAS=True, BIASES=False, LOG=False, PROBES=2, ROWS=64, OUTS=64)
    print(ptx(q._product, types, fixed, num_warps=4, num_stages=3))
"""


@without_gpu
@pytest.mark.slow
def test_compiles_for_gpus(tmp_path):
    """Every access of the pass over the codes is as wide as the hardware has it; products run on tensor cores."""
    modules = run_python(COMPILE, TRITON_CACHE_DIR=str(tmp_path)).split(".version")[1:]
    assert len(modules) == 4
    for dequantise, product in (modules[:2], modules[2:]):
        stores = re.findall(r"st\.global\S*", dequantise)
        assert stores and all("v4" in s for s in stores)
        assert "wgmma.mma_async" in product and "st.local" not in product


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, group", [*SHAPES, ((640, 1280), 128)])
def test_on_a_gpu(shape, group, dtype):
    agree("cuda", [dtype], [(shape, group)])


@pytest.mark.gpu
@pytest.mark.parametrize("zero_points", [False, True])
def test_a_gpu_finds_the_codes_of_the_cpu(zero_points):
    w = torch.randn(300, 1000) * 0.02
    for bits in (4, 8):
        here, there = (
            linear.quantise(w, bits, 64, zero_points),
            linear.quantise(w.cuda(), bits, 64, zero_points),
        )
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there) if a is not None)


def quantised(make, log=False, bits=4):
    def made():
        model = make()
        linear.quantise_model(model, bits=bits, group=32, zero_points=True)
        linear.set_log(model, log)
        return model

    return made


@pytest.mark.gpu
@pytest.mark.parametrize("fused_rows", [0, 64])
@pytest.mark.parametrize(
    "make, log, bits", [(tiny.llama, False, 4), (tiny.opt, True, 8), (tiny.gpt2, False, 4)]
)
def test_captured_eager_and_host_fed_steps_are_one_run(tmp_path, monkeypatch, fused_rows, make, log, bits):
    import test_device_gpu

    monkeypatch.setattr(linear, "FUSED_ROWS", fused_rows)
    runs = {}
    for how in ("captured", "eager", "host"):
        trainer = test_device_gpu.build(
            tmp_path / how, quantised(make, log, bits), how, data=examples(), lr=1e-4, weight_decay=0.1
        )
        scales = [t for t in trainer.axis.trained if t.name.endswith("scales")]
        assert scales and all(t.stored.dtype == torch.float32 for t in scales)
        before = weights(trainer.model)
        trainer.run()
        runs[how] = (weights(trainer.model), (tmp_path / how).read_bytes())
        assert not same_bits(before, runs[how][0])
        if how == "captured":
            assert not trainer.capture and any(s.graph for s in trainer.shapes.values())
    for how in ("eager", "host"):
        assert runs["captured"][1] == runs[how][1] and same_bits(runs["captured"][0], runs[how][0]), how
