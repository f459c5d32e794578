"""Conversations as token ids by the tokenizer's own chat template, and which tokens are contents.

The template is rendered with texts that know where they are from (`lm.marked_text`), so that each
character of the result is a content of a known role or is written by the template, whatever the
template does with contents and whatever they contain. The result is compared with the tokenizer's
own rendering, conversation by conversation.

A token is kept if it is a content of a role whose tokens are kept: all its characters are, or all
but white space. Special tokens are never kept, also where a content spells one. Where the template
itself marks what an assistant writes (`{% generation %}`), contents of assistants outside of these
marks are not kept.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ksparse.errors import InputError
from ksparse.lm.marked_text import (
    UNCLEAR,
    MarkedText,
    followed,
    is_marked,
    join,
    joined,
    mark,
    marks_of,
    to_json,
)
from ksparse.storage import jsonio

TODAY = datetime(2025, 1, 1)
"""The day that a template is told, so that a run's text does not depend on when it is read."""
_KEPT, _ASSISTANT, _GENERATED = 1, 2, 4  # marks of characters
_HEADERS = ("role", "name", "tool_call_id")  # what says whose message it is, and is no content
_REASONING = ("reasoning_content", "thinking", "reasoning")
_FAITHFUL = (
    *("trim", "string", "replace", "upper", "lower", "capitalize", "reverse", "tojson", "join"),
    *("default", "d", "first", "last", "attr", "min", "max", "random"),
)
"""Filters that carry marks, or give an item of what they are given as it is."""


class Conversation(NamedTuple):
    """A conversation from a file or data set."""

    messages: list[dict[str, Any]]
    """Each with `role`, and mostly `content`."""
    tools: list[dict[str, Any]] | None = None
    """Descriptions of the tools that the assistant may call."""
    where: str = "a conversation"
    """File and row, for messages."""


class EncodedChat(NamedTuple):
    """A conversation as the LM reads it."""

    ids: list[int]
    kept: list[bool]
    """For each id: is it a content of a role whose tokens are kept?"""


class ChatTemplate:
    """The chat template of a tokenizer, and the roles whose tokens are kept.

    Args:
        tokenizer: Of the transformers library, a fast one (with offsets).
        roles: Roles whose contents are kept, as the messages name them; none: all.
        owner: What the tokenizer belongs to, for messages.

    Raises:
        InputError: The tokenizer has no chat template, or no offsets.

    Example:
        >>> import ksparse
        >>> tokenizer = ksparse.LM("pylm/0.3m", site="resid_post.1").tokenizer
        >>> tokenizer.chat_template = (
        ...     "{% for m in messages %}[{{ m.role }}] {{ m.content }}\\n{% endfor %}"
        ... )
        >>> template = ChatTemplate(tokenizer, ["assistant"])
        >>> messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        >>> [chat] = template.encode([Conversation(messages)])
        >>> tokenizer.decode([i for i, kept in zip(*chat) if kept]).strip()
        'y'
    """

    def __init__(self, tokenizer: Any, roles: Sequence[str] = (), *, owner: str = "the LM"):
        if not tokenizer.chat_template:
            raise InputError(
                f"acts.chat is 'template', but the tokenizer of {owner} has no chat template; give "
                "a chat model, or with --acts.tokenizer a tokenizer that has one"
            )
        if not tokenizer.is_fast:
            raise InputError(
                f"acts.chat is 'template', but the tokenizer of {owner} "
                f"({type(tokenizer).__name__}) does not say which characters its tokens cover; "
                "give a fast one with --acts.tokenizer"
            )
        self.tokenizer, self.roles = tokenizer, tuple(roles)
        added = tokenizer.added_tokens_decoder
        self._special = np.array(
            sorted({*tokenizer.all_special_ids, *(i for i in added if added[i].special)}), int
        )

    @property
    def digest(self) -> str:
        """A hash of the template."""
        return digest_of(self.tokenizer.chat_template)

    def encode(self, conversations: Sequence[Conversation]) -> list[EncodedChat]:
        """Return the ids of conversations, as `apply_chat_template` gives them, and which are kept.

        Raises:
            InputError: A conversation cannot be rendered, or the template changes its contents in a
                way that cannot be followed; file and row are named.
        """
        texts = [self.render(conversation) for conversation in conversations]
        if not texts:
            return []
        encoded = self.tokenizer(
            [str.__str__(text) for text in texts],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        return [
            EncodedChat(ids, self._kept(text, ids, offsets).tolist())
            for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"])
        ]

    def render(self, conversation: Conversation) -> str:
        """Return a conversation as text, each character with its mark."""
        messages, tools, where = conversation
        try:
            expected = self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
            source = self.tokenizer.get_chat_template(tools=tools)
        except Exception as error:  # a template raises what it likes
            roles = ", ".join(str(message.get("role"))[:20] for message in messages[:8])
            raise InputError(
                f"{where}: the chat template cannot render this conversation "
                f"({_summary(error)}); its roles are {roles}{', …' * (len(messages) > 8)}. Leave "
                "it out, or change it to what the template takes"
            ) from error
        assert isinstance(expected, str)
        for prepare in (_aliased, _without_none, list):  # by version of transformers
            marked = self._marked(prepare(messages))
            text = self._rendered(source, marked, tools, datetime.now(), where)
            if text == expected:
                break
        else:
            raise InputError(
                f"{where}: the chat template cannot be followed: rendered once more, this "
                "conversation is another text. Does the template draw random numbers?"
            )
        if "strftime_now" in source:
            text = self._rendered(source, marked, tools, TODAY, where)
        marks = np.frombuffer(marks_of(text), np.uint8)
        if (marks & UNCLEAR).any():
            at = int(np.argmax(marks & UNCLEAR > 0))
            raise InputError(
                f"{where}: the chat template changes a content in a way that cannot be followed, "
                f"at {str.__str__(text)[max(0, at - 20) : at + 20]!r}; without it nobody can say "
                "which tokens are whose. Leave this conversation out"
            )
        return text

    def _marked(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return messages with the contents of the kept roles marked."""
        return [
            {
                key: value
                if key in _HEADERS or (self.roles and message.get("role") not in self.roles)
                else mark(value, _KEPT | _ASSISTANT * (message.get("role") == "assistant"))
                for key, value in message.items()
            }
            for message in messages
        ]

    def _rendered(
        self, source: str, messages: list[dict[str, Any]], tools: Any, now: datetime, where: str
    ) -> str:
        values = {
            **self.tokenizer.special_tokens_map,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": False,
            "strftime_now": now.strftime,
        }
        try:
            return _compiled(source).render(values)
        except Exception as error:
            raise InputError(
                f"{where}: the chat template cannot be followed ({_summary(error)})"
            ) from error

    def _kept(self, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> np.ndarray:
        """Return the mask [t] of the tokens that are kept."""
        if not ids:
            return np.zeros(0, bool)
        marks = np.frombuffer(marks_of(text), np.uint8)
        own = marks & _KEPT > 0
        if _has_generation(self.tokenizer.chat_template):
            own &= (marks & _ASSISTANT == 0) | (marks & _GENERATED > 0)
        solid = np.array([not char.isspace() for char in str.__str__(text)])
        starts, ends = np.array(offsets).T
        # Some tokenizers leave the space before a word out of its offsets: it is the word's.
        ends = np.maximum.accumulate(ends)
        starts = np.minimum(starts, np.concatenate([[0], ends[:-1]]))

        def count(chars: np.ndarray) -> np.ndarray:
            sums = np.concatenate([[0], chars.cumsum()])
            return sums[ends] - sums[starts]

        whole = (count(own) == ends - starts) & (ends > starts)
        mine = (count(own & solid) > 0) & (count(~own & solid) == 0)
        return (whole | mine) & ~np.isin(ids, self._special)


def digest_of(template: Any) -> str:
    """Return a hash of a tokenizer's chat template: a text, several by name, or None."""
    return jsonio.digest(template)


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _without_none(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in message.items() if value is not None} for message in messages
    ]


def _aliased(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages without nulls, with their reasoning under the names that templates read."""
    result = []
    for message in _without_none(messages):
        reasoning = next((message[key] for key in _REASONING if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        result.append(message)
    return result


# ---- rendering with marks


def _has_generation(template: Any) -> bool:
    """Return whether a template marks what an assistant writes."""
    sources = template.values() if isinstance(template, dict) else [template]
    return any(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) for source in sources)


@functools.cache
def _compiled(source: str) -> Any:
    return _Environment().from_string(source)


class _CodeGenerator(CodeGenerator):
    """Writes `a ~ b` so that marks are carried."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.concat(map(environment.finalize, (")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write(")))")


class _Generation(Extension):
    """`{% generation %}`: what stands in it is written by the assistant."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark_generated"), [], [], body).set_lineno(line)

    def mark_generated(self, caller: Callable[[], str]) -> str:
        """Return the block's text, its marked characters marked as generated."""
        text = caller()
        if not isinstance(text, MarkedText):
            return text
        marks = bytes(bits | _GENERATED if bits else 0 for bits in marks_of(text))
        return MarkedText(text, marks)


class _Namespace(Namespace):
    """A namespace without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a template may not set {name!r}")
        super().__setitem__(name, value)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox in which transformers renders templates, with marks carried through it.

    What neither `MarkedText` nor the sandbox can follow becomes UNCLEAR.
    """

    code_generator_class = _CodeGenerator
    concat = staticmethod(joined)  # type: ignore[assignment]
    intercepted_binops = frozenset(["%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=_as_text,
        )
        self.filters["tojson"] = to_json
        self.filters = {
            name: function if name in _FAITHFUL else _following(function)
            for name, function in self.filters.items()
        }
        self.filters["join"] = _join_filter(self.filters["join"])
        self.globals["raise_exception"] = _raise
        self.globals["namespace"] = _Namespace

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method of the template's values, and follow its result."""
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and __obj.__name__ == "join" and len(args) == 1:
            return join(owner, list(args[0]))
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(__obj, Macro) or isinstance(owner, (MarkedText, dict, list)):
            return result  # written with marks, or an item of theirs
        return followed(result, args, kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply `%`, and follow its result."""
        return followed(super().call_binop(context, operator, left, right), left, right)


def _as_text(value: Any) -> str:
    """Return what an expression of a template writes."""
    text: str = value if isinstance(value, str) else followed(str(value), value)
    return text


def _following(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter whose result is UNCLEAR where its argument had marks."""

    @functools.wraps(function)
    def follow(*args: Any, **kwargs: Any) -> Any:
        return followed(function(*args, **kwargs), args, kwargs)

    return follow


def _join_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return jinja's filter `join`, which carries marks where it joins the items themselves."""

    @functools.wraps(function)
    def carry(context: Any, value: Any, d: str = "", attribute: Any = None) -> Any:
        items = list(value)
        if attribute is None and is_marked([d, items]):
            return join(d, map(_as_text, items))
        return followed(function(context, items, d, attribute), d, items)

    return carry


def _raise(message: str) -> None:
    raise TemplateError(message)
