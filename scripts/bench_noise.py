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
def _radius_error(lo, hi, stride):
    worst, largest, at = 0.0, 0.0, 0
    for word in range(lo, hi, stride):
        u = np.float64(np.float32(np.float32(np.uint32(word)) * np.float32(2.0**-32) + np.float32(2.0**-33)))
        r = np.float64(kernels.radius(np.uint32(word)))
        error = abs(r - math.sqrt(-2 * math.log(u)))
        if not error <= worst:
            worst, at = error, word
        largest = max(largest, r)
    return worst, largest, at


@numba.njit
def _angle_error(lo, hi, stride):
    worst, at = 0.0, 0
    for word in range(lo, hi, stride):
        v = 2 * math.pi * np.float64(np.float32(np.int32(word))) * 2.0**-32
        c, s = kernels.cos_sin(np.uint32(word))
        error = max(abs(np.float64(c) - math.cos(v)), abs(np.float64(s) - math.sin(v)))
        if not error <= worst:
            worst, at = error, word
    return worst, at


def exhaustive() -> None:
    """Every value that fl32(word) takes: words below 2²⁴, then the multiples of one unit in the last place."""
    spans = [(0, 2**24, 1)] + [(2**k, 2 ** (k + 1), 2 ** (k - 23)) for k in range(24, 32)]
    radius = [_radius_error(*span) for span in spans] + [_radius_error(2**32 - 300, 2**32, 1)]
    signed = [s for s in spans if s[1] <= 2**31]
    angle = [_angle_error(*s) for s in signed] + [_angle_error(-s[1], -s[0] + 1, s[2]) for s in signed]
    r_error, r_largest, _ = max(radius)
    a_error, _ = max(angle)
    r_largest = max(r[1] for r in radius)
    print(f"radius: largest error {r_error:.3g}, largest value {r_largest:.4f}; cosine, sine: {a_error:.3g}")
    print(
        f"|z - exact z| <= {r_error + r_largest * a_error + 2.0**-22:.3g}, the rounding of the product included"
    )


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
