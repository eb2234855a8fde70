"""Chat models that explain and judge: their questions, their answers, and services that fail."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hf_transcoders.errors import TranscoderError
from hf_transcoders.features.explain import (
    BadAnswer,
    ChatDetectionScorer,
    ChatExplainer,
    ChatFuzzingScorer,
    ChatSimulationScorer,
    Explanation,
    LocalChat,
    NGramExplainer,
    ServiceChat,
    ServiceError,
    Transcript,
    score_explanations,
    split_examples,
)
from hf_transcoders.features.explain.chat_explainer import marked, phrase_of
from hf_transcoders.features.explain.chat_scorers import numbers_of

from .conftest import PAIR, RARE, TOKEN, VOCABULARY


@pytest.fixture
def service():
    """A service on this machine with the API of OpenAI; what it answers is set by the test."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(body)
            server.keys.append(self.headers.get("Authorization"))
            answer = server.answer(body)
            status, content = (500, {"error": "down"}) if answer is None else (200, answer)
            if isinstance(content, str):
                message = {"role": "assistant", "content": content}
                content = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "system_fingerprint": "",
                           "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                           "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}  # fmt: skip
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.keys, server.answer = [], [], lambda body: "EXPLANATION: planted"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.shutdown()
    server.server_close()


class Told:
    """A chat model that is told what to answer."""

    name = "told"

    def __init__(self, answer):
        self.asked, self._answer = [], answer

    def answer(self, messages):
        self.asked.append(messages)
        return self._answer(messages)


def test_the_explainer_sees_training_windows_alone(service, examples, tokenizer):
    split = split_examples(examples, TOKEN)
    explanation = ChatExplainer(ServiceChat(service.url, "m"), tokenizer).fit(split)
    assert explanation.text == "planted" and explanation.predict is None
    (body,) = service.asked
    assert body["model"] == "m" and body["temperature"] == 0
    text = body["messages"][1]["content"]
    assert text.count("Text ") == 5 and "<< w2>>" in text and "' w2' 10" in text
    # No secret of the Hub is sent to the service, and its own key alone if there is one.
    assert service.keys == [None]
    ServiceChat(service.url + "/", "m", api_key="k").answer([{"role": "user", "content": "a"}])
    assert service.keys[1] == "Bearer k"


def test_marks():
    assert marked(["a", "b", "c", "d"], [1, 2]) == "a<<bc>>d"


@pytest.mark.parametrize("answer", ["", "It is about cats.", "EXPLANATION:", "EXPLANATION: " + "x" * 501])
def test_explanations_in_another_form_are_refused(answer):
    with pytest.raises(BadAnswer, match="no line 'EXPLANATION: ...' with 1 to 500 characters"):
        phrase_of(answer)


def test_explanations_are_found_in_long_answers():
    assert phrase_of("Let me think.\n**Explanation: names of months**\n") == "names of months"


@pytest.mark.parametrize(
    "answer", ["", "yes", "[1, 0]", "[1, 0, 2]", "[1, 0, true]", "[1, 0, 0.5]", "[1, 0, [1]]", "[1, 0,"]
)
def test_lists_in_another_form_are_refused(answer):
    with pytest.raises(BadAnswer, match="is not a list of 3 whole numbers from 0 to 1"):
        numbers_of(answer, 3, 1)


def test_lists_are_found():
    assert numbers_of("Texts [1] and [2]: the answer is [0, 1, 1].", 3, 1) == [0, 1, 1]


def test_a_judge_that_knows_the_rule_is_right(examples, tokenizer):
    split = split_examples(examples, TOKEN)
    firing = {VOCABULARY[3], VOCABULARY[7], VOCABULARY[11]}

    def detect(messages):
        texts = messages[0]["content"].split("\n\n", 1)[1].split("\n")
        return json.dumps([int(any(word in text + " " for word in (" w2 ", " w6 ", " w10 "))) for text in texts])

    def fuzz(messages):
        texts = messages[0]["content"].split("\n\n", 1)[1].split("\n")
        marks = [[part.split(">>")[0] for part in text.split("<<")[1:]] for text in texts]
        return json.dumps(
            [int(all(word in firing or "w" in word and word in "".join(firing) for word in its)) for its in marks]
        )

    table = {" w2": 3, " w6": 1, " w10": 2}

    def simulate(messages):
        return json.dumps([table.get(token, 0) for token in json.loads(messages[0]["content"].split("\n\n", 1)[1])])

    explanation = Explanation("planted", "w2, w6 and w10")
    assert ChatDetectionScorer(Told(detect), tokenizer).score(explanation, split)["balanced_accuracy"] > 0.85
    assert ChatFuzzingScorer(Told(fuzz), tokenizer).score(explanation, split)["balanced_accuracy"] > 0.85
    scores = ChatSimulationScorer(Told(simulate), tokenizer).score(explanation, split)
    assert scores == {"top_and_random": pytest.approx(1), "random_only": pytest.approx(1)}
    asked = Told(lambda messages: "[1, 1, 1, 1, 1]")
    assert ChatDetectionScorer(asked, tokenizer).score(explanation, split) == {"balanced_accuracy": 0.5}
    assert all("w2, w6 and w10" in messages[0]["content"] for messages in asked.asked)


def scored(examples, tokenizer, chat, tmp_path, features=(TOKEN, PAIR, RARE)):
    explainers = [
        NGramExplainer(tokenizer, 1),
        ChatExplainer(Transcript(chat, tmp_path / "transcript.jsonl"), tokenizer),
    ]
    judge = ChatDetectionScorer(Transcript(chat, tmp_path / "transcript.jsonl"), tokenizer)
    return score_explanations(
        examples, features, explainers, [], text_scorers=[judge], output_dir=tmp_path, progress=False
    )


def test_a_service_that_stops_leaves_what_is_done(service, examples, tokenizer, tmp_path):
    good = lambda body: "EXPLANATION: x" if len(body["messages"]) == 2 else "[1, 0, 1, 0, 1]"  # noqa: E731
    service.answer = lambda body: good(body) if len(service.asked) <= 7 else None
    chat = ServiceChat(service.url, "m")
    with pytest.raises(
        TranscoderError,
        match=r"Explaining feature 2 failed: the service at .* did not answer .*scores of 1 features are kept",
    ):
        scored(examples, tokenizer, chat, tmp_path)
    before = len(service.asked)
    service.answer = good
    found = scored(examples, tokenizer, chat, tmp_path)
    assert [result.feature for result in found] == [TOKEN, PAIR, RARE]
    assert found[2].skipped and not found[0].skipped and found[1].texts["chat model"] == "x"
    # Neither the first feature nor the answers about the second one are asked for again.
    questions = [json.dumps(body["messages"]) for body in service.asked]
    assert not set(questions[: before - 1]) & set(questions[before:])
    assert scored(examples, tokenizer, chat, tmp_path) == found and len(service.asked) == len(questions)
    lines = [json.loads(line) for line in (tmp_path / "transcript.jsonl").read_text().splitlines()]
    assert all(line["answer"] and line["messages"] and line["model"] == "m" for line in lines)
    with pytest.raises(TranscoderError, match="is of a run with features"):
        scored(examples, tokenizer, chat, tmp_path, features=(TOKEN,))


def test_a_line_that_was_cut_is_done_again(examples, tokenizer, tmp_path):
    chat = Told(lambda messages: "EXPLANATION: x" if len(messages) == 2 else "[1, 0, 1, 0, 1]")
    found = scored(examples, tokenizer, chat, tmp_path)
    for name in ("scored.jsonl", "transcript.jsonl"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-9])
    assert scored(examples, tokenizer, chat, tmp_path) == found
    (tmp_path / "scored.jsonl").write_text("{}\n")
    with pytest.raises(TranscoderError, match="lacks 'facts'"):
        scored(examples, tokenizer, chat, tmp_path)


def test_answers_in_another_form_are_counted(examples, tokenizer, tmp_path):
    chat = Told(lambda messages: "I cannot help with that.")
    found = scored(examples, tokenizer, chat, tmp_path)
    assert "no line 'EXPLANATION: ...'" in found[0].failed["chat model"]
    assert "token table" in found[0].texts and "chat model" not in found[0].texts


def test_services_that_cannot_be_asked(service):
    with pytest.raises(TranscoderError, match="is not the address of a service"):
        ServiceChat("localhost:8000", "m")
    with pytest.raises(ServiceError, match="did not answer"):
        ServiceChat("http://127.0.0.1:9/v1", "m", timeout=2).answer([{"role": "user", "content": "a"}])
    service.answer = lambda body: {"choices": []}
    with pytest.raises(ServiceError, match="did not answer"):
        ServiceChat(service.url, "m").answer([{"role": "user", "content": "a"}])


def test_a_local_model_needs_a_chat_template(base, tokenizer):
    with pytest.raises(TranscoderError, match="has no chat template"):
        LocalChat(base, tokenizer)


def test_a_local_model_answers(base, tokenizer):
    import copy

    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    answer = LocalChat(base, chatting, max_tokens=3).answer([{"role": "user", "content": " w2"}])
    assert isinstance(answer, str) and answer == LocalChat(base, chatting, max_tokens=3).answer(
        [{"role": "user", "content": " w2"}]
    )
