"""Other libraries' quantised layers: their live scales as trained tensors, once each has shown that it is alive.

bitsandbytes (NF4 and FP4: `absmax`; int8: `SCB`), HQQ (`scale`) and gptqmodel (`scales`; folders that GPTQ has written zoft
reads itself, quant_files.py). Scales become fp32 parameters named `scales`; before each of its forwards a layer is given them, in the
dtype that it computes with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zoft.errors import UserError
from zoft.models.quant.linear import Scales, dequantise_layers

NUDGE = 1.5  # what one scale is multiplied with to see whether the layer follows
TOLERANCE = 0.05  # of what it does to the output, which may have 16 bits


def attach_scales(model: nn.Module) -> Iterator[tuple[str, Scales]]:
    """Yield (name, scales) of every quantised layer of a library that is known here, alive and ready to be trained.

    Raises UserError for a layer whose output does not follow its scales.
    """
    for name, module in list(model.named_modules()):
        library = type(module).__module__.partition(".")[0]
        way = WAYS.get(f"{library}.{type(module).__name__}")
        if way is None and library == "gptqmodel" and hasattr(module, "qweight"):
            raise UserError(
                f"train=scales: {name} ({type(module).__name__}) has packed its scales for a kernel of its own; load the "
                "model with gptqmodel's torch or triton backend, or give zoft the folder itself"
            )
        if way is None:
            continue
        found, put, kept = way(module)
        scales = Scales(found.detach().float().clone(), requires_grad=False)
        _enliven(module, scales, put, found.dtype if kept else torch.float32)
        _check(name, module, scales)
        yield f"{name}.scales", scales


def _enliven(module: Any, scales: Scales, put: Callable[[Any, Tensor], None], dtype: torch.dtype) -> None:
    """Make `scales` what the layer computes with: a class of its own, so that a copy of the layer is alive, too."""
    kind = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        put(self, self.scales.to(dtype))
        return kind.forward(self, *args, **kwargs)

    module.__dict__.pop("scales", None)
    module.register_parameter("scales", scales)
    module.__class__ = type(
        kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "put": put}
    )


@torch.no_grad()
def _check(name: str, module: Any, scales: Scales) -> None:
    """One scale times NUDGE: its share of the output, found by setting it to 0, must grow by as much."""
    own = scales.data
    i = int(own.abs().argmax())
    weight = next(module.parameters())
    # Each row of the output is a column of the matrix, so that nothing hides a share of it.
    x = torch.eye(module.in_features, device=weight.device)
    x = x.to(getattr(module, "compute_dtype", None) or torch.float32)
    outputs = []
    for factor in (1.0, 0.0, NUDGE):
        scales.data = own.clone()
        scales.data.view(-1)[i] *= factor
        outputs.append(module(x).double())
    scales.data = own
    share, moved = outputs[0] - outputs[1], outputs[2] - outputs[0]
    off = float((moved - (NUDGE - 1) * share).abs().max() / share.abs().max().clamp(min=1e-30))
    if not share.any() or off > TOLERANCE:
        raise UserError(
            f"train=scales: the output of {name} ({type(module).__name__}) does not follow its scales; quantise the "
            "plain model with bits=4 instead"
        )


# ---- libraries: (the scales, how a layer is given them, whether it wants them in the dtype that they have) ---------


def _bnb_4bit(module: Any) -> tuple[Tensor, Callable, bool]:
    # The forward of a CPU with bf16 instructions would put the scales away as transposed bf16.
    module.support_avx512bf16_for_cpu = False
    state = module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise UserError("train=scales: this model has run already, and its scales are in bf16; load it again")
    if state.nested:
        import bitsandbytes.functional as functional

        state.absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        state.nested, state.state2, state.offset = False, None, None

    def put(layer: Any, scales: Tensor) -> None:
        layer.weight.quant_state.absmax = scales

    return state.absmax, put, False


def _bnb_8bit(module: Any) -> tuple[Tensor, Callable, bool]:
    if module.state.CB is None:
        module.init_8bit_state()

    def put(layer: Any, scales: Tensor) -> None:
        layer.state.SCB = scales

    return module.state.SCB, put, False


def _hqq(module: Any) -> tuple[Tensor, Callable, bool]:
    from hqq.core.quantize import HQQBackend

    module.set_backend(HQQBackend.PYTORCH)  # the compiled ones keep scales of their own

    def put(layer: Any, scales: Tensor) -> None:
        layer.meta["scale"] = scales

    return module.meta["scale"], put, True


def _gptqmodel(module: Any) -> tuple[Tensor, Callable, bool]:
    # These layers read `scales` themselves in each forward, in the precision that it has; what was compiled or kept of
    # the matrix would not follow it.
    module.__dict__.pop("dequantize_weight", None)
    if hasattr(module, "enable_weight_cache"):
        module.enable_weight_cache(False)

    def put(layer: Any, scales: Tensor) -> None:
        if "scales" not in layer._parameters:  # while it is saved
            layer.register_buffer("scales", scales)

    return module._buffers.pop("scales"), put, False


WAYS: dict[str, Callable[[Any], tuple[Tensor, Callable, bool]]] = {
    "bitsandbytes.Linear4bit": _bnb_4bit,
    "bitsandbytes.Linear8bitLt": _bnb_8bit,
    "hqq.HQQLinear": _hqq,
    **{
        f"gptqmodel.{n}": _gptqmodel
        for n in ("TorchLinear", "TritonV2Linear", "TorchQuantLinear", "TritonV2QuantLinear")
    },
}


def other_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers of the libraries that are known here, attached or not, by name."""
    kinds = ((n, m, type(m)) for n, m in model.named_modules())
    return {n: m for n, m, kind in kinds if f"{kind.__module__.partition('.')[0]}.{kind.__name__}" in WAYS}


def keep_other_layers(model: nn.Module) -> None:
    """Keep frozen layers as they were loaded: a CPU with bf16 instructions would repack them, scales in bf16, and what a run
    saves would be another model."""
    for layer in other_layers(model).values():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


@torch.no_grad()
def dense(layer: Any) -> Tensor:
    """Return the matrix [out, in] that a layer stands for, in fp32."""
    if hasattr(layer, "state") and hasattr(
        layer.state, "SCB"
    ):  # int8, whose products round their inputs, too
        if layer.state.CB is None:
            layer.init_8bit_state()
        scales = layer.scales.detach() if "scales" in layer._parameters else layer.state.SCB
        return layer.state.CB.float() * scales.float()[:, None] / 127
    device = next(t for t in [*layer.parameters(), *layer.buffers()]).device
    x = torch.eye(
        layer.in_features, device=device, dtype=getattr(layer, "compute_dtype", None) or torch.float32
    )
    y = layer(x).float()  # [in, out]
    return (y if layer.bias is None else y - layer(torch.zeros_like(x[:1])).float()).T.contiguous()


# What a model in memory says of the library that quantised it.
_MARKS = (
    "hf_quantizer",
    "quantization_method",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "_weight_conversions",
)


@contextmanager
def plain_form(model: Any, keep: bool = False) -> Iterator[None]:
    """Turn such layers, for the time of a save (keep: for good), into nn.Linear with their dequantised weights, in fp32, and
    nothing says that the model was quantised."""
    found = other_layers(model)
    marks = {k: model.__dict__.pop(k) for k in _MARKS if found and k in model.__dict__}
    told = model.config.__dict__.pop("quantization_config", None) if found else None

    def place(name: str, module: nn.Module) -> None:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, module)

    try:
        for name, layer in found.items():
            linear = nn.Linear(
                layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
            )
            linear.weight = nn.Parameter(dense(layer), requires_grad=False)
            if layer.bias is not None:
                linear.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
            place(name, linear.eval())
        yield
    finally:
        if not keep:
            for name, layer in found.items():
                place(name, layer)
            model.__dict__.update(marks)
            if told is not None:
                model.config.quantization_config = told


def dequantise_other_layers(model: nn.Module) -> None:
    """Put plain layers with the dequantised weights, in fp32, where quantised ones are, whoever made them."""
    dequantise_layers(model)
    with plain_form(model, keep=True):
        pass


def alive(model: nn.Module) -> dict[str, Any]:
    """Return the layers whose scales were attached, by name."""
    return {n: m for n, m in model.named_modules() if hasattr(type(m), "put")}


@contextmanager
def own_form(model: nn.Module) -> Iterator[None]:
    """Show such layers, for the time of a save, as their library knows them, with the scales as they are now."""
    found = {layer: layer.scales for layer in alive(model).values()}
    try:
        for layer, scales in found.items():
            del layer.scales
            type(layer).put(layer, scales.detach())
        yield
    finally:
        for layer, scales in found.items():
            layer._buffers.pop("scales", None)
            layer.register_parameter("scales", scales)
