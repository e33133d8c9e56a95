"""Finding sites on modules made to be difficult: each is either exact or refused with its name, never silently wrong."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import EPS, PROBES, VOCAB, Batch, apart, batch, losses, make, off, twin, zoo

from zoft.errors import UserError
from zoft.method import space
from zoft.probe import proof, site_forwards, sites
from zoft.probe import rows as layout

H = 8


class Net(nn.Module):
    """Embedding, a body [rows, T, H] -> [rows, T, H], a head."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(VOCAB, H), body(), nn.Linear(H, VOCAB)
        for p in self.parameters():
            p.data = torch.randn(p.shape) * 0.5

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.body(self.embed(input_ids)))


def check(body, stacked=True, site=None, run=losses, train="all"):
    """Probe losses of Net(body) equal the twin's; returns what was found."""
    b = batch()
    made = make(Net(body), b, train, run)
    assert made.found.stacked == stacked, made.found.note
    expected = twin(made.untouched, made.trained, b, PROBES, run=run)
    assert apart(expected) > 1e-4, apart(expected)
    assert off(made.losses(b, PROBES), expected) < 1e-5, made.found.note
    other = batch(rows=3, length=6, seed=3)
    assert off(made.losses(other, PROBES), twin(made.untouched, made.trained, other, PROBES, run=run)) < 1e-5
    if site is not None:
        assert site in {s.name for s in made.found.sites}, [s.name for s in made.found.sites]
    return made


def parameter(*shape):
    return nn.Parameter(torch.zeros(*shape))


class RowsInDimOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(H, H)

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1).contiguous()


class Heads(nn.Module):
    """Rows folded with heads, rows first."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(H // 2, H // 2)

    def forward(self, x):
        rows, length, _ = x.shape
        y = x.view(rows, length, 2, H // 2).transpose(1, 2).reshape(rows * 2, length, H // 2)
        return self.inner(y).view(rows, 2, length, H // 2).transpose(1, 2).reshape(rows, length, H)


class HeadMajor(nn.Module):
    """Every shape check passes, but the halves of the batch are not where they are looked for."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(H // 2, H // 2)

    def forward(self, x):
        y = torch.cat([x[..., : H // 2], x[..., H // 2 :]])  # [2·rows, T, H/2], head-major
        return torch.cat(self.inner(y).chunk(2), -1)


class Ragged(nn.Module):
    """An expert that sees the tokens of its choice."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(H, 2), nn.ModuleList(nn.Linear(H, H) for _ in range(2))

    def forward(self, x):
        flat = x.flatten(0, 1)
        chosen, out = self.gate(flat).argmax(-1), torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            picked = (chosen == i).nonzero()[:, 0]
            out[picked] = expert(flat[picked])
        return x + out.view_as(x)


class Positions(nn.Module):
    """Learned positions that know nothing of rows: [1, T, H]."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(32, H)

    def forward(self, x):
        return x + self.table(torch.arange(x.shape[1])[None])


class FlatPositions(Positions):
    """The same without a dimension for rows: [T, H]."""

    def forward(self, x):
        return x + self.table(torch.arange(x.shape[1]))


class BiasTable(nn.Module):
    """A table [T, T, heads] turned into [1, heads, T, T] by its caller."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(64, 2), nn.Linear(H, H)

    def forward(self, x):
        t = torch.arange(x.shape[1])
        bias = self.table((t[:, None] - t[None]).abs()).permute(2, 0, 1)[None]  # [1, heads, T, T]
        y = self.mix(x).unflatten(-1, (2, H // 2)).transpose(1, 2)  # [rows, heads, T, H/2]
        return x + (bias.softmax(-1) @ y).transpose(1, 2).flatten(-2)


class TurnedTable(nn.Module):
    """One row that is not a row of the batch: expanding it to rows breaks its reader, not itself."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = parameter(1, H)

        def forward(self):
            return self.weight * 2

    def __init__(self):
        super().__init__()
        self.inner, self.mix = self.Inner(), nn.Linear(H, H)

    def forward(self, x):
        return self.mix(x) @ (self.inner().T @ self.inner())


class CountedPositions(nn.Module):
    """Takes the number of rows as a number."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = parameter(32, H)

        def forward(self, rows, length):
            return self.weight[:length].expand(rows, -1, -1)

    def __init__(self):
        super().__init__()
        self.table = self.Table()

    def forward(self, x):
        return x + self.table(x.shape[0], length=x.shape[1])


class ChildsWeight(nn.Module):
    """Reads its child's weight without calling the child."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(H, H)

    def forward(self, x):
        return F.linear(x, self.child.weight, self.child.bias.data)


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = parameter(H, H)

    def forward(self, x):
        return x @ self.weight.T + x @ self.weight.data


class WeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(H, H))

    def forward(self, x):
        return self.inner(x)


class Chunked(nn.Module):
    """Calls its child once for every four rows."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(H, H)

    def forward(self, x):
        return torch.cat([self.inner(part) for part in x.split(4)])


class Twice(nn.Module):
    """One module at two places."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(H, H)

    def forward(self, x):
        return self.inner(self.inner(x).tanh().transpose(0, 1)).transpose(0, 1)


class InPlaceInput(nn.Module):
    """Changes the rows it is given, and its caller relies on that."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = parameter(H)

        def forward(self, x):
            x.mul_(self.weight + 1)
            return x.sum(-1, keepdim=True)

    def __init__(self):
        super().__init__()
        self.scale = self.Scale()

    def forward(self, x):
        x = x.clone()
        y = self.scale(x)
        return x + y


class SharedInput(nn.Module):
    """Changes a tensor that all rows share."""

    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = parameter(H)

        def forward(self, x, total):
            total.add_(self.weight)
            return x + total

    def __init__(self):
        super().__init__()
        self.add = self.Add()

    def forward(self, x):
        total = torch.zeros(H)
        return self.add(self.add(x, total), total)


@dataclass
class Box:
    """What pytrees do not open."""

    value: torch.Tensor


class Boxed(nn.Module):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = parameter(H, H)

        def forward(self, box):
            return Box(box.value @ self.weight)

    def __init__(self):
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x):
        return self.inner(Box(x)).value


class Cached(nn.Module):
    """Keeps what it saw in an object it is given."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = parameter(H, H)

        def forward(self, x, cache):
            cache.kept = (
                torch.cat([cache.kept, x @ self.weight]) if hasattr(cache, "kept") else x @ self.weight
            )
            return cache.kept[-x.shape[0] :]

    def __init__(self):
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x):
        class Cache:
            pass

        cache = Cache()
        return self.inner(x, cache) + self.inner(x, cache)


class AuxiliaryScalar(nn.Module):
    """Returns a number of the whole batch, that nobody uses."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = parameter(H, H)

        def forward(self, x):
            y = x @ self.weight
            return y, y.pow(2).mean()

    def __init__(self):
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x):
        return self.inner(x)[0]


class UsedScalar(AuxiliaryScalar):
    def forward(self, x):
        y, mixed = self.inner(x)
        return y + mixed


class Unread(nn.Module):
    def __init__(self):
        super().__init__()
        self.spare, self.inner = nn.Linear(H, H), nn.Linear(H, H)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    "body, site",
    [
        (RowsInDimOne, "body.inner"), (Heads, "body.inner"), (HeadMajor, "body"), (Ragged, "body"),
        (TurnedTable, "body"), (Positions, "body.table"), (FlatPositions, "body.table"), (BiasTable, "body"),
        (CountedPositions, "body.table"), (ChildsWeight, "body"), (Transposed, "body"), (WeightNorm, "body.inner"),
        (Twice, "body.inner"), (InPlaceInput, "body.scale"), (SharedInput, "body"),
        (Boxed, "body"), (Cached, "body"), (AuxiliaryScalar, "body.inner"),
    ],
)  # fmt: skip
def test_difficult_modules_are_exact(body, site):
    check(body, site=site)


class Nested(nn.Module):
    """Reads a tensor of its own around children that are called twice, one of them within another site."""

    def __init__(self):
        super().__init__()
        self.gain, self.inner, self.deep = parameter(H), nn.Linear(H, H), Ragged()

    def forward(self, x):
        return self.deep(self.inner(x * (1 + self.gain)) + self.inner(x)) * self.gain


def test_the_note_names_who_was_promoted():
    assert "body.inner" in check(TurnedTable).found.note
    assert "body.inner does not keep rows in order: body works per probe" in check(HeadMajor).found.note


def test_sites_within_a_site_keep_scratch_small():
    made = check(Nested, site="body")
    outer = {s.name: [t.name for t in s.trained] for s in made.found.sites if s.outer}
    assert outer["body"] == ["body.gain"]
    assert {"body.inner", "body.deep.gate", "body.deep.experts.0"} <= {
        s.name for s in made.found.sites if not s.outer
    }
    # Two probes of the head (99 x 8 and 99 numbers of 4 bytes, each rounded up to 64); the body needs less.
    assert made.axis.scratch_bytes == 2 * (3200 + 448)
    assert [a.numel() for a in made.axis._arenas] == [made.axis.scratch_bytes]


def test_a_number_that_mixes_rows_is_not_stacked():
    # In a plain forward of rows it is what it is; stacked, it would be another number.
    check(UsedScalar, stacked=False)


def test_a_loss_that_mixes_rows_is_not_stacked():
    def mixed(model, b):
        per_row = losses(model, b)
        return per_row + per_row.mean()

    made = check(Transposed, stacked=False, run=mixed)
    assert "stacked losses differ" in made.found.note


def test_a_module_that_takes_its_rows_in_portions_is_not_stacked():
    # Two and four rows are one portion each, which looks like any other module; eight are two.
    assert "call 2 of a forward" in check(Chunked, stacked=False).found.note


def test_tensors_that_no_forward_reads_are_named():
    b = batch()
    made = make(Net(Unread), b)
    assert [t.name for t in made.found.unread] == ["body.spare.weight", "body.spare.bias"]
    assert made.found.stacked


class Alias(nn.Module):
    """Reads the memory of its weight through a tensor made at the start."""

    def __init__(self):
        super().__init__()
        self.weight = parameter(H, H)
        self.kept = []

    def forward(self, x):
        return x @ (self.weight + self.kept[0])


def test_a_kept_alias_is_refused_by_name():
    b = batch()
    net = Net(Alias)
    net.body.kept.append(net.body.weight.detach().view(-1).view(H, H))
    with pytest.raises(
        UserError, match=r"body reads body\.weight through a tensor it has kept.*perturb=inplace"
    ):
        make_uncopied(net, b)


def make_uncopied(net, b):
    trained = space.adopt(net, space.train_names(net, "all"))
    return proof.find_sites(net, trained, lambda x: losses(net, x), b.first(2), b, EPS)


class Lazy(nn.Module):
    """Keeps something made from its weight when first called."""

    def __init__(self):
        super().__init__()
        self.weight, self.kept = parameter(H, H), None

    def forward(self, x):
        if self.kept is None:
            self.kept = self.weight * 2
        return x @ self.kept


def test_what_is_kept_after_the_first_forward_counts_as_unread():
    found = make_uncopied(Net(Lazy), batch())
    assert [t.name for t in found.unread] == ["body.weight"]


class Opaque(torch.autograd.Function):
    """Reads its weight in a way that no torch function shows."""

    @staticmethod
    def forward(ctx, x, weight):
        return torch.from_numpy(x.detach().numpy() @ torch.utils.dlpack.from_dlpack(weight.detach()).numpy())


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = parameter(H, H)

    def forward(self, x):
        return Opaque.apply(x, self.weight)


class Secret(nn.Module):
    """Reads its weight from C, so that nothing in Python sees it."""

    def __init__(self):
        super().__init__()
        self.weight = parameter(H, H)

    def forward(self, x):
        with torch._C.DisableTorchFunction():
            return x @ self.weight


def test_functions_of_autograd_are_exact_or_refused():
    b = batch()
    for body in (Hidden, Secret):
        try:
            made = make(Net(body), b)
        except UserError as error:
            assert "body" in str(error) and "inplace" in str(error)
            continue
        assert not made.found.unread
        expected = twin(made.untouched, made.trained, b, PROBES)
        assert off(made.losses(b, PROBES), expected) < 1e-5 < apart(expected)


def test_a_read_that_python_cannot_see_is_refused():
    with pytest.raises(UserError, match="first seen in body"):
        make(Net(Secret), batch())


def test_random_forwards_are_run_one_probe_at_a_time():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(H, H)

        def forward(self, x):
            return F.dropout(self.inner(x), 0.3, training=True)

    found = make_uncopied(Net(Noisy), batch())
    assert not found.stacked and "from one forward to the next" in found.note


ROWS_OF = site_forwards._rows_of


def swapped(flat, call, index, count, name=""):
    return ROWS_OF(flat, call, count - 1 - index if count > 1 else index, count, name)


def shifted(flat, call, index, count, name=""):
    return ROWS_OF(flat, call, (index + 1) % count, count, name)


def first_only(flat, call, index, count, name=""):
    return ROWS_OF(flat, call, 0, count, name)


@pytest.mark.parametrize("wrong", [swapped, shifted, first_only])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", ["all", "norms"])
def test_the_proof_sees_rows_given_to_the_wrong_probe(monkeypatch, wrong, dtype, train):
    # Norms work through _rows_of, and are few and small: in 16 bits at eps they would hardly show.
    model, b = zoo("llama").to(dtype), batch()
    trained = space.adopt(model, space.train_names(model, train))

    def found():
        return proof.find_sites(model, trained, lambda x: losses(model, x), b.first(2), b, 1e-3)

    assert found().stacked
    monkeypatch.setattr(site_forwards, "_rows_of", wrong)
    broken = found()
    assert not broken.stacked and "stacked losses differ" in broken.note


def test_the_proof_sees_results_joined_in_the_wrong_order(monkeypatch):
    join = site_forwards._join
    monkeypatch.setattr(site_forwards, "_join", lambda parts, *rest: join(parts[::-1], *rest))
    found = make_uncopied(zoo("llama"), batch())
    assert not found.stacked and "stacked losses differ" in found.note


def test_a_batch_unlike_the_calibrated_one_is_refused_not_guessed():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = parameter(H)

        def forward(self, x, extra=None):
            return x * (self.weight + 1) + (0 if extra is None else extra)

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.extra = Optional(), None

        def forward(self, x):
            return self.inner(x, extra=None if self.extra is None else self.extra(x))

    b = batch()
    made = make(Net(Body), b)
    made.model.body.extra = lambda x: x * 0.5  # differs between probes: its rows cannot be told afterwards
    with pytest.raises(layout.Unfit, match="absent"):
        made.losses(b, PROBES)
    made.model.body.extra = lambda x: torch.ones(x.shape[0], 1, 1)  # as a mask: the same for every probe
    made.untouched.body.extra = made.model.body.extra
    assert off(made.losses(b, PROBES), twin(made.untouched, made.trained, b, PROBES)) < 1e-5


class SometimesShared(nn.Module):
    """Positions of every row where the mask tells them apart, else one row for all."""

    def __init__(self):
        super().__init__()
        self.table, self.gain = nn.Embedding(32, H), Gain()

    def forward(self, x):
        rows, length, _ = x.shape
        places = torch.arange(length).expand(rows, -1) if rows % 2 == 0 else torch.arange(length)[None]
        return x + self.gain(self.table(places))


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = parameter(H)

    def forward(self, x):
        return x * (self.weight + 1)


def test_rows_may_later_be_shared():
    # Five probes of three rows are fifteen: [1, 10] positions must not be dealt out to the probes.
    b, other = batch(), batch(rows=3, length=10, seed=2)
    made = make(Net(SometimesShared), b)
    assert made.found.stacked
    for data in (b, other):
        assert off(made.losses(data, PROBES), twin(made.untouched, made.trained, data, PROBES)) < 1e-5


def test_reads_are_values_not_shapes():
    model = nn.Linear(3, 2)
    trained = space.adopt(model, ["weight", "bias"])

    def forward():
        assert (
            model.weight.shape == (2, 3) and model.weight.dtype == torch.float32 and model.weight.dim() == 2
        )
        return model.bias.data.sum()

    assert [i for i, _ in sites.watch(model, trained, forward).stacks] == [1]


def test_sampling_finds_a_few_swapped_rows():
    x = torch.randn(64, 500)
    y = torch.cat([x, torch.randn(64, 500)])
    a = layout.leaf(x)
    assert layout.dims([a], [layout.leaf(y, a)]) == [0]
    y[:8] = y[:8].flip(0)
    assert layout.dims([a], [layout.leaf(y, a)]) == "does not keep rows in order"
    assert a.sample.numel() == layout.SAMPLES


def test_batches_of_the_proof_are_not_changed():
    b = batch()
    before = {k: v.clone() for k, v in b.inputs.items()}
    make(zoo("opt"), b)
    assert all(torch.equal(v, before[k]) for k, v in b.inputs.items())
    assert isinstance(b, Batch)
