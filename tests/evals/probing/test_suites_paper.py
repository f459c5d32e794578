"""The 61 tasks: each template on rows with the columns of its source, what is drawn from them, and a build that nothing stops. No network."""

from __future__ import annotations

import base64
import gzip
import json
import random
import re
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

from ksparse.errors import InputError
from ksparse.evals.probing import suites
from ksparse.evals.probing.suites import TASKS, build, read, templates
from ksparse.evals.probing.suites.paper import LANGUAGES, PHRASES
from ksparse.evals.probing.suites.sample import LabelledText, TaskSample
from ksparse.evals.probing.suites.sources import (
    CONVERTED,
    DatasetPart,
    DatasetSource,
    open_source,
)

ROOT = Path(__file__).resolve().parents[3]
TASK = {task.name: task for task in TASKS}
ALL = """amazon sciq truthfulqa mc_taco piqa quail quartz justice virtue utilitarianism deontology commonsense_qa openbookqa base64
wikidata_isalive wikidata_sex_or_gender wikidata_occupation_isjournalist wikidata_occupation_isathlete wikidata_occupation_isactor
wikidata_occupation_ispolitician wikidata_occupation_issinger wikidata_occupation_isresearcher phrase_high-school phrase_living-room
phrase_social-security phrase_credit-card phrase_blood-pressure phrase_prime-factors phrase_social-media phrase_gene-expression phrase_control-group
phrase_magnetic-field phrase_cell-lines phrase_trial-court phrase_second-derivative phrase_north-america phrase_human-rights phrase_side-effects
phrase_public-health phrase_federal-government phrase_third-party phrase_clinical-trials phrase_mental-health social_iqa wic cola gpt2disc
ag_news_world ag_news_sports ag_news_business ag_news_scitech europarl_es europarl_en europarl_fr europarl_nl europarl_it europarl_el europarl_de
europarl_pt europarl_sv jigsaw""".split()


def test_the_names_are_exactly_those_of_the_paper():
    assert [task.name for task in TASKS] == ALL
    assert len(set(ALL)) == 61


# ---- templates ---------------------------------------------------------------------------------------------------


def made(name: str, row: dict, config: str = "") -> list[tuple[str, int]]:
    return [(pair.text, pair.label) for pair in TASK[name].template(config, row)]


CHOICES = {"text": ["dark", "light"], "label": ["A", "B"]}
UTILITARIAN = [
    ("First: I won.\nSecond: I lost.\nThe first is more pleasant than the second.", 1),
    ("First: I lost.\nSecond: I won.\nThe first is more pleasant than the second.", 0),
]
EXAMPLES = [
    ("amazon", {"label": 1, "title": "Good", "content": "I like it."}, [("Good\nI like it.", 1)]),
    (
        "amazon",
        {"label": 0, "text": "Bad\n\nBroken.", "label_text": "negative"},
        [("Bad\n\nBroken.", 0)],
    ),
    (
        "sciq",
        {
            "question": "What is wet?",
            "correct_answer": "water",
            "distractor1": "sand",
            "distractor2": "",
            "distractor3": "air",
            "support": "…",
        },
        [("What is wet? water", 1), ("What is wet? sand", 0), ("What is wet? air", 0)],
    ),
    (
        "truthfulqa",
        {
            "question": "Do pigs fly?",
            "best_answer": "No",
            "correct_answers": ["No", "I have no comment."],
            "incorrect_answers": ["Yes"],
        },
        [("Do pigs fly? No", 1), ("Do pigs fly? Yes", 0)],
    ),
    (
        "mc_taco",
        {
            "sentence": "He slept.",
            "question": "How long?",
            "answer": "8 hours",
            "label": 1,
            "category": 0,
        },
        [("He slept. How long? 8 hours", 1)],
    ),
    (
        "mc_taco",
        {"sentence": "He slept.", "question": "How long?", "answer": "a second", "label": "no"},
        [("He slept. How long? a second", 0)],
    ),
    (
        "piqa",
        {"goal": "Dry it.", "sol1": "Use water.", "sol2": "Use a towel.", "label": 1},
        [("Dry it. Use a towel.", 1), ("Dry it. Use water.", 0)],
    ),
    ("piqa", {"goal": "Dry it.", "sol1": "Use water.", "sol2": "Use a towel.", "label": -1}, []),
    (
        "quail",
        {
            "context": "Ann ran.",
            "question": "Who ran?",
            "answers": ["not enough information", "Ann", "Bob", "Tom"],
            "correct_answer_id": 1,
        },
        [
            ("Ann ran.\nWho ran? Ann", 1),
            ("Ann ran.\nWho ran? Bob", 0),
            ("Ann ran.\nWho ran? Tom", 0),
        ],
    ),
    (
        "quail",
        {
            "context": "Ann ran.",
            "question": "Why?",
            "answers": ["not enough information", "Ann", "Bob", "Tom"],
            "correct_answer_id": 0,
        },
        [],
    ),
    (
        "quartz",
        {"para": "Night is dark.", "question": "Night is", "choices": CHOICES, "answerKey": "A"},
        [("Night is dark.\nNight is dark", 1), ("Night is dark.\nNight is light", 0)],
    ),
    ("justice", {"label": 0, "scenario": "I deserve it."}, [("I deserve it.", 0)]),
    (
        "virtue",
        {"label": 1, "scenario": "She shared. [SEP] generous"},
        [("She shared. This person is generous", 1)],
    ),
    (
        "virtue",
        {"label": 0, "scenario": "She shared.", "trait": "greedy"},
        [("She shared. This person is greedy", 0)],
    ),
    ("utilitarianism", {"baseline": "I won.", "less_pleasant": "I lost."}, UTILITARIAN),
    ("utilitarianism", {"activity": "I won.", "baseline": "I lost.", "rating": 0}, UTILITARIAN),
    (
        "deontology",
        {"label": 1, "scenario": "Will you cook?", "excuse": "No, I am ill."},
        [("Will you cook? No, I am ill.", 1)],
    ),
    (
        "commonsense_qa",
        {"question": "Is snow hot?", "answer": "no", "confidence": 1.0},
        [("Is snow hot?", 0)],
    ),
    (
        "openbookqa",
        {"question_stem": "Night is", "choices": CHOICES, "answerKey": "B"},
        [("Night is light", 1), ("Night is dark", 0)],
    ),
    (
        "openbookqa",
        {
            "question_stem": "Night is",
            "choices": [{"text": "dark", "label": "A"}],
            "answerKey": "A",
        },
        [("Night is dark", 1)],
    ),
    (
        "social_iqa",
        {
            "context": "Al fell.",
            "question": "How is Al?",
            "answerA": "sad",
            "answerB": "glad",
            "answerC": "rich",
            "label": "1",
        },
        [
            ("Al fell. How is Al? sad", 1),
            ("Al fell. How is Al? glad", 0),
            ("Al fell. How is Al? rich", 0),
        ],
    ),
    (
        "wic",
        {
            "word": "bank",
            "sentence1": "A river bank.",
            "sentence2": "A bank clerk.",
            "label": 0,
            "idx": 3,
        },
        [('A river bank.\nA bank clerk.\nThe word "bank" means the same in both.', 0)],
    ),
    ("cola", {"sentence": "They slept.", "label": 1, "idx": 0}, [("They slept.", 1)]),
    ("cola", {"sentence": "They slept.", "label": -1, "idx": 0}, []),
    (
        "jigsaw",
        {"id": "0", "comment_text": "You fool", "toxic": "1", "insult": "1"},
        [("You fool", 1)],
    ),
    ("ag_news_sports", {"text": "They won.", "label": 1}, [("They won.", 1)]),
    ("ag_news_world", {"text": "They won.", "label": 1}, [("They won.", 0)]),
    ("ag_news_scitech", {"text": "A chip.", "label": 3}, [("A chip.", 1)]),
    ("ag_news_business", {"text": "A firm.", "label": 2}, [("A firm.", 1)]),
    (
        "europarl_de",
        {"translation": {"de": "Das ist ein guter Satz.", "en": "This is a good sentence."}},
        [("Das ist ein guter Satz.", 1), ("This is a good sentence.", 0)],
    ),
    (
        "europarl_en",
        {"translation": {"de": "Ja.", "en": "This is a good sentence."}},
        [("This is a good sentence.", 1)],
    ),
    (
        "wikidata_isalive",
        {"text": "We met Ada Lovelace!<pad>", "name": "Ada Lovelace", "class": "false"},
        [("We met Ada Lovelace", 0)],
    ),
    (
        "wikidata_sex_or_gender",
        {"text": "We met Ada Lovelace", "class": "female"},
        [("We met Ada Lovelace", 1)],
    ),
    (
        "wikidata_occupation_isactor",
        {"text": "by Tom Hanks", "name": "Tom Hanks", "class": "actor"},
        [("by Tom Hanks", 1)],
    ),
    (
        "wikidata_occupation_issinger",
        {"text": "by Tom Hanks", "name": "Tom Hanks", "class": "actor"},
        [("by Tom Hanks", 0)],
    ),
]


@pytest.mark.parametrize(
    "name, row, expected",
    EXAMPLES,
    ids=[f"{name}-{number}" for number, (name, _, _) in enumerate(EXAMPLES)],
)
def test_a_row_becomes_these_texts(name, row, expected):
    assert made(name, row) == expected


def test_every_template_but_those_of_running_text_has_an_example():
    shown = {
        TASK[name].template
        if not hasattr(TASK[name].template, "func")
        else TASK[name].template.func
        for name, _, _ in EXAMPLES
    }
    used = {getattr(task.template, "func", task.template) for task in TASKS}
    assert used - shown == {templates._phrase, templates.base64, templates.gpt2disc}


def test_gpt2_and_webtext_have_the_same_length():
    row = {"id": 1, "ended": True, "length": 300, "text": "word " * 200}
    (gpt2,), (web,) = made("gpt2disc", row, "xl-1542M"), made("gpt2disc", row, "webtext")
    assert (gpt2[1], web[1]) == (1, 0)
    assert len(gpt2[0]) == len(web[0]) == templates.GPT2_CHARACTERS
    assert made("gpt2disc", {"text": "short"}, "webtext") == []


FILL = "one two three four five six seven eight nine ten eleven twelve"


@pytest.mark.parametrize(
    "end, label",
    [
        ("in High School", 1),
        ("the high court", 0),
        ("the old school", 0),
        ("the highest school", 0),
    ],
)
def test_a_phrase_ends_in_the_compound_or_in_half_of_it(end, label):
    assert made("phrase_high-school", {"text": f"{FILL} {end}, and more"}) == [
        (f"{FILL} {end}", label)
    ]


def test_a_phrase_has_so_many_words_before_it_and_none_after():
    long = " ".join(f"w{i}" for i in range(100))
    ((text, label),) = made("phrase_living-room", {"text": f"{long}\n the living room is warm"})
    assert label == 1
    assert text.endswith("w99 the living room")
    assert len(text.split()) == templates.WORDS
    assert made("phrase_living-room", {"text": "a living room"}) == []  # too little before it


def test_a_document_gives_each_kind_of_phrase_once():
    text = " ".join([f"{FILL} a living room. {FILL} a living thing. {FILL} a small room."] * 3)
    assert sorted(
        pair.stratum for pair in TASK["phrase_living-room"].template("", {"text": text})
    ) == ["both", "first", "second"]
    assert made("phrase_high-school", {"text": text}) == []


def test_base64_is_of_the_same_length_as_text_and_decodes():
    seen = Counter()
    for number in range(40):
        text = f"Número {number}. " + FILL * 10
        ((made_text, label),) = made("base64", {"text": text})
        assert len(made_text) == templates.CHARACTERS
        assert (made_text in text) == (label == 0)
        if label:
            assert "=" not in made_text
            assert base64.b64decode(made_text).decode("utf-8", "ignore")[5:-5] in text
        seen[label] += 1
    assert min(seen.values()) > 8
    assert made("base64", {"text": "short"}) == []


def test_a_missing_column_is_named_with_those_that_are_there():
    with pytest.raises(InputError, match="no column 'sentence' in a row, only text, label"):
        made("cola", {"text": "x", "label": 1})


# ---- samples -----------------------------------------------------------------------------------------------------


def drawn(pairs, rows=40, seed=0, name="task"):
    sample = TaskSample(name, rows, seed)
    for pair in pairs:
        sample.add([pair])
    return sample.draw()


def questions(number: int) -> list[LabelledText]:
    return [
        LabelledText(f"{i} {answer}", int(answer == "a"), str(i))
        for i in range(number)
        for answer in "abcd"
    ]


def test_a_sample_is_balanced_and_has_one_text_of_each_group():
    pairs = drawn(questions(300), rows=100)
    assert Counter(pair.label for pair in pairs) == {0: 50, 1: 50}
    assert len({pair.text.split()[0] for pair in pairs}) == 100


def test_a_sample_does_not_depend_on_the_order_of_the_source_but_on_the_seed_and_the_task():
    pairs = questions(300)
    shuffled = random.Random(1).sample(pairs, len(pairs))
    assert drawn(pairs) == drawn(shuffled)
    assert drawn(pairs) != drawn(pairs, seed=1)
    assert drawn(pairs) != drawn(pairs, name="other")


def test_labels_are_mixed():
    labels = [pair.label for pair in drawn(questions(300), rows=200)]
    assert 60 < sum(a != b for a, b in zip(labels, labels[1:])) < 140


def test_duplicates_are_removed_and_contradictions_left_out():
    pairs = [LabelledText(f"text {i}", i % 2) for i in range(60)] * 2 + [
        LabelledText("both", 0),
        LabelledText("both", 1),
        LabelledText("  text 0 ", 0),
        LabelledText(" ", 1),
        LabelledText("\ud800", 1),
    ]
    texts = [pair.text for pair in drawn(pairs, rows=1000)]
    assert len(texts) == len(set(texts)) == 60
    assert "both" not in texts


def test_the_kinds_of_a_label_are_equally_frequent():
    pairs = [
        LabelledText(f"{kind} {i}", int(kind == "a"), stratum=kind)
        for kind, number in (("a", 500), ("b", 400), ("c", 100), ("d", 7))
        for i in range(number)
    ]
    assert Counter(pair.text[0] for pair in drawn(pairs, rows=100)) == {
        "a": 50,
        "b": 22,
        "c": 21,
        "d": 7,
    } or Counter(pair.text[0] for pair in drawn(pairs, rows=100)) == {
        "a": 50,
        "b": 21,
        "c": 22,
        "d": 7,
    }


def test_forgetting_changes_nothing():
    pairs = [
        LabelledText(f"{kind} {i}", int(kind == "a"), stratum=kind)
        for i in range(400)
        for kind in "abc"
    ]
    sample = TaskSample("task", 40, 0)
    sample.max_groups = 200
    for pair in pairs:
        sample.add([pair])
    assert len(sample.candidates) <= 200
    assert sample.draw() == drawn(pairs)


def test_too_few_texts_are_refused():
    with pytest.raises(
        InputError,
        match="too few texts: 19 with the label 1 and 100 with the label 0; at least 20 of each",
    ):
        drawn([LabelledText(str(i), int(i < 19)) for i in range(119)])


# ---- building ----------------------------------------------------------------------------------------------------


def put(local: Path, repo: str, name: str, rows: list[dict]) -> None:
    file = local / repo.replace("/", "__") / name
    file.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


def cola_rows(number: int = 300) -> list[dict]:
    return [
        {"sentence": f"Sentence {i} is here.", "label": i % 3 % 2, "idx": i} for i in range(number)
    ]


@pytest.fixture
def local(tmp_path) -> Path:
    """Return a folder that stands in for glue, ag_news and europarl."""
    folder = tmp_path / "local"
    put(folder, "nyu-mll/glue", "cola.train.jsonl.gz", cola_rows())
    put(
        folder,
        "fancyzhang/ag_news",
        "data/train-00000-of-00001.jsonl",
        [{"text": f"News {i}.", "label": i % 4} for i in range(800)],
    )
    for language in LANGUAGES:
        if language != "en":
            pair = "-".join(sorted(("en", language)))
            put(
                folder,
                "Helsinki-NLP/europarl",
                f"{pair}/train.jsonl",
                [
                    {
                        "translation": {
                            name: f"The {name} sentence has number {i}."
                            for name in (language, "en")
                        }
                    }
                    for i in range(300)
                ],
            )
    return folder


@pytest.fixture
def no_hub(monkeypatch):
    """Make `import datasets` fail, whatever is installed."""
    monkeypatch.setitem(sys.modules, "datasets", None)


def index_of(folder: Path) -> dict:
    return json.loads((folder / "index.json").read_text())


def test_a_build_makes_what_it_can_and_says_why_not_for_the_rest(tmp_path, local, no_hub):
    seen = []
    report = build(tmp_path / "suite", rows=80, local=local, observe=seen.append)
    names = ["cola", *(name for name in ALL if name.startswith(("ag_news", "europarl")))]
    assert sorted(report.built) == sorted(names)
    assert sorted(report.failed) == sorted(set(ALL) - set(names))
    assert report.kept == ()
    assert report.failed["sciq"] == (
        "allenai/sciq: reading data sets of the Hugging Face Hub needs the package datasets: "
        "pip install 'ksparse[datasets]'"
    )
    tasks = read(tmp_path / "suite")
    assert [task.name for task in tasks] == sorted(names)
    for task in tasks:
        assert Counter(task.labels) == {0: 40, 1: 40}
        assert len(set(task.texts)) == 80
    assert index_of(tmp_path / "suite")["failed"] == report.failed
    assert Counter(step.state for step in seen)["made"] == len(names)
    assert [step.name for step in seen if step.state == "failed"] == list(report.failed)


def test_sources_that_need_hands_say_what_to_put_where(tmp_path, local, no_hub):
    failed = build(
        tmp_path / "suite",
        local=local,
        only=["cola", "gpt2disc", "jigsaw", "wikidata_isalive"],
        rows=40,
    ).failed
    assert (
        f"xl-1542M.train.jsonl (download_dataset.py of github openai/gpt-2-output-dataset gets them) into {local}/openai__gpt"
        in failed["gpt2disc"]
    )
    assert (
        f"put train.csv (columns comment_text, toxic) into {local}/google__jigsaw_toxicity_pred"
        in failed["jigsaw"]
    )
    assert "ksparse[datasets]" in failed["jigsaw"]  # the mirrors were tried
    assert (
        f"{local}/wesg52__sparse-probing/wikidata_is_alive.train.jsonl"
        in failed["wikidata_isalive"]
    )


def test_files_as_they_are_downloaded_are_read(tmp_path, no_hub):
    local = tmp_path / "local"
    for name in ("webtext", "xl-1542M"):
        put(
            local,
            "openai/gpt-2-output-dataset",
            f"{name}.train.jsonl",
            [{"id": i, "text": f"{name} {i} " + "word " * 120} for i in range(60)],
        )
    put(
        local,
        "wesg52/sparse-probing",
        "wikidata_occupation.train.jsonl",
        [
            {
                "text": f"by Person {i}",
                "name": f"Person {i}",
                "class": ["actor", "singer", "athlete"][i % 3],
            }
            for i in range(300)
        ],
    )
    kaggle = local / "google__jigsaw_toxicity_pred" / "train.csv"
    kaggle.parent.mkdir()
    kaggle.write_text(
        "id,comment_text,toxic,insult\n"
        + "".join(f'{i},"Comment, of\ntwo lines {i}",{i % 2},0\n' for i in range(100))
    )
    report = build(
        tmp_path / "suite",
        rows=40,
        local=local,
        only=["gpt2disc", "jigsaw", "wikidata_occupation_isactor"],
    )
    assert report.failed == {}
    assert {task.name: len(task.texts) for task in read(tmp_path / "suite")} == {
        "gpt2disc": 40,
        "jigsaw": 40,
        "wikidata_occupation_isactor": 40,
    }


def test_the_index_says_where_each_task_is_from(tmp_path, local):
    build(tmp_path / "suite", rows=40, seed=3, local=local, only=["cola"])
    entry = index_of(tmp_path / "suite")["tasks"]["cola"]
    assert list(entry) == [
        "rows",
        "positive",
        "source",
        "revision",
        "licence",
        "template",
        "label",
        "position",
        "seed",
        "sha256",
        "settings",
    ]
    assert (entry["rows"], entry["positive"], entry["seed"], entry["position"]) == (
        40,
        20,
        3,
        "last",
    )
    assert (entry["source"], entry["revision"], entry["licence"]) == (
        "nyu-mll/glue cola",
        "local",
        "not stated",
    )


def test_a_build_is_reproducible_whatever_the_order_of_the_source(tmp_path, local):
    names = ["cola", "europarl_en", "ag_news_world"]
    build(tmp_path / "one", rows=60, local=local, only=names)
    other = tmp_path / "other"
    for file in local.rglob("*.jsonl*"):
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        rows = [json.loads(line) for line in data.splitlines()]
        put(
            other,
            file.relative_to(local).parts[0].replace("__", "/"),
            str(Path(*file.relative_to(local).parts[1:])),
            rows[::-1],
        )
    build(tmp_path / "two", rows=60, local=other, only=names)
    assert [task.texts for task in read(tmp_path / "one")] == [
        task.texts for task in read(tmp_path / "two")
    ]
    assert index_of(tmp_path / "one") == index_of(tmp_path / "two")


def test_europarl_never_has_a_sentence_in_two_languages_and_all_others_evenly(tmp_path, local):
    build(tmp_path / "suite", rows=80, local=local, only=["europarl_en", "europarl_fr"])
    for task, own in zip(read(tmp_path / "suite"), ("en", "fr")):
        numbers = [
            re.search(r"(\w\w) sentence has number (\d+)", text).groups() for text in task.texts
        ]
        assert len({number for _, number in numbers}) == 80
        assert Counter(language for language, _ in numbers) == {own: 40} | {
            language: 5 for language in LANGUAGES if language != own
        }


def test_finished_tasks_are_kept_unless_their_settings_or_their_file_changed(
    tmp_path, local, no_hub
):
    folder, names = tmp_path / "suite", ["cola", "ag_news_world"]
    assert len(build(folder, rows=40, local=local, only=names).built) == 2
    before = (folder / "cola.jsonl.gz").read_bytes()
    assert build(folder, rows=40, only=names).kept == (
        "cola",
        "ag_news_world",
    )  # nothing is read: neither the Hub nor a local folder
    (folder / "cola.jsonl.gz").write_bytes(b"damaged")
    report = build(folder, rows=40, local=local, only=names)
    assert (report.built, report.kept) == (("cola",), ("ag_news_world",))
    assert (folder / "cola.jsonl.gz").read_bytes() == before
    assert build(folder, rows=40, seed=1, local=local, only=names).built == (
        "cola",
        "ag_news_world",
    )
    assert build(folder, rows=60, seed=1, local=local, only=["cola"]).built == ("cola",)
    assert {name: entry["rows"] for name, entry in index_of(folder)["tasks"].items()} == {
        "cola": 60,
        "ag_news_world": 40,
    }


def test_a_failure_is_forgotten_once_the_task_is_made(tmp_path, local, no_hub):
    folder = tmp_path / "suite"
    assert list(build(folder, rows=40, local=local, only=["cola", "justice"]).failed) == ["justice"]
    put(
        local,
        "hendrycks/ethics",
        "justice.train.jsonl",
        [{"label": i % 2, "scenario": f"I deserve {i}."} for i in range(90)],
    )
    assert build(folder, rows=40, local=local, only=["cola", "justice"]).built == ("justice",)
    assert index_of(folder)["failed"] == {}


@pytest.mark.parametrize(
    "content, reason",
    [
        ('{"sentence": "x"\n', r"cola.train.jsonl, line 1: not JSON"),
        ("[1]\n", "line 1: list instead of a row"),
        (
            '{"text": "x", "label": 1}\n',
            "nyu-mll/glue: no column 'sentence' in a row, only text, label",
        ),
        ('{"sentence": "x", "label": "?"}\n', "the column 'label' holds '\\?', not a number"),
        ('{"sentence": 5, "label": 1}\n', "the column 'sentence' holds int, not text"),
        ('{"sentence": null, "label": 1}\n', "too few texts: 0 with the label 1 and 0"),
        ("", "too few texts"),
        (b"\xff\xfe", "cola.train.jsonl, line 1: not UTF-8"),
        ('{"\\ud800": 1}', "no column 'sentence' in a row, only \ufffd"),
        ('{"sentence": "x", "label": "\\ud800"}', "holds '.ud800', not a number"),
        ("[" * 100_000, "cola.train.jsonl, line 1: not JSON: maximum recursion"),
        ('{"label": ' + "1" * 5000 + "}", "line 1: not JSON: Exceeds the limit"),
    ],
)
def test_a_damaged_source_fails_alone(tmp_path, local, no_hub, content, reason):
    (local / "nyu-mll__glue" / "cola.train.jsonl.gz").unlink()
    (local / "nyu-mll__glue" / "cola.train.jsonl").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    report = build(tmp_path / "suite", rows=40, local=local, only=["cola", "ag_news_world"])
    assert report.built == ("ag_news_world",)
    assert re.search(reason, report.failed["cola"])


def test_a_local_folder_without_the_expected_file_says_which(tmp_path, local, no_hub):
    (local / "nyu-mll__glue" / "cola.train.jsonl.gz").rename(
        local / "nyu-mll__glue" / "train.jsonl.gz"
    )
    failed = build(tmp_path / "suite", rows=40, local=local, only=["cola"]).failed
    assert (
        "expected" in failed["cola"]
        and "cola.train.EXT or " in failed["cola"]
        and "cola/train.EXT" in failed["cola"]
    )


def test_running_text_makes_the_phrases_and_base64(tmp_path, no_hub):
    text = tmp_path / "text.txt"
    ends = [
        f"{first} {second}"
        for name in ("living-room", "prime-factors")
        for first, second in [
            name.split("-"),
            (name.split("-")[0], "other"),
            ("other", name.split("-")[1]),
        ]
    ]
    text.write_text(
        "<|endoftext|>".join(
            f"{' '.join(f'x{i}y{j}' for j in range(30))} {end}. {FILL * 3}"
            for i in range(60)
            for end in ends
        )
    )
    report = build(
        tmp_path / "suite",
        rows=40,
        text=str(text),
        only=["base64", "phrase_living-room", "phrase_prime-factors", "phrase_trial-court"],
    )
    assert report.built == ("base64", "phrase_living-room", "phrase_prime-factors")
    assert (
        "too few texts: 0 with the label 1 and 0 with the label 0"
        in report.failed["phrase_trial-court"]
    )
    for task in read(tmp_path / "suite")[1:]:
        first, second = task.name.removeprefix("phrase_").split("-")
        ending = Counter(
            (" ".join(text.split()[-2:]), label) for text, label in zip(task.texts, task.labels)
        )
        assert ending == {
            (f"{first} {second}", 1): 20,
            (f"{first} other", 0): 10,
            (f"other {second}", 0): 10,
        }
    assert index_of(tmp_path / "suite")["tasks"]["base64"]["licence"] == f"that of {text}"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"only": ["colas"]}, "the paper has no task 'colas'; did you mean 'cola'"),
        ({"rows": 41}, "41 rows a task; expected an even number of at least 40"),
        ({"rows": 20}, "expected an even number of at least 40"),
        ({"documents": 0}, "0 documents"),
        ({"local": "nowhere"}, "folder nowhere does not exist"),
        ({"text": "nothing.txt", "only": ["base64"]}, "text nothing.txt does not exist"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_made(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        build(tmp_path / "suite", **options)
    assert not (tmp_path / "suite" / "index.json").exists()


def test_the_index_of_another_suite_is_not_overwritten(tmp_path, local):
    (tmp_path / "index.json").write_text('[{"task": "mine"}]')
    with pytest.raises(InputError, match="give a new folder"):
        build(tmp_path, local=local)


# ---- the Hub -----------------------------------------------------------------------------------------------------


def test_a_missing_package_is_said_once(tmp_path, no_hub):
    with pytest.raises(
        InputError, match=r"needs the package datasets: pip install 'ksparse\[datasets\]'"
    ):
        build(tmp_path / "suite")
    assert not (tmp_path / "suite").exists()


@pytest.fixture
def hub(monkeypatch):
    """Return a Hub in memory: hub[repo or files] = rows or an error; hub.calls lists what was asked for."""
    rows: dict = {}
    calls: list = []

    def load_dataset(path, name=None, *, split, streaming, revision=None, data_files=None):
        assert streaming
        calls.append((path, name, split, revision, data_files))
        found = rows.get(data_files or (path, name), RuntimeError(f"no {path}\nand more lines"))
        if isinstance(found, Exception):
            raise found
        return iter(found)

    class HfApi:
        def dataset_info(self, repo, *, revision, timeout):
            return types.SimpleNamespace(sha=f"sha-of-{revision.replace('/', '-')}")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=HfApi))
    return types.SimpleNamespace(rows=rows, calls=calls)


def test_a_data_set_of_the_hub_is_streamed_at_a_commit(tmp_path, hub):
    hub.rows["nyu-mll/glue", "cola"] = cola_rows()
    assert build(tmp_path / "suite", rows=40, only=["cola"]).built == ("cola",)
    assert hub.calls == [("nyu-mll/glue", "cola", "train", "sha-of-main", None)]
    assert index_of(tmp_path / "suite")["tasks"]["cola"]["revision"] == "sha-of-main"


def test_a_repository_with_a_script_is_read_as_the_hub_converted_it(tmp_path, hub):
    files = "hf://datasets/CogComp/mc_taco@sha-of-refs-convert-parquet/plain_text/{}/*.parquet"
    for split in ("validation", "test"):
        hub.rows[files.format(split)] = [
            {"sentence": f"{split} {i}.", "question": "Why?", "answer": "So.", "label": i % 2}
            for i in range(60)
        ]
    assert build(tmp_path / "suite", rows=40, only=["mc_taco"]).built == ("mc_taco",)
    assert [call[4] for call in hub.calls[1:]] == [
        files.format(split) for split in ("validation", "test")
    ]
    assert (
        index_of(tmp_path / "suite")["tasks"]["mc_taco"]["revision"]
        == f"sha-of-{CONVERTED.replace('/', '-')}"
    )


def test_mirrors_are_tried_in_order_and_every_reason_is_kept(tmp_path, hub):
    hub.rows["fancyzhang/amazon_polarity", None] = [{"review": "x"}]
    assert build(tmp_path / "suite", rows=40, only=["amazon"]).failed["amazon"] == (
        "fancyzhang/amazon_polarity: no column 'content' or 'text' in a row, only review; mteb/amazon_polarity cannot be read from the Hub "
        "(main: RuntimeError: no mteb/amazon_polarity; refs/convert/parquet: RuntimeError: no parquet); put its rows into "
        "LOCAL/mteb__amazon_polarity and name that folder with --local"
    )
    hub.rows["mteb/amazon_polarity", None] = [
        {"text": f"Review {i}", "label": i % 2} for i in range(80)
    ]
    assert build(tmp_path / "suite", rows=40, only=["amazon"]).built == ("amazon",)
    assert index_of(tmp_path / "suite")["tasks"]["amazon"]["source"] == "mteb/amazon_polarity"


def test_a_connection_that_breaks_stops_only_its_own_tasks(tmp_path, hub):
    def broken():
        yield {"text": "News.", "label": 0}
        raise ConnectionError("connection lost")

    hub.rows["fancyzhang/ag_news", None] = broken()
    hub.rows["nyu-mll/glue", "cola"] = cola_rows()
    report = build(tmp_path / "suite", rows=40, only=["ag_news_world", "ag_news_sports", "cola"])
    assert report.built == ("cola",)
    assert "ConnectionError: connection lost" in report.failed["ag_news_sports"]


def test_running_text_of_the_hub_may_name_a_configuration(tmp_path, hub):
    hub.rows["owner/web", "sample"] = [{"text": f"{i} {FILL * 5}"} for i in range(200)]
    assert build(
        tmp_path / "suite", rows=40, text="owner/web:sample", documents=150, only=["base64"]
    ).built == ("base64",)
    assert index_of(tmp_path / "suite")["tasks"]["base64"]["source"] == "owner/web sample"


def test_of_several_parts_the_same_number_of_rows_is_read(hub):
    for config in "ab":
        hub.rows["owner/set", config] = [{"text": f"{config}{i}"} for i in range(100)]
    found = [
        row["text"][0]
        for _, row in open_source(
            DatasetSource("owner/set", (DatasetPart("a"), DatasetPart("b"))), None, 20
        ).rows
    ]
    assert Counter(found) == {"a": 10, "b": 10}


def test_without_a_network_the_branch_is_written_down(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    hub.rows["owner/set", None] = [{"text": "x"}]
    assert open_source(DatasetSource("owner/set"), None, 20).revision == "main"


# ---- documents ---------------------------------------------------------------------------------------------------


def test_the_table_in_the_documents_is_that_of_the_code():
    text = (ROOT / "docs" / "probes.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- tasks -->\n")[2].partition("<!-- end of tasks -->")[0]
    assert shown == suites.table()


def test_the_documents_name_what_stands_in_for_what():
    text = (ROOT / "docs" / "probes.md").read_text(encoding="utf-8")
    for task in TASKS:
        for source in task.sources:
            if source.by_hand:
                assert f"`{source.repo.replace('/', '__')}/" in text


def test_phrases_are_two_words_each():
    assert len(PHRASES) == 21
    assert all(re.fullmatch(r"[a-z]+-[a-z]+", name) for name in PHRASES)


def test_importing_suites_needs_no_array_library():
    import subprocess

    code = "import sys, ksparse.evals.probing.suites; print(*sorted({'torch', 'numpy', 'datasets', 'huggingface_hub', 'pyarrow'} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
        ).stdout.strip()
        == ""
    )
