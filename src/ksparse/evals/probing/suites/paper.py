"""The 61 tasks of Gao et al. 2024 (section 4.2, table 1), each with a public source and a template.

The paper gives names and citations. Templates, labels, balance, splits, sizes and the probed token
are our choices; docs/probes.md says so, with a table made by `table`. Where a source has moved on
the Hub, or may move, several are tried in order.
"""

from __future__ import annotations

from dataclasses import dataclass

from ksparse.evals.probing.suites import templates
from ksparse.evals.probing.suites.sources import DatasetPart, DatasetSource
from ksparse.evals.probing.suites.templates import Template

ROWS = 1000  # not stated in the paper
POSITION = "last"  # the token to probe: every template ends where the answer is known
TEXT = "monology/pile-uncopyrighted"
OCCUPATIONS = ("journalist", "athlete", "actor", "politician", "singer", "researcher")
PHRASES = (
    "high-school",
    "living-room",
    "social-security",
    "credit-card",
    "blood-pressure",
    "prime-factors",
    "social-media",
    "gene-expression",
    "control-group",
    "magnetic-field",
    "cell-lines",
    "trial-court",
    "second-derivative",
    "north-america",
    "human-rights",
    "side-effects",
    "public-health",
    "federal-government",
    "third-party",
    "clinical-trials",
    "mental-health",
)
TOPICS = {
    "world": "World",
    "sports": "Sports",
    "business": "Business",
    "scitech": "Sci/Tech",
}  # in the order of the data set's numbers
LANGUAGES = {
    "es": "Spanish",
    "en": "English",
    "fr": "French",
    "nl": "Dutch",
    "it": "Italian",
    "el": "Greek",
    "de": "German",
    "pt": "Portuguese",
    "sv": "Swedish",
}


@dataclass(frozen=True)
class PaperTask:
    """One task of the paper.

    Attributes:
        name: The paper's name.
        sources: Data sets to try in order; none for running text.
        template: Makes texts from a row.
        description: What the texts are.
        positive: What label 1 means.
        licence: The licence of the data.
        fewer: Why there are fewer rows than requested.
    """

    name: str
    sources: tuple[DatasetSource, ...]
    template: Template
    description: str
    positive: str
    licence: str
    fewer: str = ""


# ---- sources -------------------------------------------------------------------------------------


def _either(
    *repos: str, config: str = "", splits: tuple[str, ...] = ("train",), converted: str = "default"
) -> tuple[DatasetSource, ...]:
    return tuple(
        DatasetSource(
            repo, tuple(DatasetPart(config, split) for split in splits), converted=converted
        )
        for repo in repos
    )


def _ethics(config: str) -> tuple[DatasetSource, ...]:
    return _either(
        "hendrycks/ethics",
        "EleutherAI/hendrycks_ethics",
        "lighteval/hendrycks_ethics",
        config=config,
    )


def _gurnee(name: str, classes: str) -> tuple[DatasetSource, ...]:
    return (
        DatasetSource(
            "wesg52/sparse-probing",
            (DatasetPart(f"wikidata_{name}"),),
            by_hand=(
                "the Wikidata texts of Gurnee et al. 2023 must be downloaded by hand (see github "
                "wesg52/sparse-probing-paper; they are folders that "
                "datasets.load_from_disk reads): save the rows with to_json as "
                f"{{place}}/wikidata_{name}.train.jsonl, with the columns text, name and "
                f"class ({classes}), and name the folder above with --local"
            ),
        ),
    )


_EUROPARL = (
    DatasetSource(
        "Helsinki-NLP/europarl",
        tuple(
            DatasetPart("-".join(sorted(("en", language))))
            for language in LANGUAGES
            if language != "en"
        ),
    ),
)
_GPT2 = (
    DatasetSource(
        "openai/gpt-2-output-dataset",
        (DatasetPart("webtext"), DatasetPart("xl-1542M")),
        by_hand=(
            "OpenAI's GPT-2 output data set must be downloaded by hand: put webtext.train.jsonl "
            "and xl-1542M.train.jsonl (download_dataset.py of github "
            "openai/gpt-2-output-dataset gets them) into {place}, and name the folder above with "
            "--local"
        ),
    ),
)
_JIGSAW = (
    *_either(
        "tcapelle/jigsaw-toxic-comment-classification-challenge",
        "thesofakillers/jigsaw-toxic-comment-classification-challenge",
    ),
    DatasetSource(
        "google/jigsaw_toxicity_pred",
        by_hand=(
            "the data of Kaggle's Toxic Comment Classification Challenge must be downloaded there "
            "by hand: put train.csv (columns comment_text, toxic) "
            "into {place}, and name the folder above with --local"
        ),
    ),
)


# ---- tasks ---------------------------------------------------------------------------------------

_OF_EACH = "one answer of each question"
_QA = f"'{{question}} {{answer}}', {_OF_EACH}"
_PERSON = "text up to and with a person's name, each name once"
_OF_TEXT, _NOT_STATED = "that of the text", "not stated"

_ONES = (
    PaperTask(
        "amazon",
        _either("fancyzhang/amazon_polarity", "mteb/amazon_polarity", converted="amazon_polarity"),
        templates.amazon,
        "'{title}⏎{content}'",
        "4 or 5 stars (0: 1 or 2)",
        "Apache-2.0 (card)",
    ),
    PaperTask("sciq", _either("allenai/sciq"), templates.sciq, _QA, "right answer", "CC BY-NC 3.0"),
    PaperTask(
        "truthfulqa",
        _either("truthfulqa/truthful_qa", config="generation", splits=("validation",)),
        templates.truthfulqa,
        f"{_QA}; 'I have no comment' left out, as it is only ever right",
        "true answer",
        "Apache-2.0",
        fewer="817 questions",
    ),
    PaperTask(
        "mc_taco",
        _either("CogComp/mc_taco", splits=("validation", "test"), converted="plain_text"),
        templates.mc_taco,
        f"'{{sentence}} {{question}} {{answer}}', {_OF_EACH}",
        "plausible answer",
        _NOT_STATED,
    ),
    PaperTask(
        "piqa",
        _either("ybisk/piqa", "baber/piqa", converted="plain_text"),
        templates.piqa,
        "'{goal} {solution}', one solution of each goal",
        "right solution",
        "AFL-3.0",
    ),
    PaperTask(
        "quail",
        _either("textmachinelab/quail", converted="quail"),
        templates.quail,
        f"'{{context}}⏎{{question}} {{answer}}', {_OF_EACH}; '{templates.NOT_ENOUGH}' left out, as "
        "it is mostly wrong",
        "right answer",
        "CC BY-NC-SA 4.0",
    ),
    PaperTask(
        "quartz",
        _either("allenai/quartz"),
        templates.quartz,
        f"'{{para}}⏎{{question}} {{answer}}', {_OF_EACH}",
        "right answer",
        "CC BY 4.0",
    ),
    PaperTask(
        "justice", _ethics("justice"), templates.justice, "'{scenario}'", "reasonable", "MIT"
    ),
    PaperTask(
        "virtue",
        _ethics("virtue"),
        templates.virtue,
        "'{scenario} This person is {trait}', one trait of each scenario",
        "the trait is shown",
        "MIT",
    ),
    PaperTask(
        "utilitarianism",
        _ethics("utilitarianism"),
        templates.utilitarianism,
        "'First: {a}⏎Second: {b}⏎The first is more pleasant than the second.', one order of each "
        "pair",
        "the statement holds",
        "MIT",
    ),
    PaperTask(
        "deontology",
        _ethics("deontology"),
        templates.deontology,
        "'{scenario} {excuse}', one excuse of each scenario",
        "reasonable excuse",
        "MIT",
    ),
    PaperTask(
        "commonsense_qa",
        _either("tasksource/commonsense_qa_2.0", "chiayewken/commonsense-qa-2"),
        templates.commonsense_qa,
        "'{question}'",
        "the answer is yes",
        "CC BY 4.0",
    ),
    PaperTask(
        "openbookqa",
        _either("allenai/openbookqa", config="main"),
        templates.openbookqa,
        f"'{{question_stem}} {{answer}}', {_OF_EACH}",
        "right answer",
        _NOT_STATED,
    ),
    PaperTask(
        "base64",
        (),
        templates.base64,
        f"{templates.CHARACTERS} characters of a document, as they are or the base64 of its bytes",
        "base64",
        _OF_TEXT,
    ),
    PaperTask(
        "wikidata_isalive",
        _gurnee("is_alive", "true, false"),
        templates.wikidata("true"),
        _PERSON,
        "alive",
        _NOT_STATED,
    ),
    PaperTask(
        "wikidata_sex_or_gender",
        _gurnee("sex_or_gender", "female, male"),
        templates.wikidata("female"),
        _PERSON,
        "female",
        _NOT_STATED,
    ),
)

_OCCUPATIONS = tuple(
    PaperTask(
        f"wikidata_occupation_is{name}",
        _gurnee("occupation", ", ".join(OCCUPATIONS)),
        templates.wikidata(name),
        _PERSON,
        f"{name} (0: the five others, evenly)",
        _NOT_STATED,
    )
    for name in OCCUPATIONS
)

_PHRASES = tuple(
    PaperTask(
        f"phrase_{name}",
        (),
        templates.phrase(*name.split("-")),
        f"the last {templates.WORDS} words of running text before and with the phrase",
        "ends in '{0} {1}' (0: half in '{0} OTHER', half in 'OTHER {1}')".format(*name.split("-")),
        _OF_TEXT,
    )
    for name in PHRASES
)

_OTHERS = (
    PaperTask(
        "social_iqa",
        _either("allenai/social_i_qa"),
        templates.social_iqa,
        f"'{{context}} {{question}} {{answer}}', {_OF_EACH}",
        "right answer",
        _NOT_STATED,
    ),
    PaperTask(
        "wic",
        _either("aps/super_glue", config="wic"),
        templates.wic,
        "'{sentence1}⏎{sentence2}⏎The word \"{word}\" means the same in both.'",
        "the statement holds",
        "CC BY-NC 4.0",
    ),
    PaperTask(
        "cola",
        _either("nyu-mll/glue", config="cola"),
        templates.cola,
        "'{sentence}'",
        "grammatical",
        _NOT_STATED,
    ),
    PaperTask(
        "gpt2disc",
        _GPT2,
        templates.gpt2disc,
        f"the first {templates.GPT2_CHARACTERS} characters of texts that have as many",
        "GPT-2 1.5B at temperature 1 (0: WebText)",
        "MIT",
    ),
)

_NEWS = tuple(
    PaperTask(
        f"ag_news_{name}",
        _either("fancyzhang/ag_news", "SetFit/ag_news"),
        templates.ag_news(number),
        "'{text}'",
        f"{topic} (0: the three others, evenly)",
        "not stated; non-commercial use",
    )
    for number, (name, topic) in enumerate(TOPICS.items())
)

_EUROPARLS = tuple(
    PaperTask(
        f"europarl_{code}",
        _EUROPARL,
        templates.europarl(code),
        "a sentence of 5 words or more, each in one language only",
        f"{language} (0: the eight others, evenly)",
        "not stated; free to use",
    )
    for code, language in LANGUAGES.items()
)

_TOXIC = PaperTask(
    "jigsaw", _JIGSAW, templates.jigsaw, "'{comment_text}'", "toxic", "CC0; comments CC BY-SA 3.0"
)

TASKS: tuple[PaperTask, ...] = (
    *_ONES,
    *_OCCUPATIONS,
    *_PHRASES,
    *_OTHERS,
    *_NEWS,
    *_EUROPARLS,
    _TOXIC,
)


# ---- docs/probes.md ------------------------------------------------------------------------------


def table() -> str:
    """Return the tasks as the Markdown table of docs/probes.md."""
    head = (
        "| task | source, tried in order | split | licence | text | label 1 | balance | token | "
        "rows |"
    )
    lines = [head, "|" + "---|" * head.count(" | ") + "---|"]
    for task in TASKS:
        sources = (
            "; ".join(f"`{source}`" for source in task.sources) or f"`--text`, by default `{TEXT}`"
        )
        rows = f"at most {ROWS:,} ({task.fewer})" if task.fewer else f"{ROWS:,}"
        split = task.sources[0].splits if task.sources else "train"
        lines.append(
            f"| {task.name} | {sources} | {split} | {task.licence} | {task.description} | "
            f"{task.positive} | 50/50 | {POSITION} | {rows} |"
        )
    return "\n".join(lines) + "\n"
