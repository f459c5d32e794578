"""From one row of a data set to texts with a label. Every template is f(config, row) -> pairs.

Where a question has several answers, all of them are offered as pairs of one group, of which a
sample takes one: so the same question is never seen with its right and with a wrong answer, and
neither a question nor the number of its answers says anything about the label.
"""

from __future__ import annotations

import base64 as codec
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

from ksparse.errors import InputError
from ksparse.evals.probing.suites.sample import Pair, rank
from ksparse.storage.rows import columns, shown

Row = Mapping[str, Any]
Template = Callable[[str, Row], Iterable[Pair]]

WORDS = 24  # of context in a phrase_* text, as Gurnee et al. 2023 use 24 tokens
CHARACTERS = 192  # of a base64 text: 144 bytes, so that no padding ('=') tells where it ends
GPT2_CHARACTERS = 500  # of a gpt2disc text, all the same, because samples are longer than pages
NOT_ENOUGH = "not enough information"
NO_COMMENT = "i have no comment"

_LETTERS = r"[^\W\d_]+"
_lower = lru_cache(maxsize=1)(str.lower)  # 21 templates look at each document


# ---- columns -------------------------------------------------------------------------------------


class Blank(ValueError):
    """A cell without a value; its row is left out."""


def _cell(row: Row, *names: str) -> Any:
    """Return the first of the columns that is there."""
    for name in names:
        if name in row:
            if row[name] is None or row[name] == "":
                raise Blank(name)
            return row[name]
    raise InputError(f"no column {' or '.join(map(repr, names))} in a row, only {columns(row)}")


def _text(row: Row, *names: str) -> str:
    value = _cell(row, *names)
    if not isinstance(value, str):
        raise InputError(f"the column {names[0]!r} holds {type(value).__name__}, not text")
    return value.strip()


def _number(row: Row, *names: str) -> int:
    """Return a label as a number; yes and no count as 1 and 0."""
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


def _labelled(text: str, label: int, group: str = "") -> Iterator[Pair]:
    """Yield one pair; a label of neither 0 nor 1 (-1: the answer is held back) yields none."""
    if label in (0, 1):
        yield Pair(text, label, group)


def _answers(
    question: str, right: Iterable[str], wrong: Iterable[str], leave_out: str = ""
) -> Iterator[Pair]:
    """Yield 'question answer' for each answer, as one group."""
    for label, answers in ((1, right), (0, wrong)):
        for answer in answers:
            if (
                answer
                and answer.strip()
                and not (leave_out and answer.strip().lower().startswith(leave_out))
            ):
                yield Pair(f"{question} {answer.strip()}", label, question)


def _choose(question: str, answers: list[str], right: int, leave_out: str = "") -> Iterator[Pair]:
    if not 0 <= right < len(answers):
        return
    if leave_out and answers[right].strip().lower().startswith(leave_out):
        return
    yield from _answers(
        question, answers[right : right + 1], answers[:right] + answers[right + 1 :], leave_out
    )


def _lettered(question: str, row: Row) -> Iterator[Pair]:
    """Choose among `choices` {text, label} (or a list of such) by the letter in `answerKey`."""
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


def amazon(config: str, row: Row) -> Iterator[Pair]:
    title = row.get("title") or ""
    return _labelled(
        f"{title.strip()}\n{_text(row, 'content', 'text')}".strip(), _number(row, "label")
    )


def sciq(config: str, row: Row) -> Iterator[Pair]:
    return _answers(
        _text(row, "question"),
        [_text(row, "correct_answer")],
        [row.get(f"distractor{i}") or "" for i in (1, 2, 3)],
    )


def truthfulqa(config: str, row: Row) -> Iterator[Pair]:
    return _answers(
        _text(row, "question"),
        _cell(row, "correct_answers"),
        _cell(row, "incorrect_answers"),
        leave_out=NO_COMMENT,
    )


def mc_taco(config: str, row: Row) -> Iterator[Pair]:
    question = f"{_text(row, 'sentence')} {_text(row, 'question')}"
    return _labelled(f"{question} {_text(row, 'answer')}", _number(row, "label"), question)


def piqa(config: str, row: Row) -> Iterator[Pair]:
    return _choose(
        _text(row, "goal"), [_text(row, "sol1"), _text(row, "sol2")], _number(row, "label")
    )


def quail(config: str, row: Row) -> Iterator[Pair]:
    question = f"{_text(row, 'context')}\n{_text(row, 'question')}"
    return _choose(
        question,
        list(_cell(row, "answers")),
        _number(row, "correct_answer_id"),
        leave_out=NOT_ENOUGH,
    )


def quartz(config: str, row: Row) -> Iterator[Pair]:
    return _lettered(f"{_text(row, 'para')}\n{_text(row, 'question')}", row)


def justice(config: str, row: Row) -> Iterator[Pair]:
    return _labelled(_text(row, "scenario"), _number(row, "label"))


def virtue(config: str, row: Row) -> Iterator[Pair]:
    scenario, _, trait = _text(row, "scenario").partition("[SEP]")
    trait = trait.strip() or _text(row, "trait")
    return _labelled(
        f"{scenario.strip()} This person is {trait}", _number(row, "label"), scenario.strip()
    )


def deontology(config: str, row: Row) -> Iterator[Pair]:
    scenario = _text(row, "scenario")
    return _labelled(f"{scenario} {_text(row, 'excuse')}", _number(row, "label"), scenario)


def utilitarianism(config: str, row: Row) -> Iterator[Pair]:
    """Offer both orders of a pair of scenarios; one of the two mirrors calls the more pleasant one
    'activity', the other 'baseline'."""
    better, worse = (
        ("baseline", "less_pleasant")
        if row.get("less_pleasant") is not None
        else ("activity", "baseline")
    )
    better, worse = _text(row, better), _text(row, worse)
    for first, second, label in ((better, worse, 1), (worse, better, 0)):
        yield Pair(
            f"First: {first}\nSecond: {second}\nThe first is more pleasant than the second.",
            label,
            f"{better}\n{worse}",
        )


def commonsense_qa(config: str, row: Row) -> Iterator[Pair]:
    return _labelled(_text(row, "question"), _number(row, "answer"))


def openbookqa(config: str, row: Row) -> Iterator[Pair]:
    return _lettered(_text(row, "question_stem"), row)


def social_iqa(config: str, row: Row) -> Iterator[Pair]:
    answers = [_text(row, f"answer{letter}") for letter in "ABC"]
    return _choose(
        f"{_text(row, 'context')} {_text(row, 'question')}", answers, _number(row, "label") - 1
    )


def wic(config: str, row: Row) -> Iterator[Pair]:
    text = (
        f'{_text(row, "sentence1")}\n{_text(row, "sentence2")}\nThe word "{_text(row, "word")}" '
        "means the same in both."
    )
    return _labelled(text, _number(row, "label"))


def cola(config: str, row: Row) -> Iterator[Pair]:
    return _labelled(_text(row, "sentence"), _number(row, "label"))


def gpt2disc(config: str, row: Row) -> Iterator[Pair]:
    text = _text(row, "text")
    if len(text) >= GPT2_CHARACTERS:
        yield Pair(text[:GPT2_CHARACTERS], int(config != "webtext"))


def jigsaw(config: str, row: Row) -> Iterator[Pair]:
    return _labelled(_text(row, "comment_text"), _number(row, "toxic"))


def ag_news(topic: int) -> Template:
    return partial(_ag_news, topic)


def _ag_news(topic: int, config: str, row: Row) -> Iterator[Pair]:
    own = _number(row, "label")
    if 0 <= own < 4:
        yield Pair(_text(row, "text"), int(own == topic), kind=str(own))


def europarl(language: str) -> Template:
    return partial(_europarl, language)


def _europarl(language: str, config: str, row: Row) -> Iterator[Pair]:
    """Offer both sides of a translation, as a group named by its English side, so that no sentence
    is drawn in two languages."""
    sides = _cell(row, "translation")
    for name, text in sides.items():
        if text and len(text.split()) >= 5:
            yield Pair(text, int(name == language), sides.get("en") or text, name)


def wikidata(positive: str) -> Template:
    return partial(_wikidata, positive)


def _wikidata(positive: str, config: str, row: Row) -> Iterator[Pair]:
    """Cut the text after the person's name, which is what is asked about; take each person once."""
    text, name, own = (
        _text(row, "text"),
        row.get("name") or "",
        str(_cell(row, "class")).strip().lower(),
    )
    if name and name in text:
        text = text[: text.rindex(name) + len(name)]
    yield Pair(text, int(own == positive), name, own)


# ---- running text --------------------------------------------------------------------------------


def phrase(first: str, second: str) -> Template:
    return partial(_phrase, first, second)


def _phrase(first: str, second: str, config: str, row: Row) -> Iterator[Pair]:
    """Yield windows that end in 'first second' (1), in 'first OTHER' and in 'OTHER second' (0), at
    most one of each from a document."""
    text = _text(row, "text")
    low = (
        _lower(text) if len(_lower(text)) == len(text) else text
    )  # a few characters are two when lower: then capitals are missed
    found: dict[str, list[str]] = {}
    for match in re.finditer(rf"\b{first} ({_LETTERS})", low) if first in low else ():
        found.setdefault("both" if match[1] == second else "first", []).append(
            _window(text, match.end())
        )
    for match in re.finditer(rf" {second}\b", low) if second in low else ():
        before = re.search(rf"{_LETTERS}$", low[max(0, match.start() - 30) : match.start()])
        if before and before[0] != first:
            found.setdefault("second", []).append(_window(text, match.end()))
    for kind, windows in found.items():
        if windows := list(filter(None, windows)):
            yield Pair(min(windows, key=rank), int(kind == "both"), kind=kind)


def _window(text: str, end: int) -> str:
    """Return the last words up to `end`, joined by single spaces; nothing where there are too
    few."""
    start = max(0, end - 12 * WORDS)
    words = text[start:end].split()[int(start > 0) :]
    return " ".join(words[-WORDS:]) if len(words) >= WORDS // 2 else ""


def base64(config: str, row: Row) -> Iterator[Pair]:
    """Yield one window of a document, as it is (0) or in base64 (1): so many characters either
    way."""
    text = _text(row, "text")
    if len(text) < CHARACTERS:
        return
    chance = rank(text)
    label, at = chance & 1, (chance >> 1) % (len(text) - CHARACTERS + 1)
    window = text[at : at + CHARACTERS]
    if label:
        window = codec.b64encode(window.encode("utf-8", "replace")[: CHARACTERS * 3 // 4]).decode()
    yield Pair(window, label)
