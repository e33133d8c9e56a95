"""scripts/bench_step.py on a tiny model and a CPU, and the reference loop against its own formula."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_step  # noqa: E402
import reference_loop  # noqa: E402


def test_the_table_of_a_tiny_model(tmp_path, capsys):
    out = tmp_path / "out.json"
    bench_step.main(
        [
            "--model",
            "tiny",
            "--shape",
            "4x16",
            "--steps",
            "3",
            "--device",
            "cpu",
            "--seconds",
            "5",
            "--json",
            str(out),
        ]
    )
    (r,) = json.loads(out.read_text())["rows"]
    assert (r["model"], r["batch"], r["tokens"]) == ("tiny", 4, 16)
    for part in bench_step.PARTS:
        assert "error" not in r[part], r[part]
        assert r[part]["ms"] > 0
    for part in ("probe", "inplace"):
        assert r[part]["steps"] <= 3 and r[part]["skipped"] == 0 and len(r[part]["losses"]) == 2
        assert r[part]["median_ms"] > 0
    assert r["probe"]["perturb"] == "probes" and r["inplace"]["perturb"] == "inplace"
    assert r["trained"] == r["parameters"] == r["weights_bytes"] / 4  # fp32
    assert r["two_forwards_ms"] == 2 * r["forwards"]["ms"]
    assert r["floor_ms"] == pytest.approx(r["two_forwards_ms"] + 8e3 * r["trained"] / r["copy_bytes_per_s"])
    assert r["probe_over_floor"] == pytest.approx(r["probe"]["ms"] / r["floor_ms"])
    assert r["reference_over_probe"] == pytest.approx(r["reference"]["ms"] / r["probe"]["ms"])
    shown = capsys.readouterr().out
    assert "| tiny 4×16 |" in shown and "probe ÷ floor" in shown and "torch" in shown


def test_what_fails_or_is_skipped_is_said_and_the_rest_goes_on(tmp_path, capsys):
    out = tmp_path / "out.json"
    bench_step.main(
        ["--model", "tiny", "--shape", "4x12", "--shape", "4x8", "--steps", "2", "--device", "cpu", "--seconds", "2",
         "--skip", "reference", "--skip", "inplace", "--train", "nothing_of_that_name", "--json", str(out)]
    )  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    assert all("UserError" in r["probe"]["error"] for r in rows)
    assert all(r["reference"]["error"] == "skipped" and r["reference_ms"] is None for r in rows)
    assert rows[1]["forwards"]["ms"] > 0
    assert "UserError" in capsys.readouterr().out


def test_lora_pairs_alone(tmp_path, capsys):
    out = tmp_path / "out.json"
    bench_step.main(
        ["--model", "tiny", "--shape", "4x8", "--steps", "2", "--device", "cpu", "--seconds", "2", "--skip", "reference",
         "--skip", "inplace", "--shape", "4x12", "--train", "lora", "--q", "2", "--probes-per-forward", "4", "--json", str(out)]
    )  # fmt: skip
    for r in json.loads(out.read_text())["rows"]:
        assert r["trained"] == 2 * 8 * ((32 + 32) + (32 + 16))  # layers × rank × (query, value)
        assert r["parameters"] < 20000 and r["probe"]["group"] == len(r["probe"]["losses"]) == 4
        assert r["forwards_rows"]["ms"] > 0
        assert r["probe_over_rows"] == pytest.approx(r["probe"]["ms"] / r["forwards_rows"]["ms"])
    assert "one forward of 4× the rows" in capsys.readouterr().out


def test_a_reference_step_is_its_formula():
    """θ − lr·g·z with g from the losses at θ ± eps·z, drawn parameter by parameter from one seed."""
    model = tiny.llama()
    params = list(model.parameters())
    start = [p.data.clone() for p in params]
    ids = torch.randint(3, tiny.VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(11)
    z = [torch.normal(0.0, 1.0, p.shape) for p in params]

    def loss_at(scale):
        for p, s, d in zip(params, start, z):
            p.data = s + scale * d
        return float(reference_loop.language_loss(model, ids))

    plus, minus = loss_at(1e-2), loss_at(-1e-2)
    for p, s in zip(params, start):
        p.data = s.clone()
    got = reference_loop.step(
        params, lambda: reference_loop.language_loss(model, ids), seed=11, eps=1e-2, lr=1e-2
    )
    assert got == pytest.approx((plus, minus), rel=1e-5)
    slope = (got[0] - got[1]) / 2e-2
    for p, s, d in zip(params, start, z):
        torch.testing.assert_close(p.data, s - 1e-2 * slope * d, rtol=1e-4, atol=1e-5)


def test_help(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    for main in (bench_step.main, reference_loop.main):
        with pytest.raises(SystemExit) as done:
            main()
        assert done.value.code == 0 and "python scripts/" in capsys.readouterr().out
