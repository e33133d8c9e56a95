"""Rates and accuracy of zoft's noise.

python scripts/bench_noise.py                      # elements per second on this machine's CPU, beside torch's normal_
python scripts/bench_noise.py --device cuda        # the same on a GPU, beside a copy of the same bytes
python scripts/bench_noise.py --updates 1000       # a replay: updates one a pass, and all in one pass (add --elements 28e6)
python scripts/bench_noise.py --exhaustive         # largest error of the gaussian over every possible word (CPU)
"""

import argparse
import math
import time

import numba
import numpy as np
import torch

from zoft.noise import distributions, noise
from zoft.noise.spec import GAUSSIAN, RADEMACHER, Mask, Update

UPDATE = Update(step=1, seed=0, multipliers=(1e-6,))
PROBES = [(0, 1e-3), (0, -1e-3)]
SMALL, CHOSEN = (
    Mask(threshold=0.3186),
    Mask(share=2**14),
)  # a quarter of standard normal weights each


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
        lambda: noise.perturb(theta, 7, out, PROBES, updates=[UPDATE], mask=SMALL, **at),
        lambda: noise.perturb(theta, 7, out, PROBES, updates=[UPDATE], mask=CHOSEN, **at),
        lambda: out[0].copy_(out[1]),
    )
    return " ".join(f"{n / seconds(call, device, repeats) / 1e6:9.0f}" for call in calls)


def rates(device: str, n: int, repeats: int) -> None:
    """Prints the rates of each storage and noise, beside torch's normal_'s and a plain copy's."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{n / 1e6:.0f} M elements, {name}, torch {torch.__version__}; M elements/s, median of {repeats}")
    heads = (
        "normal_",
        "z alone",
        "2 probes",
        "update",
        "both",
        "small",
        "chosen",
        "copy",
    )  # both, under masks
    print(f"{'storage':>9} {'noise':>11} " + " ".join(f"{head:>9}" for head in heads))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for kind in (GAUSSIAN, RADEMACHER):
            print(f"{str(dtype)[6:]:>9} {kind:>11} {row(dtype, kind, device, n, repeats)}")
    small = torch.zeros(576, device=device, dtype=torch.float16)
    begin = time.perf_counter()
    for _ in range(1000):
        noise.advance(small, 7, [UPDATE], GAUSSIAN)
    print(f"one call for a tensor of 576 elements: {(time.perf_counter() - begin) * 1e3:.1f} µs")


def replay(device: str, n: int, count: int) -> None:
    """Prints the rate of many updates: one a pass over the weights, and all in one pass."""
    updates = [Update(step, 0, (1e-6,)) for step in range(count)]
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"{count} updates of {n / 1e6:.0f} M elements, {name}; G numbers/s of wall time (of CPU time × threads)"
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for kind in (GAUSSIAN, RADEMACHER):
            theta, some = torch.randn(n, device=device).to(dtype), updates[: min(count, 16)]
            noise.advance(theta, 7, some[:1], kind)
            rates = []
            for parts in ([[u] for u in some], [updates]):
                done = n * sum(map(len, parts)) / 1e9
                wall, cpu = time.perf_counter(), time.process_time()
                for part in parts:
                    noise.advance(theta, 7, part, kind)
                if device == "cuda":
                    torch.cuda.synchronize()
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                rates.append(f"{done / wall:7.2f} ({done / cpu * torch.get_num_threads():6.2f})")
            print(
                f"{str(dtype)[6:]:>9} {kind:>11}  one a pass {rates[0]}  in one pass {rates[1]}", flush=True
            )


@numba.njit
def _factors(words):
    """Radius of the upper half of each word; cosine and sine of its lower 15 bits."""
    out = np.empty((3, len(words)), np.float32)
    for i in range(len(words)):
        out[0, i] = distributions.radius(words[i])
        out[1, i], out[2, i] = distributions.half_turn(words[i])
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
    parser.add_argument(
        "--elements", type=lambda s: int(float(s)), default=None, help="default: 2^24 on a CPU, 2^28 on a GPU"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--updates", type=int, default=0, help="rate of so many updates at once instead")
    parser.add_argument(
        "--exhaustive", action="store_true", help="check the gaussian over every word instead"
    )
    args = parser.parse_args()
    elements = args.elements or (1 << 24 if args.device == "cpu" else 1 << 28)
    if args.exhaustive:
        exhaustive()
    elif args.updates:
        replay(args.device, elements, args.updates)
    else:
        rates(args.device, elements, args.repeats)


if __name__ == "__main__":
    main()
