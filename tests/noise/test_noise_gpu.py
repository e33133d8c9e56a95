"""The Triton backend of zoft.noise against the CPU's, which test_noise.py holds against the slow twin.

On a machine without a GPU the same comparisons run in Triton's interpreter, and the kernels are compiled to PTX.
"""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from zoft.noise import cpu, noise, spec
from zoft.noise.spec import GAUSSIAN, GAUSSIAN_BOUND_GPU, NOTHING, RADEMACHER, Mask, Update

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = (GAUSSIAN, RADEMACHER)
SEED, STEP, TID = 0x1234_5678_9ABC, 7, 0xDEADBEEF
UPDATES = (
    Update(STEP, SEED, (1e-3,)),
    Update(STEP + 1, SEED, (0.5,), decay=float(np.float32(0.97))),
    Update(STEP + 2, SEED, (-3e-4, 2e-4, 0.0), decay=float(np.float32(0.999))),
    Update(2**33, SEED, (), decay=0.5),
)
RESTORES = (  # in-place probing: there and back, with an update on the way, with a no-op, with nothing
    spec.move(SEED, STEP, 0, 0.01),
    Update(STEP, SEED, (3e-3,), restore=0.01),
    spec.move(SEED, STEP + 1, 2, -0.5),
    Update(STEP + 1, SEED, (1e-3, 0.0, -2e-3), 0.75, 0.5),
    Update(STEP + 2, SEED, (0.0, -0.0), restore=-0.125),
    Update(STEP + 3, SEED, (7.0,), NOTHING, -0.25),
    Update(STEP + 5, SEED, (), 0.5),
    spec.move(SEED, STEP + 6, 0, 0.125),
)
MASKS = (Mask(threshold=0.0625), Mask(seed=SEED, share=20000))
PROBES = ((0, 1e-3), (0, -1e-3), (1, 0.5), (1, 0.0), (1, -2.0), (0, 3.0))


def weights(n, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10 ** (torch.rand(n, generator=generator) * 8 - 7)
    x[1::17], x[2::19] = 0.0, -0.0
    return x.to(dtype)


def same_bits(a, b):
    """Equal bit for bit, any NaN for any NaN."""
    a, b = a.cpu().contiguous(), b.cpu().contiguous()
    assert a.dtype == b.dtype and a.shape == b.shape
    number = ~(a.isnan() & b.isnan())
    return torch.equal(a[number].view(torch.uint8), b[number].view(torch.uint8))


def agrees(a, b, kind, reach=0.0):
    """Rademacher: bit for bit. Gaussian: within its bound, so that a rare rounding may fall to the other side.

    reach: how far a number has been from where it ended, when it was rounded on the way."""
    if kind == RADEMACHER:
        return same_bits(a, b)
    a, b = a.cpu(), b.cpu()
    assert a.dtype == b.dtype and a.shape == b.shape
    # Multipliers and scales in this file are at most 3.
    step = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(a.dtype, 1e-6)
    off = (a.double() - b.double()).abs()
    far = float((off - 3 * step * (b.double().abs() + reach * (off > 0))).max()) if len(off) else 0.0
    equal = float((a == b).double().mean()) if a.dtype.itemsize == 2 and a.numel() > 500 else 1.0
    assert far <= 5 * GAUSSIAN_BOUND_GPU and equal > 0.95, (far, equal, a.dtype)
    return True


def agree(device, sizes, dtypes, out_dtypes, kinds=KINDS, more=True):
    """Directions, updates, probes and gathers of both backends; more: restores and masks, too."""
    from zoft.noise import triton

    for n in sizes:
        for kind in kinds:
            there, here = torch.empty(n, device=device), torch.empty(n)
            triton.direction(there, TID, SEED, STEP, 3, kind)
            cpu.direction(here, TID, SEED, STEP, 3, kind)
            assert agrees(there, here, kind), (n, kind)
            for dtype in dtypes:
                for out_dtype in out_dtypes:
                    _agree_on_a_pass(triton, device, n, kind, dtype, out_dtype)
                    _agree_on_rows(triton, device, n, kind, dtype, out_dtype)
                if dtype in out_dtypes:
                    _agree_in_place(triton, device, n, kind, dtype)
            for dtype in dtypes if more else ():
                _agree_on_restores(triton, device, n, kind, dtype)
                for mask in MASKS:
                    _agree_on_masks(triton, device, n, kind, dtype, out_dtypes[0], mask)
            _agree_on_a_part(triton, device, n, kind, dtypes[0], out_dtypes[0])


def _agree_on_a_pass(triton, device, n, kind, dtype, out_dtype):
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for updates, momentum in (((), None), (UPDATES, None), (UPDATES, weights(n, wide, 1))):
        results = []
        for backend, place in ((cpu, "cpu"), (triton, device)):
            theta = weights(n, dtype).to(place)
            buffer = None if momentum is None else momentum.clone().to(place)
            out = torch.empty(len(PROBES), n, dtype=out_dtype, device=place)
            backend.perturb(theta, TID, out, PROBES, SEED, STEP + 3, kind, updates, buffer, 0.9)
            results.append((theta, out) if buffer is None else (theta, out, buffer))
        case = (n, kind, dtype, out_dtype, len(updates), momentum is None)
        (theta, out, *rest), (other, second, *others) = results
        assert agrees(theta, other, kind), case
        same = theta.cpu() == other.cpu()  # a weight that was rounded to the other side has other probes
        assert agrees(out.cpu()[:, same].flatten(), second.cpu()[:, same].flatten(), kind), case
        assert all(agrees(a, b, kind) for a, b in zip(rest, others)), case


def _agree_in_place(triton, device, n, kind, dtype):
    there, here = weights(n, dtype).to(device), weights(n, dtype)
    for backend, theta in ((triton, there), (cpu, here)):
        backend.perturb(theta, TID, theta[None], PROBES[2:3], SEED, 9, kind, UPDATES[:1], None, 0.0)
    assert agrees(there, here, kind), (n, kind, dtype)


def _agree_on_restores(triton, device, n, kind, dtype):
    """Runs of moves and updates; alone, one update with its restore and a probe in place, as in training."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    cases = [(RESTORES, None), (RESTORES, 0.9), *(([u], b) for u in RESTORES[1:6:2] for b in (None, 0.9))]
    for updates, beta in cases:
        results = []
        for place in ("cpu", device):
            theta = weights(n, dtype).to(place)
            buffer = None if beta is None else weights(n, wide, 1).to(place)
            live = tuple(noise._live(updates, beta is not None))
            backend = cpu if place == "cpu" and not results else triton
            place_rounds = (
                dtype is not torch.bfloat16 or device == "cuda"
            )  # the interpreter truncates to bf16
            end = (theta[None], PROBES[2:3]) if len(updates) == 1 and place_rounds else (None, ())
            backend.perturb(theta, TID, *end, SEED, 9, kind, live, buffer, beta or 0.0)
            results.append((theta,) if buffer is None else (theta, buffer))
        case = (n, kind, dtype, len(updates), beta)
        # A 16-bit weight is rounded after each move: there and back by 1, say, is a step at 1 off or not off at all.
        reach = 4.0 if dtype.itemsize == 2 else 0.0
        assert all(agrees(a, b, kind, reach) for a, b in zip(*results[::-1])), case


def _agree_on_masks(triton, device, n, kind, dtype, out_dtype, mask):
    """Updates that are looped over, one as in training, with restores where they may be, and rows of a matrix."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    restores = RESTORES if mask.threshold is None else ()
    for updates, beta in (
        (UPDATES, None),
        (restores, None),
        (UPDATES[:2], 0.9),
        (UPDATES[:1], None),
        (restores[1:2], 0.9),
    ):
        if kind == GAUSSIAN and mask.threshold is not None and len(updates) > 1:
            continue  # what ends a little off the threshold on one backend may move with the next update there alone
        results = []
        for backend, place in ((cpu, "cpu"), (triton, device)):
            theta = weights(n, dtype).to(place)
            buffer = None if beta is None else weights(n, wide, 1).to(place)
            out, rows = torch.empty(4, n, dtype=out_dtype, device=place), torch.tensor([2, 0, 2]).to(place)
            where, live = (128, None, mask), tuple(noise._live(updates, beta is not None))
            backend.perturb(theta, TID, out, PROBES[:4], SEED, 9, kind, live, buffer, beta or 0.0, *where)
            some, table = (
                torch.empty(3, n, dtype=out_dtype, device=place),
                weights(3 * n, dtype).view(3, n).to(place),
            )
            backend.gather(table, TID, rows, some, 2, 0.01, SEED, STEP, kind, 256, mask)
            results.append((theta, out, some, buffer))
        (theta, out, some, buffer), (other, second, others, fast) = results
        case = (n, kind, dtype, mask, len(updates), beta)
        assert agrees(theta, other, kind) and agrees(some.flatten(), others.flatten(), kind), case
        assert beta is None or agrees(buffer, fast, kind), case
        same = theta.cpu() == other.cpu()
        assert agrees(out[:, same].flatten(), second.cpu()[:, same].flatten(), kind), case
        stays = ~noise.moving(weights(n, dtype), TID, mask, 128)
        assert same_bits(other.cpu()[stays], weights(n, dtype)[stays]) and 0 < stays.sum() < n or n < 100, (
            case
        )


def _agree_on_a_part(triton, device, n, kind, dtype, out_dtype):
    """The end of a tensor, from its 256th element on, and from one that 32 bits do not count."""
    for start in (256, 2**36 + 256):
        results, rows = [], torch.tensor([2, 0, 2])
        for backend, place in ((cpu, "cpu"), (triton, device)):
            theta = weights(3 * n, dtype).view(3, n).to(place)
            out = torch.empty(2, 3, n, dtype=out_dtype, device=place)
            some = torch.empty(3, n, dtype=out_dtype, device=place)
            backend.gather(theta, TID, rows.to(place), some, 2, 0.01, SEED, STEP, kind, start)
            backend.perturb(theta, TID, out, PROBES[:2], SEED, 9, kind, UPDATES[:1], None, 0.0, start)
            results.append((theta, out, some))
        for a, b in zip(*results):
            assert agrees(a.flatten(), b.flatten(), kind), (start, n, kind)


def _agree_on_rows(triton, device, n, kind, dtype, out_dtype):
    theta, rows = weights(11 * n, dtype).view(11, n), torch.tensor([3, 0, 10, 3])
    for scale in (0.01, 0.0):
        there, here = torch.empty(4, n, dtype=out_dtype, device=device), torch.empty(4, n, dtype=out_dtype)
        triton.gather(theta.to(device), TID, rows.to(device), there, 2, scale, SEED, STEP, kind)
        cpu.gather(theta, TID, rows, here, 2, scale, SEED, STEP, kind)
        assert agrees(there, here, kind), (n, kind, dtype, out_dtype, scale)


def all_patterns(device, dtype):
    """Every finite 16-bit weight through updates that grow (up to saturation) and shrink it."""
    from zoft.noise import triton

    theta = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    theta = theta[theta.abs() < (1e38 if dtype is torch.bfloat16 else math.inf)].contiguous()
    for update in (Update(1, 2, (1e-6,), decay=1.75), Update(1, 2, (1e-7,), decay=0.3125)):
        there, here = theta.clone().to(device), theta.clone()
        triton.perturb(there, TID, None, (), 0, 0, RADEMACHER, (update,), None, 0.0)
        cpu.perturb(here, TID, None, (), 0, 0, RADEMACHER, (update,), None, 0.0)
        assert same_bits(there, here), update


# ---- without a GPU -------------------------------------------------------------------------------------------------

INTERPRETED = (torch.float32, torch.float16)  # the interpreter does not round to bf16: it truncates
without_gpu = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="Triton's interpreter alone",
)


def run_python(code, **environment):
    tests, root = Path(__file__).parents[1], Path(noise.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{tests}:{root}"} | environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def interpret(code):
    run_python("import torch, test_noise_gpu as t; " + code, TRITON_INTERPRET="1", PYTHONWARNINGS="ignore")


@without_gpu
def test_interpreted():
    interpret("t.agree('cpu', [1025], [torch.float16], [torch.float32])")


@without_gpu
@pytest.mark.slow
def test_interpreted_in_full():
    interpret("t.agree('cpu', [3, 1000, 2500], t.DTYPES, t.INTERPRETED)")
    interpret("t.all_patterns('cpu', torch.float16); t.all_patterns('cpu', torch.bfloat16)")


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from zoft.noise import triton as backend, triton_kernels as kernels

def ptx(kernel, types, constants, capability):
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types if types[name][0] == "*" or name in ("n", "start")}
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=backend._OPTIONS).asm["ptx"]

for capability in (80, 90):
    for dtype, out in (("bf16", "bf16"), ("fp16", "bf16"), ("fp32", "fp32")):
        for kind in (kernels.GAUSSIAN, kernels.RADEMACHER):
            types = dict(theta="*" + dtype, out="*" + out, momentum="*fp32", keys="*i32", values="*fp32", n="i32", start="i32", tid="i32", U="i32", Q="i32", threshold="fp32", share="i32", mask0="i32", mask1="i32")
            fixed = dict(WORK=tl.float32, PARTIAL=True, MASK=kernels.ALL, HAS_THETA=True, HAS_UPDATES=True, ONE=0, HAS_MOMENTUM=True, WRITE_THETA=True,
                         RESTORE=True, STOCHASTIC=dtype != "fp32", BF16=dtype == "bf16", PROBES=2, FRESH=1, SILENT=0, NARROW=out != "fp32", KIND=kind, LANES=256)
            print(ptx(kernels._pass, types, fixed, capability))
    types = dict(theta="*fp32", momentum="*fp32", out="*fp32", narrow="*bf16", table="*i64", keys="*i32", values="*fp32", total="i32", U="i32", Q="i32")
    fixed = dict(HAS_UPDATES=True, ONE=0, RESTORE=False, HAS_MOMENTUM=True, PROBES=2, FRESH=1, SILENT=0, NARROW=True, KIND=kernels.GAUSSIAN, LANES=64)
    print(ptx(kernels._pass_small, types, fixed, capability))
    types = dict(theta="*fp16", rows="*i64", out="*bf16", keys="*i32", values="*fp32", width="i32", origin="i32", per_probe="i32", tid="i32",
                 threshold="fp32", share="i32", mask0="i32", mask1="i32")
    print(ptx(kernels._rows, types, dict(WORK=tl.float32, MASK=kernels.SMALL, SILENT=False, NARROW=True, KIND=kernels.GAUSSIAN, LANES=256), capability))
"""


@without_gpu
@pytest.mark.slow
def test_compiles_for_gpus(tmp_path):
    """To PTX without a fused operation but those spelled out: two exact ones a pair of normals, one in the rounding to fp16."""
    ptx = run_python(COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    modules = ptx.split(".version")[1:]
    assert len(modules) == 2 * (6 + 2)
    for module in modules:
        fused = len(re.findall(r"\bfma\.rn\.f32", module))
        pairs, rounded = (
            len(re.findall(r"lg2\.approx", module)),
            len(re.findall(r"cvt\.rz\.f16\.f32", module)),
        )
        assert fused == 2 * pairs + rounded, (fused, pairs, rounded)


# ---- with a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_and_cpu_agree(dtype, out_dtype, kind):
    more = out_dtype in (dtype, torch.bfloat16)  # each kernel takes a second to compile
    agree("cuda", (1, 3, 127, 1000, 1024, 1025, 4096, 70001), [dtype], [out_dtype], [kind], more)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_weight(dtype):
    all_patterns("cuda", dtype)


@pytest.mark.gpu
def test_gaussian_within_its_bound():
    """All words, as far as 100 million elements meet them, against the CPU's, which the slow twin judges."""
    where = {"seed": SEED, "step": STEP, "direction": 0, "noise": GAUSSIAN}
    n = 100_000_000
    there, here = noise.direction((n,), TID, device="cuda", **where), noise.direction((n,), TID, **where)
    assert torch.isfinite(there).all()
    off = there.cpu().double() - here.double()
    assert off.abs().max() <= GAUSSIAN_BOUND_GPU
    assert off.square().mean().sqrt() <= 1e-6
    assert 4.8 < there.abs().max() < 4.86
    assert abs(there.double().mean().item()) < 4 / math.sqrt(n)
    assert abs((there.double() ** 2).mean().item() - 1) < 1e-5 + 4 * math.sqrt(2 / n)


@pytest.mark.gpu
def test_small_tensors_in_one_launch():
    """The same bits as one launch a tensor, updates, momentum and probes."""
    from zoft.noise import triton

    sizes, tids = [3, 511, 512, 513, 2049, 1], [1, 2**31 + 5, 2**32 - 1, 7, 8, 9]
    device = torch.device("cuda")
    for kind in KINDS:
        for beta in (0.0, 0.9):
            theta = weights(sum(sizes), torch.float32).cuda()
            alone = list(theta.clone().split(sizes))
            momentum = torch.ones_like(theta) if beta else None
            buffers = list(torch.ones_like(theta).split(sizes)) if beta else [None] * len(sizes)
            out = torch.empty(2, len(theta), device=device)
            plan = triton.plan_of(UPDATES[:1], PROBES[:2], SEED, STEP + 1, beta, False, device)
            narrow = torch.empty(2, len(theta), device=device, dtype=torch.bfloat16)
            triton.launch_small(
                theta, triton.table_of(sizes, tids, device), out, plan, kind, momentum, narrow
            )
            assert same_bits(narrow, out.bfloat16())
            for i, part in enumerate(out.split(sizes, 1)):
                single = torch.empty(2, sizes[i], device=device)
                alone[i] = alone[i].clone()
                buffer = None if buffers[i] is None else buffers[i].clone()
                triton.launch(alone[i], tids[i], single, plan, kind, buffer)
                assert same_bits(part, single)
                assert same_bits(theta.split(sizes)[i], alone[i])


@pytest.mark.gpu
def test_many_probes_and_directions():
    probes = tuple((k // 2, 0.01 * (-1) ** k) for k in range(37)) + ((99, 0.0),)
    updates = (Update(3, 1, tuple(1e-3 * k for k in range(9))), Update(4, 1, (0.1,)), Update(5, 1, (0.2,)))
    for kind in KINDS:
        theta = weights(3000, torch.float16)
        results = []
        for place in ("cpu", "cuda"):
            t, out = theta.clone().to(place), torch.empty(38, 3000, dtype=torch.bfloat16, device=place)
            noise.perturb(t, TID, out, probes, seed=2, step=6, noise=kind, updates=updates)
            results.append((t, out))
        assert agrees(results[0][0], results[1][0], kind) and agrees(results[0][1], results[1][1], kind)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_no_op_writes_nothing(dtype):
    theta = weights(400, dtype)
    bits = theta.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[theta.element_size()])
    bits[8] = torch.iinfo(bits.dtype).min  # -0.0
    theta = theta.cuda()
    before, out = theta.clone(), torch.empty(1, 400, dtype=dtype, device="cuda")
    noise.advance(theta, TID, [Update(1, 0, (0.0, -0.0))], GAUSSIAN)
    noise.perturb(
        theta, TID, out, [(0, 1e-3)], seed=0, step=3, noise=GAUSSIAN, updates=[Update(2, 0, (0.0,))]
    )
    assert torch.equal(theta.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_more_elements_than_32_bits_count(kind):
    width, n = 1 << 20, 2**31 + (1 << 20)
    if torch.cuda.mem_get_info()[0] < 7 * n:
        pytest.skip("needs 15 GB of GPU memory")
    theta = torch.zeros(n // width, width, dtype=torch.bfloat16, device="cuda")
    noise.advance(theta, TID, [Update(STEP, SEED, (1.0,))], kind)
    out = torch.empty(1, *theta.shape, dtype=torch.bfloat16, device="cuda")
    noise.perturb(theta, TID, out, [(2, 1.0)], seed=SEED, step=STEP, noise=kind)
    rows = torch.empty(2, width, dtype=torch.bfloat16, device="cuda")
    noise.gather(
        theta, TID, torch.tensor([0, 2048], device="cuda"), rows, 2, 1.0, seed=SEED, step=STEP, noise=kind
    )
    assert torch.equal(rows, out[0, [0, 2048]])
    here, start = torch.empty(1, width, dtype=torch.bfloat16), 2048 * width
    noise.perturb(theta[2048].cpu(), TID, here, [(2, 1.0)], seed=SEED, step=STEP, noise=kind, start=start)
    assert agrees(here[0], out[0, 2048], kind)


@pytest.mark.gpu
def test_global_generators_are_left_alone():
    torch.cuda.manual_seed(1)
    before = torch.cuda.get_rng_state()
    noise.direction((1000,), TID, seed=1, step=1, direction=0, noise=GAUSSIAN, device="cuda")
    assert torch.equal(before, torch.cuda.get_rng_state())


@pytest.mark.gpu
def test_can_be_captured():
    """In a CUDA graph, once the step's keys are on the device."""
    theta, out = (
        weights(5000, torch.float16).cuda(),
        torch.empty(2, 5000, dtype=torch.bfloat16, device="cuda"),
    )
    start = theta.clone()

    def step():
        noise.perturb(
            theta, TID, out, PROBES[:2], seed=1, step=2, noise=GAUSSIAN, updates=[Update(1, 1, (0.01,))]
        )

    step()
    expected = theta.clone(), out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    theta.copy_(start)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(theta, expected[0]) and torch.equal(out, expected[1])
