"""Tiny models of many kinds, and the independent twin of the probe axis: weights really set to θ + s·z."""

import copy
import inspect
from dataclasses import dataclass

import torch
import transformers as hf

from zoft.method import space
from zoft.method.estimators.estimator import Probe
from zoft.noise import noise
from zoft.noise.spec import GAUSSIAN, RADEMACHER
from zoft.probe import proof
from zoft.probe.axis import ProbeAxis

VOCAB, SEED, STEP = 99, 11, 5
EPS = 1e-2
PROBES = [Probe(0, EPS), Probe(0, -EPS), Probe(1, EPS), Probe(1, -EPS), Probe(1, 8 * EPS)]
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}  # fmt: skip
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass
class Batch:
    inputs: dict  # name -> [rows, T]

    @property
    def rows(self):
        return self.inputs["input_ids"].shape[0]

    def repeat(self, probes):
        return Batch({k: v.repeat(probes, *[1] * (v.ndim - 1)) for k, v in self.inputs.items()})

    def first(self, rows):
        return Batch({k: v[:rows].clone() for k, v in self.inputs.items()})


def batch(side="right", rows=4, length=9, decoder=False, seed=0):
    """Random tokens, every other row padded by three ("none": no row)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.int64)
    if side != "none":
        mask[1::2, slice(-3, None) if side == "right" else slice(3)] = 0
    ids[mask == 0] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if decoder:
        inputs["decoder_input_ids"] = torch.randint(5, VOCAB, (rows, length - 2), generator=generator)
    return Batch(inputs)


def losses(model, b):
    """[rows]: a number a row from its logits."""
    takes = inspect.signature(type(model).forward).parameters
    out = model(**b.inputs, **({"use_cache": False} if "use_cache" in takes else {}))
    logits = out.logits if hasattr(out, "logits") else out
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ids = b.inputs.get("decoder_input_ids", b.inputs["input_ids"])
    picked = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]  # [rows, T]
    if "decoder_input_ids" not in b.inputs and "attention_mask" in b.inputs:
        picked = picked * b.inputs["attention_mask"]
    return -picked.mean(-1)


@torch.no_grad()
def twin(untouched, trained, b, probes, kind="gaussian", run=losses):
    """[P, rows]: an untouched copy of the model, θ + s·z written into its weights, run plainly."""
    ids = {t.name: (t.id, t.width) for t in trained}
    rows = []
    for p in probes:
        model = copy.deepcopy(untouched)
        for name, param in model.named_parameters():
            if name in ids:
                (tid, width), where = ids[name], {"seed": SEED, "step": STEP, "direction": p.direction}
                z = noise.direction(param.shape, tid, noise=kind, width=width, **where)
                wide = torch.promote_types(param.dtype, torch.float32)
                param.data = (param.data.to(wide) + p.scale * z.to(wide)).to(param.dtype)
        rows.append(run(model, b))
    return torch.stack(rows)


@dataclass
class Made:
    """A model with its sites found, and the untouched copy that the twin needs."""

    model: torch.nn.Module
    untouched: torch.nn.Module
    trained: list
    found: object
    axis: ProbeAxis
    run: object

    @torch.no_grad()
    def losses(self, b, probes, group=None):
        """[P, rows] at the probes, `group` of them in a forward (all of them, or one where sites cannot stack)."""
        group = group or (len(probes) if self.found.stacked else 1)
        out = []
        for i in range(0, len(probes), group):
            here = probes[i : i + group]
            with self.axis.at(STEP, here, b.rows):
                out.append(
                    self.run(self.model, b.repeat(len(here)) if len(here) > 1 else b).view(len(here), -1)
                )
        return torch.cat(out)


def make(model, b, train="all", run=losses, kind="gaussian"):
    model.eval()
    untouched = copy.deepcopy(model)
    names = train if isinstance(train, list) else space.train_names(model, train)
    trained = space.adopt(model, names)
    small, seen = b.first(b.rows // 2), RADEMACHER if kind == GAUSSIAN else kind
    found = proof.find_sites(model, trained, lambda x: run(model, x), small, b, EPS, seen)
    live = proof.live(trained, found)
    return Made(model, untouched, live, found, ProbeAxis(live, found.sites, seed=SEED, kind=kind), run)


def off(got, expected):
    """Largest relative difference of two sets of losses; inf for NaN."""
    return float(((got - expected).abs() / (1 + expected.abs())).nan_to_num(nan=float("inf")).max())


def apart(expected):
    """Smallest relative difference between the losses of two probes: what a mistake would look like."""
    return min(off(expected[i], expected[j]) for i in range(len(expected)) for j in range(i))


def shaken(model):
    """The model with every parameter moved at random, so that each shows in the loss."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data = p.data + torch.randn(p.shape, generator=generator) * (0.1 if p.ndim > 1 else 0.05)
    return model.eval()


def lora():
    import peft

    base = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2, **SPECIAL))
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def opt():
    sizes = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
    return hf.OPTForCausalLM(hf.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, **SPECIAL))


ZOO = {
    "opt": opt,
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, **SPECIAL)
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2, **SPECIAL)),
    "llama-tied": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True, **SPECIAL)
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, **SPECIAL)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=8, **SPECIAL)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, **SPECIAL)
    ),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, **SPECIAL)
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES, **SPECIAL)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**SIZES, **SPECIAL)),
    "modernbert": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(**SIZES, **SPECIAL, cls_token_id=1, sep_token_id=2)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "lora": lora,
}  # fmt: skip


def zoo(name):
    torch.manual_seed(0)
    return shaken(ZOO[name]())
