"""Tiny models and a tiny tokenizer, from config and by hand: nothing is downloaded."""

import json
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, processors

# Every character is a token; merges such as "ab" and " no" can swallow a prompt's end.
MERGES = [("a", "b"), ("n", "o"), (" ", "no"), ("e", "s"), ("y", "es"), (" ", "y")]
WORDS = ["<pad>", "<bos>", "<eos>", *" abcdenoyst:.0123456789", "es", "ab", "no", " no", "yes", " y"]
VOCAB = len(WORDS)
ROWS = [{"text": "bad no " * (i % 3) + str(i), "label": "ab"[i % 2]} for i in range(60)]


def tokenizer(bos: bool = True, eos: bool = False):
    core = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(WORDS)}, merges=MERGES))
    core.decoder = decoders.Fuse()
    left, right = ("<bos> " if bos else ""), (" <eos>" if eos else "")
    core.post_processor = processors.TemplateProcessing(
        single=f"{left}$A{right}", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def ids(*words: str) -> tuple[int, ...]:
    return tuple(WORDS.index(w) for w in words)


def llama(tie: bool = False, **extra):
    config = hf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=tie, initializer_range=0.3, **extra,
    )  # fmt: skip
    return build(hf.LlamaForCausalLM, config)


def opt():
    config = hf.OPTConfig(
        vocab_size=VOCAB, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, init_std=0.3, dropout=0.1, pad_token_id=0,
    )  # fmt: skip
    return build(hf.OPTForCausalLM, config)


def gpt2():
    config = hf.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3
    )
    return build(hf.GPT2LMHeadModel, config)


def gemma2():
    config = hf.Gemma2Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, final_logit_softcapping=3.0,
        initializer_range=0.3,
    )  # fmt: skip
    return build(hf.Gemma2ForCausalLM, config)


MODELS = {"llama": llama, "opt": opt, "gpt2": gpt2, "gemma2": gemma2}


def build(kind, config):
    torch.manual_seed(0)
    return kind(config).eval().requires_grad_(False)


def save(folder: Path) -> None:
    """A checkpoint's folder: a model and its tokenizer."""
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def write_rows(file: Path, rows=ROWS) -> None:
    file.write_text("\n".join(map(json.dumps, rows)))


def place(folder: Path, settings: str, choices: str = "{a: a, b: b}") -> Path:
    """A folder to train in: the model tiny/, data.jsonl, and mine.yaml, which names both and has these lines."""
    save(folder / "tiny")
    write_rows(folder / "data.jsonl")
    task = f"{{name: local, train: data.jsonl, prompt: '{{text}} ', label: label, choices: {choices}}}"
    (folder / "mine.yaml").write_text(f"model: tiny\ntask: {task}\n{settings}")
    return folder
