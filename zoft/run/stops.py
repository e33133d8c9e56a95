"""Say where a run stops between two steps, and what is due there."""

from __future__ import annotations

from zoft.config.schema import Config

# What happens at a stop, in this order, and the key that says every how many steps.
EVERY = {"denoise": "denoise_every", "eval": "eval_every", "snapshot": "snapshot_every"}


def due_at(config: Config, step: int) -> list[str]:
    """Return what happens once `step` steps are done; a run ends with an evaluation, after denoising if it denoises at all."""
    last = ["eval", *["denoise"] * (config.denoise_every > 0)] if step == config.steps else []
    return [what for what, every in EVERY.items() if what in last or _falls(step, getattr(config, every))]


def next_stop(config: Config, step: int, processes: int = 1) -> int:
    """Return the first stop after `step` steps; the end of the run is one, and with several processes each comparison."""
    periods = [getattr(config, every) for every in EVERY.values()] + [config.check_every] * (processes > 1)
    ends = [(step // n + 1) * n for n in periods if n]
    return min([config.steps, *ends])


def _falls(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
