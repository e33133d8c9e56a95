"""Tokenizers for tests of conversations: every byte a token, and chat templates of the kinds that models have."""

import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The system turn is put into the first question, answers are bare and end in EOS.
BRACKETS = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set sys = '<<' + messages[0].content + '>>\n' %}"
    "{% else %}{% set rest = messages %}{% set sys = '' %}{% endif %}{{ bos_token }}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must take turns') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[Q] ' + (sys if loop.first else '') + m.content.strip() + ' [/Q]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' </s>' }}{% endif %}{% endfor %}"
)
# No system turns, answers are the model's, texts are trimmed.
TRIMMED = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    "{% for m in messages %}{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
# The system turn comes with the last question.
LATE = (
    "{% set sys = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages if m.role != 'system' %}"
    "{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}"
    "{% if m.role == 'user' %}{{ '[Q]' + (sys + '\n' if sys and m == last else '') + m.content + '[/Q]' }}"
    "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)
# An empty thought before the last answer, and thoughts taken out of the others.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What is asked last is marked.
HASTY = CHATML.replace("m.content +", "m.content + (' !' if loop.last and m.role == 'user' else '') +")
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '.\n' }}" + CHATML
DEAF = CHATML.replace("in messages %}", "in messages if m.role != 'system' %}")
SHOUTING = CHATML.replace("m.content", "m.content | upper")
ENDLESS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# As authors mark what the model is to say.
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<turn>", "<end>"]


def tokenizer(template=CHATML, eos="<|im_end|>", merges=(), bos=False, lower=False):
    """Byte-level: reads any text, and knows where each token stands in it. bos: put before every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL, *letters, *(a + b for a, b in merges)]
    core = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    if lower:
        core.normalizer = normalizers.Lowercase()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, pad_token="<s>", chat_template=template
    )


def spaced(template):
    """Letters and words that begin with a blank, as of SentencePiece; every text begins with one."""
    letters = sorted(map(chr, range(33, 127)))
    words = ["<s>", "</s>", "▁", "\n", *letters, *("▁" + c for c in letters)]
    core = Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[("▁", c) for c in letters])
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.add_special_tokens(["<s>", "</s>"])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def runs(example, tokenizer):
    """The texts that are scored, one for each stretch of scored tokens."""
    marks = example.scored or (True,) * len(example.completions[0])
    found, held = [], []
    for token, mark in [*zip(example.completions[0], marks), (None, False)]:
        if mark:
            held.append(token)
        elif held:
            found.append(tokenizer.decode(held))
            held = []
    return found


def whole(example, tokenizer):
    return tokenizer.decode([*example.contexts[0], *example.completions[0]])
