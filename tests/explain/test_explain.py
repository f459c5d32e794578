"""Explanations in words: a server that knows the truth scores 1, dealt explanations 0.5, and no failure loses answers."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from ksparse.errors import InputError
from ksparse.explain import prompts, texts
from ksparse.explain.answers import Answers
from ksparse.explain.examples import Specimen, Specimens, Window, collect
from ksparse.explain.explain import Explainer, balanced_accuracy
from ksparse.explain.options import ExplainConfig
from ksparse.explain.server import Answer, ChatServer, ServerError
from ksparse.storage.run_folder import RunFolder

LETTERS = "abcdefgh"
RECORDED = {
    response["name"]: response
    for response in json.loads((Path(__file__).parent / "recorded.json").read_text())["responses"]
}
"""Responses of a real server, llama.cpp's, with a model of 135 M parameters."""


class FakeServer:
    """Explains a latent by the letter that is marked in its texts, and labels texts by that letter; faults come first."""

    def __init__(self):
        self.faults, self.requests, self.headers = [], [], []

    def answer(self, body):
        system, user = (message["content"] for message in body["messages"])
        texts = [
            json.loads(line.split(": ", 1)[1])
            for line in user.splitlines()
            if line.startswith("Text ")
        ]
        if "short phrase" in system:
            return f"the letter {re.search('<<(.)>>', texts[0])[1]}"
        letter = re.search(r'Description: "the letter (.)', user)[1]
        target = f"<<{letter}>>" if "marked" in system else letter
        return json.dumps([int(target in text) for text in texts])


@contextmanager
def serving(fake):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.requests.append(body)
            fake.headers.append(dict(self.headers))
            fault = fake.faults.pop(0) if fake.faults else 200
            recorded = fault if isinstance(fault, dict) else {}
            fault = recorded.get("status", fault)
            if fault == "cut":
                self.connection.close()
                return
            content = json.dumps(
                {
                    "choices": [{"message": {"content": "" if recorded else fake.answer(body)}}],
                    "usage": {"prompt_tokens": 7, "completion_tokens": 3},
                }
            ).encode()
            if fault in ("broken", "not chat"):
                content, fault = (b'{"choices": [' if fault == "broken" else b'{"a": 1}'), 200
            content = recorded["body"].encode() if recorded else content
            self.send_response(fault)
            if fault == 429:
                self.send_header("Retry-After", "7")
            if fault == 302:
                self.send_header("Location", "http://127.0.0.1:1/")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *arguments: None
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def fake():
    return FakeServer()


@pytest.fixture
def url(fake):
    with serving(fake) as address:
        yield address


def chat(url, waits=None, **options):
    return ChatServer(url, "m", sleep=(waits if waits is not None else []).append, **options)


def specimens(count=6, seed=0):
    """Latent i fires on letter i alone; its silent windows hold any other letters, one of them marked."""
    generator = np.random.default_rng(seed)

    def window(latent, active):
        tokens = generator.permutation([i for i in range(8) if i != latent])[:4]
        marked = np.zeros(4, bool)
        place = generator.integers(4)
        marked[place] = True
        if active:
            tokens[place] = latent
        acts = np.where(marked & active, 1.0, 0.0)
        other = tokens == (latent - 1) % count
        return Window(tokens, acts, marked, False, tokens == latent, other)

    chosen = [
        Specimen(
            i, [window(i, True) for _ in range(4)], [window(i, j % 2 == 0) for j in range(200)]
        )
        for i in range(count)
    ]
    return Specimens(chosen, dict(enumerate(LETTERS)), [])


def explainer(url, folder, options=ExplainConfig(shown=20, parallel=2), **of):
    folder.mkdir(exist_ok=True)
    return Explainer(specimens(**of), options, chat(url, tries=2), Answers(RunFolder(folder)))


def test_true_explanations_score_1_and_dealt_ones_one_half(url, tmp_path):
    result = explainer(url, tmp_path).run()
    for score in ("detection", "fuzzing"):
        assert result[score] == {"value": 1.0, "se": 0.0}
        assert result[f"n2g_{score}"]["value"] == 1.0
        assert result[f"shuffled_{score}"]["value"] == pytest.approx(0.5, abs=0.12)
        assert result[f"n2g_shuffled_{score}"]["value"] == pytest.approx(0.5, abs=0.12)
        assert result[f"{score}_over_n2g"]["value"] == 0
    # Dealt, the server and the patterns follow the same rule, so they agree text by text.
    assert result["shuffled_detection"] == result["n2g_shuffled_detection"]
    assert [row["explanation"] for row in result["latents"]] == [
        f"the letter {c}" for c in "abcdef"
    ]
    assert result["unread"] == 0


def test_what_was_asked_is_not_asked_again(url, fake, tmp_path):
    estimate = explainer(url, tmp_path).estimate()
    first = explainer(url, tmp_path).run()
    assert len(fake.requests) == estimate.requests == 6 * (1 + 2 * 2 * 10)
    again = explainer(url, tmp_path)
    assert again.estimate() == (0, 0, 0, 0)
    second = again.run()
    assert len(fake.requests) == estimate.requests
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_counting_sends_nothing(url, fake, tmp_path):
    assert explainer(url, tmp_path).estimate().requests > 0
    assert fake.requests == []


def test_answers_before_a_failure_are_kept(url, fake, tmp_path):
    fake.faults = [200] * 30 + [500] * 1000
    with pytest.raises(ServerError, match="no answer after 2 tries: HTTP 500"):
        explainer(url, tmp_path, ExplainConfig(shown=20, parallel=1)).run()
    assert len(Answers(RunFolder(tmp_path))) == 30
    fake.faults, fake.requests = [], []
    result = explainer(url, tmp_path, ExplainConfig(shown=20, parallel=1)).run()
    assert result["detection"]["value"] == 1
    assert len(fake.requests) == 6 * 41 - 30


def test_a_line_that_was_cut_short_is_asked_again_and_harms_no_other(tmp_path):
    answers = Answers(RunFolder(tmp_path))
    answers.add({"a": 1}, Answer("one"))
    with answers.file.open("ab") as stream:
        stream.write(b'{"key": "x", "te')
    reread = Answers(RunFolder(tmp_path))
    reread.add({"a": 2}, Answer("two", 3, 4))
    last = Answers(RunFolder(tmp_path))
    assert (last.find({"a": 1}), last.find({"a": 2}), len(last)) == (
        Answer("one"),
        Answer("two", 3, 4),
        2,
    )


@pytest.mark.parametrize("fault", [429, 500, 503, "broken", "not chat", "cut"])
def test_a_fault_that_passes_is_tried_again_after_longer_and_longer_waits(url, fake, fault):
    fake.faults, waits = [fault] * 3, []
    server = chat(url, waits)
    body = server.body(prompts.ask_explanation(["a<<b>>"]), 5)
    assert server.ask(body) == Answer("the letter b", 7, 3)
    assert waits == ([7, 7, 7] if fault == 429 else [1, 2, 4])


def test_a_real_servers_answer_says_what_it_counted_who_answered_and_whether_it_is_cut(url, fake):
    fake.faults = [RECORDED["explanation that is cut"], RECORDED["labels by a schema"]]
    server = chat(url)
    cut, whole = (server.ask(server.body([], 60)) for _ in range(2))
    assert (cut.model, cut.cut, cut.answer_tokens) == ("smollm2-135m-instruct", True, 60)
    assert (whole.model, whole.cut, whole.prompt_tokens) == ("smollm2-135m-instruct", False, 309)
    assert prompts.read_labels(whole.text, 8) == [True, False] + 6 * [True]
    assert prompts.read_explanation(cut.text).startswith("The text contains multiple sentences")


@pytest.mark.parametrize("name", ["labels without an end", "prose for labels"])
def test_real_answers_that_are_no_list_of_labels_are_not_read(url, fake, name):
    fake.faults = [RECORDED[name]]
    server = chat(url)
    assert prompts.read_labels(server.ask(server.body([], 48)).text, 8) is None


def test_a_real_server_that_still_loads_its_model_is_asked_again(url, fake):
    fake.faults, waits = 2 * [RECORDED["loading"]], []
    server = chat(url, waits)
    assert server.ask(server.body(prompts.ask_explanation(["a<<b>>"]), 5)).text == "the letter b"
    assert waits == [1, 2]


@pytest.mark.parametrize(
    "name, said",
    [
        ("too long", r"6031 tokens.*ask with smaller --examples or --shown, or start the server"),
        ("no such path", r"File Not Found.*check --url, which ends in /v1"),
    ],
)
def test_what_a_real_server_refuses_is_said_with_what_to_do(url, fake, name, said):
    fake.faults = [RECORDED[name]]
    server = chat(url)
    with pytest.raises(InputError, match=said):
        server.ask(server.body([], 5))


def test_a_real_stream_is_named(url, fake):
    fake.faults = 2 * [RECORDED["stream"]]
    server = chat(url, tries=2)
    with pytest.raises(ServerError, match="after 2 tries: a stream of parts, which was not asked"):
        server.ask(server.body([], 5))


def weak(url, fake, folder, answer):
    """Return the result of a server whose labels are always the same answer."""
    honest = fake.answer
    fake.answer = lambda body: (
        honest(body) if "short phrase" in body["messages"][0]["content"] else answer
    )
    return explainer(url, folder).run()


def test_a_judge_that_says_the_same_of_all_texts_cannot_tell(url, fake, tmp_path):
    result = weak(url, fake, tmp_path, json.dumps(10 * [1, 0]))
    assert result["unread"] == 0
    assert result["tells_apart"] == {"detection": False, "fuzzing": False}
    assert [note.partition(". ")[0] for note in result["notes"]] == [
        "detection: the judge cannot tell",
        "fuzzing: the judge cannot tell",
    ]


def test_answers_that_cannot_be_read_score_one_half_and_are_counted(url, fake, tmp_path):
    answer = json.loads(RECORDED["labels without an end"]["body"])["choices"][0]["message"]
    result = weak(url, fake, tmp_path, answer["content"])
    for score in ("detection", "fuzzing"):
        assert result[score] == {"value": 0.5, "se": 0.0}
    assert result["unread"] == 1
    assert "100.0% of the labels could not be read and count as half right" in result["notes"]
    assert any("--schema" in note for note in result["notes"])


def test_own_and_dealt_explanations_are_scored_on_the_same_texts(url, fake, tmp_path):
    explainer(url, tmp_path).run()
    asked = {}
    for body in fake.requests:
        system, user = (message["content"] for message in body["messages"])
        if "short phrase" not in system:
            description, _, texts_of = user.partition("\n\n")
            asked.setdefault((system, texts_of), []).append(description)
    assert len(asked) == 6 * 2 * 10
    # Each batch is asked about with two explanations; batches of different latents may be equal.
    assert all(len(descriptions) == 2 for descriptions in asked.values())


def test_a_judge_that_knows_the_truth_tells_apart_and_the_servers_counts_add_up(
    url, fake, tmp_path
):
    result = explainer(url, tmp_path).run()
    assert result["tells_apart"] == {"detection": True, "fuzzing": True}
    sent = len(fake.requests)
    assert result["answers"] == {
        "requests": sent,
        "prompt_tokens": 7 * sent,
        "answer_tokens": 3 * sent,
        "uncounted": 0,
        "cut": 0,
        "models": {},
    }
    assert result["notes"] == []


def test_equal_and_empty_explanations_are_counted(url, fake, tmp_path):
    fake.answer = lambda body: " \n" if "short phrase" in body["messages"][0]["content"] else "[1]"
    estimate = explainer(url, tmp_path, count=3).estimate()
    result = explainer(url, tmp_path, count=3).run()
    assert "3 of 3 latents got an answer without words for an explanation" in result["notes"]
    # Own and dealt explanations are equal, so each batch is asked about once.
    assert len(fake.requests) == 3 * (1 + 2 * 10) < estimate.requests == 3 * (1 + 2 * 2 * 10)


def test_another_model_than_was_asked_for_is_named(url, fake, tmp_path):
    cut = RECORDED["explanation that is cut"]
    fake.faults, fake.answer = 2 * [cut], lambda body: "[1]"
    result = explainer(url, tmp_path, ExplainConfig(model="m", shown=20, parallel=1), count=2).run()
    assert result["answers"]["models"] == {"smollm2-135m-instruct": 2}
    assert (
        "asked for model 'm'; the server says that 'smollm2-135m-instruct' answered"
        in result["notes"]
    )
    assert "2 of 2 latents have the explanation of another one" in result["notes"]
    assert result["answers"]["cut"] == 2


def test_with_schema_labels_are_asked_for_in_their_form(url, fake, tmp_path):
    explainer(url, tmp_path, ExplainConfig(shown=20, schema=True), count=2).run()
    for body in fake.requests:
        if "short phrase" in body["messages"][0]["content"]:
            assert "response_format" not in body
        else:
            schema = body["response_format"]["json_schema"]["schema"]
            assert schema["properties"]["labels"]["minItems"] == 20


@pytest.mark.parametrize("fault", [400, 401, 404, 302])
def test_a_refusal_is_an_error_at_once(url, fake, fault):
    fake.faults = [fault]
    server = chat(url)
    with pytest.raises(InputError, match=f"refuses the request for model 'm', HTTP {fault}"):
        server.ask(server.body(prompts.ask_explanation(["a<<b>>"]), 5))
    assert len(fake.requests) == 1


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(
        ServerError, match=r"127\.0\.0\.1:1/v1 gives no answer after 2 tries: .*refused"
    ):
        chat("http://127.0.0.1:1/v1", tries=2).ask({})


def test_the_key_is_sent_in_the_header_alone(url, fake):
    server = chat(url, key="secret")
    server.ask(server.body(prompts.ask_explanation(["a<<b>>"]), 5))
    assert fake.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in json.dumps(fake.requests)


def test_requests_keep_the_limit_of_a_minute(url):
    waits = []
    server = chat(url, waits, per_minute=30)
    for _ in range(3):
        server.ask(server.body(prompts.ask_explanation(["a<<b>>"]), 5))
    assert len(waits) == 2 and 0 < waits[0] <= 2 < waits[1] <= 4


@pytest.mark.parametrize(
    "address",
    [
        "file:///etc/passwd",
        "127.0.0.1:80",
        "http://",
        "http://u:p@h/v1",
        "http://h/v1?a=b",
        "http://h:x/",
        "http://h/ v1",
    ],
)
def test_what_is_no_address_of_a_server_is_refused(address):
    with pytest.raises(InputError, match="url"):
        chat(address)


@pytest.mark.parametrize(
    "answer, labels",
    [
        ("[1, 0]", [True, False]),
        ("Sure! [TRUE, false].", [True, False]),
        ("[1]", None),
        ("[1, 2]", None),
        ("", None),
        ("[1, [0]]", None),
        ("[" * 9999, None),
        ("<think>[0, 0] or [1, 1]?</think>[1, 0]", [True, False]),
        ("[0, 0]? no</think>\n[1, 0]", [True, False]),
        ("<think>it may be [1, 0], or", None),
    ],
)
def test_only_a_list_of_so_many_labels_is_read(answer, labels):
    assert prompts.read_labels(answer, 2) == labels


def test_what_a_model_thinks_is_no_explanation():
    assert prompts.read_explanation("<think>\nnames?\n</think>\n\nnames of cities") == (
        "names of cities"
    )
    assert prompts.read_explanation("<think>\nnames? or") == ""


def test_balanced_accuracy_weighs_both_sides_alike():
    assert (
        balanced_accuracy([True, False, False, False], [True, True, False, None]) == (1 + 0.5) / 2
    )


def test_windows_are_of_both_kinds_and_apart_from_those_that_explain(small_recipe, tmp_path):
    from ksparse.interop import load
    from ksparse.lm.model import LM
    from ksparse.training.train import train

    run = train(small_recipe(), tmp_path / "run")
    options = ExplainConfig(latents=3, examples=4, test=4, tokens=3000)
    found = collect(load(run.path), LM(acts=run.subject().acts), options)
    assert found.of
    for specimen in found.of:
        assert len(specimen.train) == 4 and len(specimen.test) == 8
        assert all(window.active and window.marked.any() for window in specimen.train)
        assert sum(window.active for window in specimen.test) == 4
        assert all(window.marked.any() for window in specimen.test)
        silent = [window for window in specimen.test if not window.active]
        assert all((window.acts == 0).all() for window in silent)
    again = RunFolder(tmp_path / "kept")
    again.path.mkdir()
    texts.write(again, "key", found)
    kept = texts.read(again, "key")
    assert (kept.strings, kept.too_few, kept.origin) == (found.strings, found.too_few, found.origin)
    for was, now in zip(found.of, kept.of, strict=True):
        assert was.latent == now.latent
        for side in ("train", "test"):
            for window, other in zip(getattr(was, side), getattr(now, side), strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(window, other, strict=True))
    with pytest.raises(InputError, match="there is no latent 64; this SAE has latents 0 to 63"):
        collect(load(run.path), LM(acts=run.subject().acts), ExplainConfig(latent=(64,)))


def test_kept_texts_belong_to_weights_text_and_options(small_recipe):
    from ksparse.sae.model import SAE, Shape

    sae, acts = SAE(Shape(d_model=16, n_latents=64, k=4)), small_recipe().acts
    key = texts.key_of(sae, acts, ExplainConfig())
    assert texts.key_of(sae, acts, ExplainConfig(url="http://h/v1", model="m", shown=2)) == key
    assert texts.key_of(sae, acts, ExplainConfig(test=4)) != key
    assert texts.key_of(sae, dataclasses.replace(acts, context=9), ExplainConfig()) != key
    with torch.no_grad():
        sae.b_enc[3] += 1e-3
    assert texts.key_of(sae, acts, ExplainConfig()) != key


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"key": "key", "checksum": "0", "texts": 3}']
)
def test_kept_texts_that_are_damaged_or_of_other_options_are_chosen_again(tmp_path, damage):
    run = RunFolder(tmp_path)
    assert texts.read(run, "key") is None
    texts.write(run, "key", specimens(2))
    assert texts.read(run, "key") is not None
    assert texts.read(run, "other") is None
    file = run.file("explain", "texts.json")
    whole = file.read_text()
    file.write_text(whole.replace('"latent": 1', '"latent": 2'))
    assert texts.read(run, "key") is None
    file.write_bytes(damage)
    assert texts.read(run, "key") is None


def test_the_verb_counts_first_asks_with_a_url_and_names_how_to_go_on(
    small_recipe, tmp_path, verb, monkeypatch
):
    from ksparse.training.train import train

    run = train(small_recipe(), tmp_path / "run")
    flags = [
        "explain",
        run.path,
        "--latents",
        2,
        "--examples",
        4,
        "--test",
        4,
        "--tokens",
        3000,
        "--device",
        "cpu",
    ]
    code, out, err = verb(*flags)
    assert code == 0 and "2 latents: 18 requests, about" not in err and "nothing was sent" in out, (
        err
    )
    assert not (run.path / "explain" / "answers.jsonl").exists()
    fake = FakeServer()
    fake.answer = lambda body: (
        "<script>x</script>"
        if "short phrase" in body["messages"][0]["content"]
        else "[1, 0, 1, 0, 1]"
    )
    with serving(fake) as url:
        fake.faults = [404]
        code, out, err = verb(*flags, "--url", url, "--model", "m")
        assert code == 2 and f"go on with: ksparse explain {run.path}" in err
        code, out, err = verb(*flags, "--url", url, "--model", "m")
    assert code == 0 and "detection" in out and "N2G" in out, err
    assert run.eval("explain")["latents"][0]["explanation"] == "<script>x</script>"
    assert (
        verb(*flags, "--url", "http://h/v1")[2]
        .strip()
        .endswith("--url needs --model NAME, the model's name on that server")
    )
