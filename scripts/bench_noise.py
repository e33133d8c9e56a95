"""Rates and accuracy of zoft's noise.

python scripts/bench_noise.py                      # elements per second on this machine's CPU, beside torch's normal_
python scripts/bench_noise.py --device cuda        # the same on a GPU, beside a copy of the same bytes
python scripts/bench_noise.py --exhaustive         # largest error of the gaussian over every possible word (CPU)
"""

import argparse
import math
import time

import numba
import numpy as np
import torch

from zoft import noise
from zoft.noise import kernels

UPDATE = noise.Update(step=1, seed=0, multipliers=(1e-6,))
PROBES = [(0, 1e-3), (0, -1e-3)]


def seconds(call, device: str, repeats: int) -> float:
    """The median time of one call, after a first one that compiles."""
    call()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def row(dtype: torch.dtype, kind: str, device: str, n: int, repeats: int) -> str:
    """M elements/s of each operation."""
    theta = torch.randn(n, device=device).to(dtype)
    out = torch.empty(2, n, device=device, dtype=dtype)
    at: dict = {"seed": 0, "step": 2, "noise": kind}
    backend = noise._backend(device)  # its direction fills a tensor that is there, as normal_ does
    calls = (
        lambda: out[0].normal_(),
        lambda: backend.direction(out[0], 7, 0, 2, 0, kind),
        lambda: noise.perturb(theta, 7, out, PROBES, **at),
        lambda: noise.advance(theta, 7, [UPDATE], kind),
        lambda: noise.perturb(theta, 7, out, PROBES, updates=[UPDATE], **at),
        lambda: out[0].copy_(out[1]),
    )
    return " ".join(f"{n / seconds(call, device, repeats) / 1e6:9.0f}" for call in calls)


def rates(device: str, n: int, repeats: int) -> None:
    """Prints the rates of each storage and noise, beside torch's normal_'s and a plain copy's."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{n / 1e6:.0f} M elements, {name}, torch {torch.__version__}; M elements/s, median of {repeats}")
    heads = ("normal_", "z alone", "2 probes", "update", "both", "copy")
    print(f"{'storage':>9} {'noise':>11} " + " ".join(f"{head:>9}" for head in heads))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for kind in (noise.GAUSSIAN, noise.RADEMACHER):
            print(f"{str(dtype)[6:]:>9} {kind:>11} {row(dtype, kind, device, n, repeats)}")
    small = torch.zeros(576, device=device, dtype=torch.float16)
    begin = time.perf_counter()
    for _ in range(1000):
        noise.advance(small, 7, [UPDATE], noise.GAUSSIAN)
    print(f"one call for a tensor of 576 elements: {(time.perf_counter() - begin) * 1e3:.1f} µs")


@numba.njit
def _factors(words):
    """Radius of the upper half of each word; cosine and sine of its lower 15 bits."""
    out = np.empty((3, len(words)), np.float32)
    for i in range(len(words)):
        out[0, i] = kernels.radius(words[i])
        out[1, i], out[2, i] = kernels.half_turn(words[i])
    return out


@numba.njit
def _product_errors(r, angles, exact_r, exact_angles):
    """Largest and mean square of |fl(r·angle) - exact|."""
    worst, squares = 0.0, 0.0
    for i in range(len(r)):
        for k in range(len(angles)):
            error = abs(np.float64(r[i] * angles[k]) - exact_r[i] * exact_angles[k])
            worst = max(worst, error)
            squares += error * error
    return worst, squares / len(r) / len(angles)


def exhaustive() -> None:
    """Every word: 65,536 radii times 32,768 angles and the same half a turn back (which changes only signs)."""
    half = np.arange(2**16, dtype=np.uint32)
    radius = _factors(half << 16)[0]
    angles = _factors(half[: 2**15])[1:].ravel()
    v = 2 * np.pi * (half[: 2**15] + 0.5) / 2**16
    exact_radius = np.sqrt(-2 * np.log((half + 0.5) / 2**16))
    exact_angles = np.concatenate([np.cos(v), np.sin(v)])
    print(
        f"radius: largest error {np.abs(radius - exact_radius).max():.3g}, largest value {radius.max():.5f}"
    )
    print(f"cosine, sine: largest error {np.abs(angles - exact_angles).max():.3g}")
    worst, square = _product_errors(radius, angles, exact_radius, exact_angles)
    print(f"|z - exact z|: largest {worst:.3g}, root mean square {math.sqrt(square):.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--elements", type=int, default=None, help="default: 2^24 on a CPU, 2^28 on a GPU")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--exhaustive", action="store_true", help="check the gaussian over every word instead"
    )
    args = parser.parse_args()
    if args.exhaustive:
        exhaustive()
    else:
        rates(args.device, args.elements or (1 << 24 if args.device == "cpu" else 1 << 28), args.repeats)


if __name__ == "__main__":
    main()
