"""The verbs for runs that are there: what is wrong shows before anything heavy loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from zoft.config.schema import ADAPTERS, Config
from zoft.errors import UserError
from zoft.method.configured import load_run


def replay_run_folder(
    folder: str | Path, out: str | Path | None = None, *, step: int | None = None, storage: str | None = None,
    denoise: bool = False, device: str | None = None, recipe: str | None = None,
) -> str:  # fmt: skip
    """Rebuild the model of a run in `out`, or check and say what would be made; returns a line about it.

    step: after so many steps. storage: "fp32" replays 16-bit weights without rounding them. denoise: rounds them once.
    The run may be unfinished, or still going on: its folder is only read. Raises UserError on another base.
    """
    if out is not None and Path(out).exists():
        raise UserError(f"--out {out}: exists; choose another name")
    if storage not in (None, "fp32"):
        raise UserError(f"--storage {storage}: use fp32, or leave it out for the run's own")
    if out is None and (storage or denoise):
        raise UserError(
            f"{'--denoise' if denoise else '--storage'}: makes another model; say where with --out DIR"
        )
    config = of_run(folder, device, recipe)
    from zoft.replay import tensors as replays
    from zoft.replay.live import replay_run
    from zoft.replay.tensors import describe_replay

    ask = replays.Ask(step, exact=storage == "fp32", denoise=denoise)
    if out is None:
        return describe_replay(config, Path(folder), ask)
    done = replay_run(config, Path(folder), Path(out), ask)
    unfinished = (
        f" of {config.steps}: the run is not finished"
        if step is None and done < config.steps and not (Path(folder) / "result.json").exists()
        else ""
    )
    return f"{done} steps replayed{unfinished}: {out}"


def export_run(
    folder: str | Path, out: str | Path, *, merge: bool, adapter: bool, dtype: str | None = None, device: str | None = None,
    recipe: str | None = None,
) -> str:  # fmt: skip
    """Write a run's model, or its adapter alone, as others load it, checked; returns a line about it.

    dtype: of the model on disk; None is the run's save_dtype. The run may be unfinished; its folder is only read.
    """
    if merge == adapter:
        raise UserError(
            "export: say --merge for the whole model, or --adapter for what was trained beside it"
        )
    if Path(out).exists():
        raise UserError(f"--out {out}: exists; choose another name")
    if dtype is not None and dtype not in (known := ("fp32", "fp16", "bf16")):
        raise UserError(f"--dtype {dtype}: use {', '.join(known)}")
    config = of_run(folder, device, recipe)
    if adapter and config.train not in ADAPTERS:
        raise UserError(f"{folder}: it trained the model's own weights, so there is no adapter; use --merge")
    if adapter and dtype is not None:
        raise UserError(f"--dtype {dtype}: an adapter is written as it is kept; leave it out")
    from zoft.replay.export import export_adapter, export_merged

    if adapter:
        return export_adapter(config, Path(folder), Path(out))

    return export_merged(config, Path(folder), Path(out), dtype or config.save_dtype)


def of_run(folder: str | Path, device: str | None, recipe: str | None = None) -> Config:
    """Return a run's config, to rebuild its weights on `device` (None: where it ran). Raises UserError without that device."""
    told = {"device": device, "recipe": recipe}
    config = load_run(folder, [f"{key}={value}" for key, value in told.items() if value])
    if config.device.startswith("cuda") and not device:
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                f"{folder}: it ran on {config.device}, which is not here; --device cpu gives the same bits with rademacher, "
                "and weights within 1e-5 with gaussian and storage=fp32"
            )
    return dataclasses.replace(config, threads="auto")  # they change no bit of a replay
