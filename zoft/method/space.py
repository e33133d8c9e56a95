"""The space: which tensors are trained, and in which precision each is stored and computed with."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from zoft.config.schema import ADAPTERS
from zoft.errors import UserError
from zoft.limits import PATTERN_SECONDS, at_most_seconds
from zoft.method.blocks import Turn
from zoft.method.rules import Rule
from zoft.models.kind import ADDED, after, blocks_of, own_name
from zoft.models.quant.linear import FLOOR, Scales
from zoft.noise.noise import width_of
from zoft.noise.spec import Mask, tensor_id

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP16_MAX = 65504.0
# A trained set below this share of the model is kept in fp32: it costs nothing and needs no stochastic rounding.
SMALL_SHARE = 0.02


@dataclass
class Trained:
    """One trained tensor: θ in its storage dtype (the only truth) and what probing it needs."""

    name: str
    param: nn.Parameter
    stored: torch.Tensor  # θ, storage dtype; between forwards param.data is this very tensor
    compute: torch.dtype  # dtype of θ + s·z in a forward
    id: int  # counter word that separates its noise from that of other tensors
    decays: bool  # weight decay applies (not to biases and norms)
    step: int = 0  # updates of steps < step are in `stored`
    momentum: torch.Tensor | None = None  # fp32 (fp64 for fp64 storage), like stored
    floor: float | None = None  # no update brings an element below it
    mask: Mask | None = None  # which elements move; None: all
    turn: Turn | None = None  # the steps at which it moves; None: all
    width: int = 0  # by which it is a matrix for rank1 and flipped noise; 0: signs per element
    rule: Rule | None = None  # how an update moves it; None: by the fused pass
    base: torch.Tensor | None = None  # θ₀, like stored, where steps are pulled towards it
    state: dict[str, torch.Tensor] = field(default_factory=dict)  # the rule's buffers, and "t", int64 [1]

    @property
    def threshold(self) -> float | None:
        """|θ| beyond which an element stays: what moves depends on the weights. None: it does not."""
        return self.mask.threshold if self.mask else None


def train_names(model: nn.Module, train: str, linear: bool = False) -> list[str]:
    """Canonical names of the tensors that `train` selects.

    train: `all`; `upper` (matrices of the linear layers of the upper half of the blocks); `last-K` (the last K blocks and what follows them, head excluded); `norms`; `bias`;
    `head` (the output matrix, tied or not); `scales` (of quantised layers);
    `lora`, `prefix`, `prompt`: the adapter that the model has been given, which nothing else selects;
    anything else is a regular expression searched in the names.
    linear: only matrices of linear layers; what a pattern selects beside them is refused, and so are other sets.
    Ties count once, under their first name. Raises UserError when nothing is selected.
    """
    params = dict(model.named_parameters())  # ties removed: first name wins
    floating = [
        n for n, p in params.items() if p.is_floating_point() and bool(ADDED.search(n)) == (train in ADAPTERS)
    ]
    if train == "all":
        chosen = floating
    elif match := re.fullmatch(r"last-(\d+)", train):
        prefix, blocks = blocks_of(model)
        k = int(match[1])
        if not 1 <= k <= len(blocks):
            raise UserError(
                f"train={train}: the model has {len(blocks)} blocks; use last-1 to last-{len(blocks)}"
            )
        starts = tuple(f"{prefix}.{i}." for i in range(len(blocks) - k, len(blocks)))
        chosen = [n for n in floating if n.startswith(starts) or n in after(model, prefix)]
    elif train == "upper":
        prefix, blocks = blocks_of(model)
        starts = tuple(f"{prefix}.{i}." for i in range(len(blocks) // 2, len(blocks)))
        linears = linear_matrices(model)
        chosen = [n for n in floating if n.startswith(starts) and n in linears]
    elif train == "norms":
        chosen = [n for n in floating if params[n].ndim == 1 and not n.endswith("bias")]
    elif train == "bias":
        chosen = [n for n in floating if n.endswith("bias")]
    elif train == "head":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        own = {id(p) for p in head.parameters()} if head is not None else set()
        chosen = [n for n in floating if id(params[n]) in own]
    elif train in ADAPTERS:
        chosen = floating
    elif train == "scales":
        chosen = [n for n in floating if isinstance(params[n], Scales)]
        if not chosen:
            raise UserError(
                "train=scales: no layer of this model is quantised; set bits=4, or take such a model"
            )
    else:
        try:
            pattern = re.compile(train)
        except re.error as error:
            raise UserError(
                f"train={train!r} is not a regular expression ({error}); use all, last-2, norms, …"
            ) from None
        with at_most_seconds(
            PATTERN_SECONDS,
            f"train={train!r}: this pattern takes more than {PATTERN_SECONDS:g} s to look for in the names of tensors; "
            "write a simpler one",
        ):
            chosen = [n for n in floating if pattern.search(own_name(n))]
    if not chosen:
        near = difflib.get_close_matches(
            train, ["all", "norms", "bias", "head", "scales", *floating], n=1, cutoff=0.3
        )
        hint = f"; nearest: {near[0]}" if near and near[0] != train else ""
        raise UserError(
            f"train={train!r} selects no tensor of this model; use all, last-2, norms, bias, head or a pattern{hint}"
        )
    return only_linear(model, train, chosen) if linear else chosen


def only_linear(model: nn.Module, train: str, chosen: list[str]) -> list[str]:
    """Return the matrices of linear layers among `chosen`. Raises UserError where `train` asks for others by name."""
    linears = linear_matrices(model)
    found = [n for n in chosen if n in linears]
    whole = train in ("all", "upper") or re.fullmatch(r"last-\d+", train) is not None
    if found and (whole or len(found) == len(chosen)):
        return found
    other = next(n for n in chosen if n not in linears)
    raise UserError(
        f"train={train}: {other} is no matrix of a linear layer, and perturb=nodes trains nothing else; "
        "use upper, last-2, all, or a pattern of matrices"
    )


def linear_matrices(model: nn.Module) -> set[str]:
    """Return the names of the matrices of linear layers, the output matrix aside."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables |= {id(p) for p in head.parameters()} if head is not None else set()
    layers = {
        id(m.weight)
        for m in model.modules()
        if type(m) is nn.Linear or (type(m).__name__ == "Conv1D" and getattr(m, "weight", None) is not None)
    }
    return {n for n, p in model.named_parameters() if id(p) in layers - tables and p.ndim == 2}


def resolve_dtypes(
    model: nn.Module, names: list[str], storage: str, compute: str, device: str
) -> tuple[str, str]:
    """`auto` made plain: (storage, compute) by name.

    fp32 both for an fp32 model or on a CPU; on a GPU a 16-bit model computes in bf16 and stores trained
    matrices in fp16 (eight times bf16's grid in the same memory), or in fp32 where the set is small. Scales of
    quantised layers are fp32 whatever is said here, and do not count, nor do adapters.
    """
    params = {n: p for n, p in model.named_parameters() if not (isinstance(p, Scales) or ADDED.search(n))}
    names = [n for n in names if n in params]
    widest = max(
        (params[n].element_size() for n in names or params if params[n].is_floating_point()), default=4
    )
    full = widest >= 4 or device == "cpu"
    if compute == "auto":
        compute = "fp64" if widest == 8 else "fp32" if full else "bf16"
    if storage == "auto":
        small = sum(params[n].numel() for n in names) < SMALL_SHARE * sum(p.numel() for p in params.values())
        storage = "fp64" if widest == 8 else "fp32" if full or small else "fp16"
    return storage, compute


def adopt_tensor(name: str, param: nn.Parameter) -> Trained:
    """A tensor as Trained, in the precision it has; its memory becomes contiguous."""
    param.data = param.data.contiguous()
    decays = param.ndim > 1 and not _no_decay(name)
    floor = FLOOR if isinstance(param, Scales) and not param.logged else None
    # Adapters and scales are small: signs per element cost nothing there and have less variance.
    width = 0 if isinstance(param, Scales) or ADDED.search(name) else width_of(param.shape)
    return Trained(name, param, param.data, param.dtype, tensor_id(name), decays, floor=floor, width=width)


def adopt(model: nn.Module, names: list[str]) -> list[Trained]:
    """The named tensors as Trained, out of autograd's hands, still in the precision they were loaded in.

    Raises UserError for two names with one noise id.
    """
    wanted, ids, trained = set(names), dict[int, str](), []
    for name, param in model.named_parameters():
        param.requires_grad_(False)
        if name not in wanted:
            continue
        tid = tensor_id(name)
        if tid in ids:
            raise UserError(
                f"train: tensors {ids[tid]} and {name} share one noise id; train one of them only"
            )
        ids[tid] = name
        trained.append(adopt_tensor(name, param))
    assert len(trained) == len(wanted), (
        len(trained),
        len(wanted),
        sorted(wanted - {t.name for t in trained})[:3],
    )
    return trained


def place_in_precision(
    model: nn.Module, trained: list[Trained], storage: str, compute: str, *, uniform: bool = False
) -> None:
    """Give every tensor its precision: trained matrices stored in `storage`, everything else ready for `compute`.

    1-D trained tensors are stored in fp32 at least: a step of 1e-6 on a norm weight of size 1 is far below
    what 16 bits can hold; so are scales of quantised layers, trained or not, and they are probed in it, too. Other
    frozen tensors of another floating-point dtype are cast to `compute`.
    uniform: 1-D tensors follow the matrices, for a model that runs on its stored weights (perturb=inplace).
    Raises UserError for values outside fp16's range.
    """
    comp = DTYPES[compute]
    ours = {id(t.param) for t in trained}
    for t in trained:
        store_in_precision(t, storage, uniform=uniform)
        t.compute = t.stored.dtype if isinstance(t.param, Scales) else comp
    for param in model.parameters():
        if id(param) not in ours and frozen_dtype(param, compute, True) != param.dtype:
            _cast(param, comp)
    for owner, key, buffer in float_buffers(model):
        owner._buffers[key] = buffer.to(frozen_dtype(buffer, compute, False))


def frozen_dtype(tensor: torch.Tensor, compute: str, parameter: bool) -> torch.dtype:
    """The dtype that a tensor which is not trained has while the model runs in `compute`.

    Rotary tables and the like are buffers that their models keep in fp32 on purpose; only 16-bit ones follow. Scales
    of quantised layers are what their codes are worth: they keep their own.
    """
    if isinstance(tensor, Scales):
        return tensor.dtype
    follows = DTYPES.values() if parameter else (torch.bfloat16, torch.float16)
    return DTYPES[compute] if tensor.dtype in follows else tensor.dtype


def store_in_precision(t: Trained, storage: str, *, uniform: bool = False) -> None:
    """Keep one tensor in the dtype that `storage` has for it; see `place`."""
    dtype = DTYPES[storage]
    wide = isinstance(t.param, Scales) or (t.param.ndim <= 1 and not uniform)
    if wide and dtype != torch.float64:
        dtype = torch.float32
    if dtype == torch.float16 and t.param.numel() and _largest(t.param.data) > FP16_MAX:
        raise UserError(
            f"storage=fp16: {t.name} holds values beyond {FP16_MAX:g}; use storage=bf16 or storage=fp32"
        )
    _cast(t.param, dtype)
    t.stored = t.param.data


_PIECE = 1 << 24  # numbers that are in two dtypes at one time


def _largest(x: torch.Tensor) -> float:
    """max |x|, without a copy of x."""
    low, high = x.aminmax()
    return max(-float(low), float(high))


def _cast(param: nn.Parameter, dtype: torch.dtype) -> None:
    """Give a parameter another dtype; in its own memory where that fits and nobody else looks at it, so that of a large
    one no second copy exists."""
    x = param.data
    if x.dtype.itemsize != dtype.itemsize or x.numel() <= _PIECE or not x.is_contiguous() or _shared(x):
        param.data = x.to(dtype)
        return
    old, new = x.flatten(), x.view(dtype).flatten()
    for i in range(0, x.numel() if x.dtype != dtype else 0, _PIECE):
        new[i : i + _PIECE] = old[i : i + _PIECE].to(dtype)
    param.data = x.view(dtype)


def _shared(x: torch.Tensor) -> bool:
    """Say whether others use the memory of x, a parameter's data: more hold it than hold that of a new one."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:
        return True
    new = nn.Parameter(torch.empty(1), requires_grad=False)
    y = new.data
    return count(x.untyped_storage()._cdata) > count(y.untyped_storage()._cdata)


def _no_decay(name: str) -> bool:
    return bool(re.search(r"bias$|\.scales$|norm|(^|[._])ln[._\d]", name.lower()))


def float_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """(module, key, buffer) of every buffer that holds fractions."""
    for module in model.modules():
        for key, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_floating_point():
                yield module, key, buffer
