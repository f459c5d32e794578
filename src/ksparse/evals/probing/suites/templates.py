"""Turn one row of a data set into labelled texts: every template is f(config, row) -> texts.

Where a question has several answers, all of them are texts of one group, from which a sample takes
one. So the same question never occurs with its right and with a wrong answer, and neither a
question nor the number of its answers predicts the label.
"""

from __future__ import annotations

import base64 as codec
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

from ksparse.errors import InputError
from ksparse.evals.probing.suites.sample import LabelledText, stable_hash
from ksparse.storage.rows import columns, shown

Row = Mapping[str, Any]
Template = Callable[[str, Row], Iterable[LabelledText]]

WORDS = 24  # in a phrase_* text; Gurnee et al. 2023 use 24 tokens
CHARACTERS = 192  # in a base64 text: 144 bytes, so that there is no padding ('=')
GPT2_CHARACTERS = 500  # in every gpt2disc text, because samples are longer than web pages
NOT_ENOUGH = "not enough information"
NO_COMMENT = "i have no comment"

_LETTERS = r"[^\W\d_]+"
_lower = lru_cache(maxsize=1)(str.lower)  # 21 templates read each document


# ---- columns -------------------------------------------------------------------------------------


class MissingValue(ValueError):
    """An empty cell; its row is left out."""


def _cell(row: Row, *names: str) -> Any:
    """Return the value of the first of the columns that the row has."""
    for name in names:
        if name in row:
            if row[name] is None or row[name] == "":
                raise MissingValue(name)
            return row[name]
    raise InputError(f"no column {' or '.join(map(repr, names))} in a row, only {columns(row)}")


def _text(row: Row, *names: str) -> str:
    value = _cell(row, *names)
    if not isinstance(value, str):
        raise InputError(f"the column {names[0]!r} holds {type(value).__name__}, not text")
    return value.strip()


def _number(row: Row, *names: str) -> int:
    """Return a label as a number; yes or true is 1, no or false is 0."""
    value = _cell(row, *names)
    words = {"yes": 1, "no": 0, "true": 1, "false": 0}
    try:
        return (
            words[value.strip().lower()]
            if isinstance(value, str) and value.strip().lower() in words
            else int(value)
        )
    except (TypeError, ValueError):
        raise InputError(
            f"the column {names[0]!r} holds {shown(repr(value))}, not a number"
        ) from None


def _labelled(text: str, label: int, group: str = "") -> Iterator[LabelledText]:
    """Yield one text; none for a label that is neither 0 nor 1 (-1: the answer is withheld)."""
    if label in (0, 1):
        yield LabelledText(text, label, group)


def _answers(
    question: str, right_answers: Iterable[str], wrong_answers: Iterable[str], excluded: str = ""
) -> Iterator[LabelledText]:
    """Yield "question answer" for each answer that does not begin with `excluded`, as one group."""
    for label, answers in ((1, right_answers), (0, wrong_answers)):
        for answer in answers:
            if (
                answer
                and answer.strip()
                and not (excluded and answer.strip().lower().startswith(excluded))
            ):
                yield LabelledText(f"{question} {answer.strip()}", label, question)


def _choose(
    question: str, answers: list[str], right: int, excluded: str = ""
) -> Iterator[LabelledText]:
    """Yield each answer, `right` being the index of the right one."""
    if not 0 <= right < len(answers):
        return
    if excluded and answers[right].strip().lower().startswith(excluded):
        return
    yield from _answers(
        question, answers[right : right + 1], answers[:right] + answers[right + 1 :], excluded
    )


def _lettered(question: str, row: Row) -> Iterator[LabelledText]:
    """Yield `choices` {text, label} (or a list of such), the right one named by `answerKey`."""
    choices = _cell(row, "choices")
    if isinstance(choices, list):
        choices = {
            "text": [choice["text"] for choice in choices],
            "label": [choice["label"] for choice in choices],
        }
    letters, answers, key = list(choices["label"]), list(choices["text"]), _text(row, "answerKey")
    if key in letters:
        yield from _choose(question, answers, letters.index(key))


# ---- data sets -----------------------------------------------------------------------------------


def amazon(config: str, row: Row) -> Iterator[LabelledText]:
    """A review's title and content; is it positive?"""
    title = row.get("title") or ""
    return _labelled(
        f"{title.strip()}\n{_text(row, 'content', 'text')}".strip(), _number(row, "label")
    )


def sciq(config: str, row: Row) -> Iterator[LabelledText]:
    """A science question with an answer; is it right?"""
    return _answers(
        _text(row, "question"),
        [_text(row, "correct_answer")],
        [row.get(f"distractor{i}") or "" for i in (1, 2, 3)],
    )


def truthfulqa(config: str, row: Row) -> Iterator[LabelledText]:
    """A question with an answer; is it true?"""
    return _answers(
        _text(row, "question"),
        _cell(row, "correct_answers"),
        _cell(row, "incorrect_answers"),
        excluded=NO_COMMENT,
    )


def mc_taco(config: str, row: Row) -> Iterator[LabelledText]:
    """A sentence and question with an answer; is it plausible?"""
    question = f"{_text(row, 'sentence')} {_text(row, 'question')}"
    return _labelled(f"{question} {_text(row, 'answer')}", _number(row, "label"), question)


def piqa(config: str, row: Row) -> Iterator[LabelledText]:
    """A goal with a solution; does it work?"""
    return _choose(
        _text(row, "goal"), [_text(row, "sol1"), _text(row, "sol2")], _number(row, "label")
    )


def quail(config: str, row: Row) -> Iterator[LabelledText]:
    """A passage and question with an answer; is it right?"""
    question = f"{_text(row, 'context')}\n{_text(row, 'question')}"
    return _choose(
        question,
        list(_cell(row, "answers")),
        _number(row, "correct_answer_id"),
        excluded=NOT_ENOUGH,
    )


def quartz(config: str, row: Row) -> Iterator[LabelledText]:
    """A paragraph and question with an answer; is it right?"""
    return _lettered(f"{_text(row, 'para')}\n{_text(row, 'question')}", row)


def justice(config: str, row: Row) -> Iterator[LabelledText]:
    """A scenario; is it reasonable?"""
    return _labelled(_text(row, "scenario"), _number(row, "label"))


def virtue(config: str, row: Row) -> Iterator[LabelledText]:
    """A scenario with a trait; does the person show it?"""
    scenario, _, trait = _text(row, "scenario").partition("[SEP]")
    trait = trait.strip() or _text(row, "trait")
    return _labelled(
        f"{scenario.strip()} This person is {trait}", _number(row, "label"), scenario.strip()
    )


def deontology(config: str, row: Row) -> Iterator[LabelledText]:
    """A scenario with an excuse; is it reasonable?"""
    scenario = _text(row, "scenario")
    return _labelled(f"{scenario} {_text(row, 'excuse')}", _number(row, "label"), scenario)


def utilitarianism(config: str, row: Row) -> Iterator[LabelledText]:
    """Yield both orders of a pair of scenarios.

    The mirrors differ in which column holds the more pleasant scenario: 'activity' or 'baseline'.
    """
    better, worse = (
        ("baseline", "less_pleasant")
        if row.get("less_pleasant") is not None
        else ("activity", "baseline")
    )
    better, worse = _text(row, better), _text(row, worse)
    for first, second, label in ((better, worse, 1), (worse, better, 0)):
        yield LabelledText(
            f"First: {first}\nSecond: {second}\nThe first is more pleasant than the second.",
            label,
            f"{better}\n{worse}",
        )


def commonsense_qa(config: str, row: Row) -> Iterator[LabelledText]:
    """A question; is the answer yes?"""
    return _labelled(_text(row, "question"), _number(row, "answer"))


def openbookqa(config: str, row: Row) -> Iterator[LabelledText]:
    """A question with an answer; is it right?"""
    return _lettered(_text(row, "question_stem"), row)


def social_iqa(config: str, row: Row) -> Iterator[LabelledText]:
    """A situation and question with an answer; is it right?"""
    answers = [_text(row, f"answer{letter}") for letter in "ABC"]
    return _choose(
        f"{_text(row, 'context')} {_text(row, 'question')}", answers, _number(row, "label") - 1
    )


def wic(config: str, row: Row) -> Iterator[LabelledText]:
    """Two sentences and a word; does it mean the same in both?"""
    text = (
        f'{_text(row, "sentence1")}\n{_text(row, "sentence2")}\nThe word "{_text(row, "word")}" '
        "means the same in both."
    )
    return _labelled(text, _number(row, "label"))


def cola(config: str, row: Row) -> Iterator[LabelledText]:
    """A sentence; is it grammatical?"""
    return _labelled(_text(row, "sentence"), _number(row, "label"))


def gpt2disc(config: str, row: Row) -> Iterator[LabelledText]:
    """The beginning of a text; did GPT-2 write it?"""
    text = _text(row, "text")
    if len(text) >= GPT2_CHARACTERS:
        yield LabelledText(text[:GPT2_CHARACTERS], int(config != "webtext"))


def jigsaw(config: str, row: Row) -> Iterator[LabelledText]:
    """A comment; is it toxic?"""
    return _labelled(_text(row, "comment_text"), _number(row, "toxic"))


def ag_news(topic: int) -> Template:
    """A news text; is it about this topic?"""
    return partial(_ag_news, topic)


def _ag_news(topic: int, config: str, row: Row) -> Iterator[LabelledText]:
    label = _number(row, "label")
    if 0 <= label < 4:
        yield LabelledText(_text(row, "text"), int(label == topic), stratum=str(label))


def europarl(language: str) -> Template:
    """A sentence; is it in this language?"""
    return partial(_europarl, language)


def _europarl(language: str, config: str, row: Row) -> Iterator[LabelledText]:
    """Yield all sides of a translation as one group, named by the English side.

    So no sentence is taken in two languages.
    """
    sides = _cell(row, "translation")
    for name, text in sides.items():
        if text and len(text.split()) >= 5:
            yield LabelledText(text, int(name == language), sides.get("en") or text, name)


def wikidata(positive: str) -> Template:
    """A text up to a person's name; does the person have this property?"""
    return partial(_wikidata, positive)


def _wikidata(positive: str, config: str, row: Row) -> Iterator[LabelledText]:
    """Cut the text after the person's name, which the question is about; each person is a group."""
    text, name = _text(row, "text"), row.get("name") or ""
    value = str(_cell(row, "class")).strip().lower()
    if name and name in text:
        text = text[: text.rindex(name) + len(name)]
    yield LabelledText(text, int(value == positive), name, value)


# ---- running text --------------------------------------------------------------------------------


def phrase(first: str, second: str) -> Template:
    """A text; does it end in this phrase?"""
    return partial(_phrase, first, second)


def _phrase(first: str, second: str, config: str, row: Row) -> Iterator[LabelledText]:
    """Yield windows that end in 'first second' (1), 'first OTHER' (0) and 'OTHER second' (0).

    At most one of each from a document.
    """
    text = _text(row, "text")
    # A few characters become two in lower case and would shift positions; then capitals are missed.
    low = _lower(text) if len(_lower(text)) == len(text) else text
    endings: dict[str, list[str]] = {}
    for match in re.finditer(rf"\b{first} ({_LETTERS})", low) if first in low else ():
        endings.setdefault("both" if match[1] == second else "first", []).append(
            _window(text, match.end())
        )
    for match in re.finditer(rf" {second}\b", low) if second in low else ():
        before = re.search(rf"{_LETTERS}$", low[max(0, match.start() - 30) : match.start()])
        if before and before[0] != first:
            endings.setdefault("second", []).append(_window(text, match.end()))
    for ending, windows in endings.items():
        if windows := list(filter(None, windows)):
            yield LabelledText(min(windows, key=stable_hash), int(ending == "both"), stratum=ending)


def _window(text: str, end: int) -> str:
    """Return the last `WORDS` words up to `end`, joined by spaces; "" if there are too few."""
    start = max(0, end - 12 * WORDS)
    words = text[start:end].split()[int(start > 0) :]
    return " ".join(words[-WORDS:]) if len(words) >= WORDS // 2 else ""


def base64(config: str, row: Row) -> Iterator[LabelledText]:
    """Yield one window of a document, as it is (0) or in base64 (1), equally long either way."""
    text = _text(row, "text")
    if len(text) < CHARACTERS:
        return
    random = stable_hash(text)
    label, start = random & 1, (random >> 1) % (len(text) - CHARACTERS + 1)
    window = text[start : start + CHARACTERS]
    if label:
        window = codec.b64encode(window.encode("utf-8", "replace")[: CHARACTERS * 3 // 4]).decode()
    yield LabelledText(window, label)
