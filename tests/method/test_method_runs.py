"""Whole runs of ZO-Bench's set: resumed, replayed, over two processes, estimated, refused."""

import dataclasses
import json
import shutil

import pytest
import ranks
from safetensors import safe_open
from test_cli import zoft
from test_replay import configured, place, train  # noqa: F401 (place is a fixture)

from zoft.cli import replay
from zoft.config.digest import changed, digests
from zoft.errors import UserError
from zoft.ledger.log import read_ledger
from zoft.method import advice
from zoft.method.configured import compose, load_run
from zoft.method.estimators.named import forwards_per_step
from zoft.replay.snapshot import file_of
from zoft.report.runs import read
from zoft.run import estimate
from zoft.run.start import train_run
from zoft.train import header

MASKED = ("recipe=sparse_mezo", "mask=random")
WAYS = {
    "conservative": ("update=conservative", "storage=fp16", "estimator=one_sided", "clip=50"),
    "conservative-moment": ("update=conservative", "meazo=0.9", "snapshot_every=4", "noise=rank1"),
    "reweighted": ("update=momentum", "momentum=0.5", "noise=rademacher", "storage=bf16", "q=2", "snapshot_every=4"),
    "reweighted-rank1": ("update=momentum", "momentum=0.5", "noise=rank1", "storage=bf16", "denoise_every=4"),
    "blocks": ("blocks=random", "storage=bf16", "momentum=0.5", "weight_decay=0.1", "snapshot_every=3"),
    "blocks-cyclic": ("blocks=cyclic", "storage=fp16", "denoise_every=4", "q=2", "noise=rank1"),
    "blocks-inplace": ("blocks=cyclic", "storage=bf16", "compute=bf16", "perturb=inplace", "q=2", "momentum=0.5"),
    "blocks-lora": ("blocks=cyclic", "recipe=lora_zo", "update=adam", "lr=1e-3", "snapshot_every=2"),
    "masks": (*MASKED, "mask_every=1", "storage=bf16", "momentum=0.5", "snapshot_every=3"),
    "masks-denoised": (*MASKED, "mask_every=2", "storage=bf16", "denoise_every=4", "q=2"),
    "masks-inplace": (*MASKED, "mask_every=2", "storage=bf16", "compute=bf16", "perturb=inplace"),
    "anchor": ("anchor=0.5", "storage=bf16", "snapshot_every=3", "weight_decay=0.1"),
    "anchor-adam": ("anchor=0.5", "update=adam", "storage=fp16", "lr=1e-3", "blocks=random"),
    "anchor-lora": ("anchor=0.5", "recipe=lora_zo", "lr=1e-2", "snapshot_every=4"),
    "anchor-qzo": ("anchor=0.5", "recipe=qzo", "bits=4", "group=32", "lr=1e-3"),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_resumed_and_replayed_runs_have_the_bits_of_the_run(place, way, tmp_path):  # noqa: F811
    run = train(place, way, *WAYS[way])
    model = "adapter" if "lora" in way else "model"
    file = next(p.name for p in (run / model).iterdir() if p.suffix == ".safetensors")
    end, data = (run / model / file).read_bytes(), (run / "ledger").read_bytes()
    log, config = read_ledger(run / "ledger"), load_run(run)
    for name in ("update", "blocks", "mask_every", "anchor"):
        asked = dict(k.split("=") for k in WAYS[way]).get(name)
        assert (str(log.header[name]) == asked) if asked else name not in log.header
        assert (name in log.header["config"]) == bool(asked)
    assert result(run)["forwards"] == 6 * forwards_per_step(config) == 6 * read(run).each
    replay.replay_run_folder(run, tmp_path / "again")
    assert (tmp_path / "again" / file).read_bytes() == end
    count = len(log.records) * config.q + len(log.events)
    for kept in (1, count // 2, count - 1):
        cut = place / f"cut-{way}-{kept}"
        cut.mkdir()
        (cut / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(run), str(cut)))
        (cut / "ledger").write_bytes(data[: len(data) - 32 * (count - kept)])
        if (run / "snapshots").is_dir():
            shutil.copytree(run / "snapshots", cut / "snapshots")
        train_run(load_run(cut), resume=cut)
        assert (cut / model / file).read_bytes() == end, kept
        assert (cut / "ledger").read_bytes() == data, kept


def result(run):
    return json.loads((run / "result.json").read_text())


def test_a_snapshot_has_no_base_and_the_header_has_turns(place):  # noqa: F811
    run = train(place, "anchored", "anchor=0.5", "blocks=cyclic", "snapshot_every=3")
    found = read_ledger(run / "ledger").header
    assert {*found["turns"].values()} == {0, 1, 2} and found["turns"].keys() == found["trained"].keys()
    with safe_open(file_of(run, 6), "pt") as file:
        assert {*file.keys()} == {n for t in found["trained"] for n in (t, f"{t}@t")}


@pytest.mark.parametrize("way", ["blocks", "masks"])
def test_the_kinds_of_a_ledger_are_not_mixed(place, way):  # noqa: F811
    run = train(place, f"mix-{way}", *WAYS[way], "steps=3")
    (run / "result.json").unlink()
    for name, value in (("blocks", "cyclic"), ("mask_every", 3), ("anchor", 0.1)):
        with pytest.raises(UserError, match=f"was begun with another {name} than config.yaml has now"):
            train_run(dataclasses.replace(load_run(run), **{name: value}), resume=run)


def test_headers_of_plain_runs_say_nothing_new(place):  # noqa: F811
    plain = configured(place, "none")
    found = header.header_of(plain, "base", [])
    assert not {"blocks", "mask_every", "anchor", "turns", "update"} & {*found, *found["config"]}
    other = dataclasses.replace(plain, blocks="random", mask_every=2, anchor=0.5, update="momentum")
    assert header.with_plan(other, found) == dataclasses.replace(plain, estimator="two_sided", update="sgd")
    assert {*changed(digests(plain), digests(other))} == {"blocks", "mask_every", "anchor", "update"}


KEYS = {
    "conservative": ["update=conservative", "momentum=0"],
    "reweighted": ["update=momentum", "noise=rademacher", "parallel=probes"],
    "blocks": ["blocks=random", "parallel=probes"],
    "masks": [*MASKED, "mask_every=2", "parallel=probes"],
    "anchor": ["anchor=0.5", "momentum=0", "parallel=probes"],
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return ranks.make_place(tmp_path_factory.mktemp("work"), steps=12)


@pytest.mark.parametrize(
    "name", [n if n == "conservative" else pytest.param(n, marks=pytest.mark.slow) for n in KEYS]
)
def test_two_processes_make_one_run(shared, name):
    keys = [*KEYS[name], "lr=0.001"]
    assert ranks.zoft(shared, f"output_dir={name}-two", *keys, size=2) == [0, 0], said(shared)
    two = read_ledger(shared / f"{name}-two" / "ledger").records
    assert ranks.zoft(
        shared, f"output_dir={name}-one", *keys[: -1 - ("parallel=probes" in keys)], keys[-1]
    ) == [0]
    one = read_ledger(shared / f"{name}-one" / "ledger").records
    if name == "conservative":  # shares of the batch: sums round otherwise
        assert [r.losses for r in two[:1]] == [pytest.approx(r.losses, rel=1e-5) for r in one[:1]]
        done = zoft("replay", f"{name}-two", "--out", f"{name}-again", cwd=shared)
        assert done.returncode == 0, done.stderr
        whole, again = (shared / n / "model.safetensors" for n in (f"{name}-two/model", f"{name}-again"))
        assert whole.read_bytes() == again.read_bytes()
    else:
        assert one == two
        files = [shared / f"{name}-{n}" / "model" / "model.safetensors" for n in ("one", "two")]
        assert files[0].read_bytes() == files[1].read_bytes()


def said(folder):
    return (folder / "said-0").read_text()[-2000:]


@pytest.mark.slow
def test_an_elastic_run_has_the_window(shared):
    assert ranks.zoft(shared, "output_dir=elastic", "elastic=true", *KEYS["reweighted"][:2]) == [0], said(
        shared
    )
    assert ranks.zoft(shared, "output_dir=alone", *KEYS["reweighted"][:2]) == [0]
    a, b = ((shared / n / "model" / "model.safetensors").read_bytes() for n in ("elastic", "alone"))
    assert a == b


# ---- what a user is told ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, words",
    [
        (["update=conservative", "q=2"], ["q=2", "update=conservative", "use q=1"]),
        (["update=conservative", "weight_decay=0.1"], ["weight_decay=0.1", "without the decay"]),
        (["update=conservative", "anchor=0.1"], ["anchor=0.1", "without the pull"]),
        (["update=conservative", "momentum=0.9"], ["momentum=0.9", "without the buffer"]),
        (["update=conservative", "perturb=inplace"], ["perturb=inplace", "use perturb=probes"]),
        (["update=conservative", "elastic=true"], ["elastic=true", "leave one of them out"]),
        (["update=conservative", "parallel=probes"], ["parallel=probes", "use parallel=data"]),
        (["update=conservative", "directions=example"], ["directions=example", "use directions=shared"]),
        (["update=momentum", "noise=rademacher"], ["update=momentum", "momentum=0.9"]),
        (["update=momentum", "momentum=0.9"], ["noise=gaussian", "66 directions", "use noise=rademacher or rank1"]),
        (["update=momentum", "momentum=0.9", "noise=rank1", "perturb=inplace"], ["perturb=inplace", "use perturb=probes"]),
        (["update=momentum", "momentum=0.9", "noise=rank1", "anchor=0.1"], ["anchor=0.1", "leave one of them out"]),
        (["update=momentum", "momentum=0.9", "noise=rank1", "blocks=random"], ["blocks=random", "use update=sgd"]),
        (["update=momentum", "momentum=0.9", "noise=rademacher", "recipe=sparse_mezo"], ["mask=magnitude", "update=sgd"]),
        (["update=momentum", "momentum=0.9", "noise=rademacher", *MASKED, "mask_every=1"], ["mask_every=1", "other masks"]),
        (["blocks=odd"], ["blocks=odd", "use all, random, cyclic"]),
        (["mask_every=2"], ["mask_every=2 needs recipe=sparse_mezo"]),
        (["recipe=sparse_mezo", "mask_every=2"], ["mask_every=2", "mask=magnitude draws nothing", "use mask=random"]),
        ([*MASKED, "mask_every=2", "sparsity=0"], ["mask_every=2", "sparsity=0 leaves nothing out"]),
        (["anchor=-1"], ["anchor=-1", "≥ 0"]),
        (["anchor=200"], ["anchor=200", "lr=0.01", "lower it"]),
        (["anchor=0.1", "momentum=0.9"], ["momentum=0.9", "no buffer with anchor=0.1"]),
        (["anchor=0.1", "perturb=inplace"], ["anchor=0.1", "use perturb=probes"]),
        (["anchor=0.1", "denoise_every=2"], ["denoise_every=2", "anchor=0.1"]),
        (["update=sign", "clip=3"], ["clip=3", "update=sign with q=1", "leave it out"]),
    ],
)  # fmt: skip
def test_refused_in_one_line(place, keys, words):  # noqa: F811
    with pytest.raises(UserError) as caught:
        compose(str(place / "mine.yaml"), [f"model={place / 'half'}", *keys])
    assert all(w in str(caught.value) for w in words) and "\n" not in str(caught.value), str(caught.value)


def test_advice_on_candidates_that_round_away(place):  # noqa: F811
    for compute, told in (("fp32", False), ("bf16", True)):
        config = configured(place, "none", "update=conservative", f"compute={compute}")
        lines = advice.advice_at_start(config, [])
        assert any("lie lr·c from the weights" in line and "compute=fp32" in line for line in lines) == told


def test_a_clip_that_the_recipe_sets_or_that_weighs_directions_is_no_mistake(place):  # noqa: F811
    assert configured(place, "none", "recipe=qzo", "bits=4", "update=sign").clip == 100
    assert configured(place, "none", "update=sign", "clip=3", "q=2").clip == 3


def test_the_last_denoising_of_an_anchored_run_is_refused(place, tmp_path):  # noqa: F811
    run = train(place, "anchor-refused", "anchor=0.5", "storage=bf16", "steps=2")
    with pytest.raises(UserError, match="was trained with anchor=0.5, so base and ledger give no plain sum"):
        replay.replay_run_folder(run, tmp_path / "out", denoise=True)


def test_estimate_knows_them(place, monkeypatch):  # noqa: F811
    monkeypatch.setattr(estimate, "MEASURED", 0.0)
    monkeypatch.setattr(estimate, "rates", lambda *args: {"flops": 1e9, "noise": 1e8})

    def found(*keys):
        return estimate.estimate_run(configured(place, "none", *keys))

    plain, wide = found(), found("storage=fp16", "anchor=0.5")
    assert plain["base_bytes"] == 0 and wide["base_bytes"] < 4 * plain["trained"]
    trained = found("anchor=0.5")
    assert trained["base_bytes"] == 4 * plain["trained"] == trained["peak_bytes"] - plain["peak_bytes"]
    assert "base, for anchor" in estimate.estimate_text(trained)
    assert found("update=conservative")["flops_per_step"] / plain["flops_per_step"] == pytest.approx(2.5)
    keys = ["update=momentum", "momentum=0.9", "noise=rademacher"]
    assert found(*keys)["momentum_bytes"] == 0 < found("momentum=0.9")["momentum_bytes"]
    noisy = plain["seconds_per_step"] - plain["flops_per_step"] / 1e9
    third = found("blocks=random")["seconds_per_step"] - plain["flops_per_step"] / 1e9
    assert third == pytest.approx(noisy / 3)
    with pytest.raises(UserError, match="lies in one block"):
        found("blocks=random", r"train=layers\.1\.")
    more = found(*keys)["seconds_per_step"] - found("noise=rademacher")["seconds_per_step"]
    assert more == pytest.approx(66 * plain["trained"] / 1e8)


def test_estimate_groups_probes_as_a_run_does(place, capsys):  # noqa: F811
    for keys in (
        ["estimator=one_sided", "q=6"],
        ["q=3"],
        ["estimator=one_sided"],
        ["probes_per_forward=2", "q=3"],
    ):
        run = train(place, "-".join(["group", *keys]).replace("=", ""), *keys, "steps=1")
        found = estimate.estimate_run(configured(place, "none", *keys))
        assert found["config"]["probes_per_forward"] == load_run(run).probes_per_forward, keys


def test_reports_say_how_a_run_was_made(place, capsys):  # noqa: F811
    run = train(place, "told", "update=conservative", "steps=3")
    done = zoft("ledger", str(run), cwd=place)
    assert done.returncode == 0 and "update conservative" in done.stdout, done.stdout + done.stderr
