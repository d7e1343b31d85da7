"""The reward `judge`, against servers on loopback that answer, and that do all that servers should not."""

import json
import re
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lowmem_rlhf import http_client
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.http_client import is_local
from lowmem_rlhf.recipe.sections import RewardConfig
from lowmem_rlhf.rewards import chat_endpoint, load_rewards, score
from lowmem_rlhf.rewards.loading import check_reward_columns

TEMPLATE = "Q: {prompt}\nA: {completion}"


class Server:
    """A stand-in: `answer` gets (handler, question text, number of the request) and writes the response."""

    def __init__(self, answer):
        self.answer, self.requests, self.headers, self.active, self.most = answer, [], [], 0, 0
        self.lock, self.over = threading.Lock(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.requests)
                    outer.requests.append({"path": self.path, **body})
                    outer.headers.append(self.headers)
                    outer.active += 1
                    outer.most = max(outer.most, outer.active)
                try:
                    outer.answer(self, body["messages"][0]["content"], number)
                except OSError:  # the client has gone
                    pass
                finally:
                    with outer.lock:
                        outer.active -= 1

            def log_message(self, *arguments):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def texts(self):
        return [request["messages"][0]["content"] for request in self.requests]


@contextmanager
def serving(answer):
    server = Server(answer)
    threading.Thread(target=server.http.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.http.shutdown()
        server.http.server_close()


def send(handler, content, status=200, **headers):
    data = content if isinstance(content, bytes) else content.encode()
    handler.send_response(status)
    for name, value in {"Content_Length": str(len(data)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def reply(handler, text):
    send(handler, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}))


def last_number(handler, question, number):
    """Reply the number that stands last in the question."""
    reply(handler, f"Fine. Score: {re.findall('[0-9]+', question)[-1]}")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(chat_endpoint, "_FIRST_WAIT", 0.001)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")


def judge(url, on_error="fail", **options):
    given = {"model": "m", "url": url, "prompt": TEMPLATE, **options}
    return load_rewards([RewardConfig(function="judge", options=given, on_error=on_error)])[0]


def scored(reward, texts, prompts=None, **columns):
    return score([reward], prompts or ["p"] * len(texts), texts, [[1]] * len(texts), columns)


def test_values_are_the_last_numbers_on_the_scale():
    replies = ["Score: 7", "Score: 8/10", "I count 3 errors.\n**Score: 4.5**", "11", "-1", "none", "", None, "10"]
    replies += ["<think>so 9</think>2", "<think>so 9", "v1.5 of GPT4: 6.", "between 8-10", "9" * 400]
    wanted = [0.7, 0.8, 0.45, None, None, None, None, None, 1.0, 0.2, None, 0.6, None, None]
    with serving(lambda handler, question, number: reply(handler, replies[int(question.split()[-1])])) as server:
        found = scored(judge(server.url), [f"a {n}" for n in range(len(replies))])
        assert found.by_name["judge"] == wanted
        assert found.metrics == {"judge/no_number": wanted.count(None)}
        assert scored(judge(server.url, scale=[1.0, 5.0], prompt="{completion}"), ["2"]).by_name["judge"] == [0.875]
        assert scored(judge(server.url, scale=[10.0, 0.0]), ["a 0"]).by_name["judge"] == [pytest.approx(0.3)]
    sent = server.requests[0]
    assert (sent["path"], sent["model"], sent["temperature"], sent["max_tokens"]) == (
        "/v1/chat/completions",
        "m",
        0,
        512,
    )
    assert "Authorization" not in server.headers[0]


def test_what_the_judge_is_asked(monkeypatch):
    monkeypatch.setenv("MY_KEY", "word")
    template = "{{x}} {prompt} | {completion} | {answer} {hint?}"
    with serving(lambda handler, question, number: reply(handler, "5")) as server:
        one = judge(f"{server.url}/", prompt=template, api_key_env="MY_KEY")
        chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "{answer}?"}]
        texts = ["<think>7</think> {hint}\n", "b", "c"]
        found = scored(
            one, texts, ["p", chat, [{"role": "user", "content": "u"}]], answer=[1.50, "two", None], hint=["", "h", ""]
        )
        assert found.by_name["judge"] == [0.5, 0.5, None]  # a row without an answer has no value
        assert sorted(server.texts()) == ["{x} p | {hint} | 1.5", "{x} system: s\n\nuser: {answer}? | b | two h"]
        assert {headers["Authorization"] for headers in server.headers} == {"Bearer word"}
        with pytest.raises(UserError, match="judge needs a column 'answer'"):
            check_reward_columns([one], ["hint"])
        check_reward_columns([one], ["answer"])
        server.answer = lambda handler, question, number: send(handler, f"no {handler.headers['Authorization']}", 401)
        with pytest.raises(
            RunError, match=r"answered with status 401 \(no Bearer \*\*\*\); name its key in api_key_env$"
        ):
            scored(one, ["d"], answer=["x"], hint=[""])
        server.answer = last_number
        scored(judge(server.url), ["1"], [chat])
        assert server.texts()[-1] == "Q: system: s\n\nuser: {answer}?\nA: 1"


def test_equal_questions_are_asked_once_in_a_run():
    with serving(last_number) as server:
        one = judge(server.url)
        assert scored(one, ["1", "2", "1", "1"]).by_name["judge"] == [0.1, 0.2, 0.1, 0.1]
        assert scored(one, ["2", "3"]).by_name["judge"] == [0.2, 0.3]
        assert scored(one, ["3"], ["other"]).by_name["judge"] == [0.3]
        assert sorted(server.texts()) == ["Q: other\nA: 3", "Q: p\nA: 1", "Q: p\nA: 2", "Q: p\nA: 3"]


def test_requests_go_out_together_but_not_more_than_so_many():
    together = threading.Barrier(4, timeout=60)

    def answer(handler, question, number):
        together.wait()  # nobody is answered before four have asked
        last_number(handler, question, number)

    with serving(answer) as server:
        assert scored(judge(server.url, concurrency=4), list("12345678")).by_name["judge"] == [
            n / 10 for n in range(1, 9)
        ]
        assert server.most == 4


def test_failures_that_pass_are_tried_again():
    def answer(handler, question, number):
        if number < 2:
            return send(handler, "busy", 429 if number else 503, Retry_After="0")
        if number == 2:
            return handler.connection.shutdown(socket.SHUT_RDWR)  # no answer at all
        if number == 3:
            return send(handler, "half", Content_Length="100")
        return last_number(handler, question, number)

    with serving(answer) as server:
        assert scored(judge(server.url, retries=4), ["6"]).by_name["judge"] == [0.6]
        assert len(server.requests) == 5


ENDLESS = b"HTTP/1.1 200 OK\r\n"


def dribble(handler, server, head, part):
    handler.wfile.write(head)
    while not server.over.wait(0.01):
        handler.wfile.write(part)
        handler.wfile.flush()


FAULTS = {
    "busy": (lambda h, s: send(h, "no", 500), r"answered with status 500 \(3 tries\)", 3),
    "garbage": (lambda h, s: send(h, "<html>"), "answered with something that is no chat completion", 1),
    "other JSON": (lambda h, s: send(h, '{"choices": []}'), "answered with something that is no chat completion", 1),
    "deep JSON": (lambda h, s: send(h, "[" * 200_000), "answered with something that is no chat completion", 1),
    "refused": (lambda h, s: send(h, "too\nlong", 400), r"answered with status 400 \(too long\)$", 1),
    "no model": (lambda h, s: send(h, "", 404), "answered with status 404; mend url or model$", 1),
    "elsewhere": (
        lambda h, s: send(h, "", 302, Location="http://192.0.2.1/"),
        "answered with status 302; mend url$",
        1,
    ),
    "no HTTP": (
        lambda h, s: h.wfile.write(b"hello\r\n\r\n"),
        r"broke the connection off: BadStatusLine \(3 tries\)",
        3,
    ),
    "huge": (lambda h, s: send(h, b" " * (2**20 + 1)), "answered with more than 1048576 bytes", 1),
    "endless": (
        lambda h, s: dribble(h, s, ENDLESS + b"\r\n", b" " * 2**16),
        "answered with more than 1048576 bytes",
        1,
    ),
    "silent": (lambda h, s: s.over.wait(), "did not answer within 0.4 seconds", 1),
    "slow headers": (lambda h, s: dribble(h, s, ENDLESS, b"A"), "did not answer within 0.4 seconds", 1),
    "slow body": (lambda h, s: dribble(h, s, ENDLESS + b"\r\n", b" "), "did not answer within 0.4 seconds", 1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_server_that_does_not_answer_is_one_sentence(name):
    act, sentence, tries = FAULTS[name]
    timeout = 0.4 if "0.4" in sentence else 60.0
    with serving(lambda handler, question, number: act(handler, server)) as server:
        with pytest.raises(RunError, match=rf"^reward function judge: {re.escape(server.url)} {sentence}") as caught:
            scored(judge(server.url, timeout=timeout, retries=2), ["6"])
        assert "\n" not in str(caught.value)
        asked = len(server.requests)  # a busy computer may not have begun to read a request when its time is over
        assert asked <= tries if "0.4" in sentence else asked == tries


def test_the_time_of_a_request_is_one_clock(monkeypatch):
    monkeypatch.setattr(http_client.threading.Timer, "start", lambda timer: None)  # a timer that is late
    late = threading.Event()

    def answer(handler, question, number):
        late.wait(0.3)
        last_number(handler, question, number)

    with serving(answer) as server:  # a second clock would have called this a broken connection, and asked again
        assert scored(judge(server.url, timeout=0.2, retries=2), ["6"]).by_name["judge"] == [0.6]
        assert len(server.requests) == 1


def test_one_question_without_an_answer_costs_its_completion_only():
    def answer(handler, question, number):
        return send(handler, "x") if question.endswith("2") else last_number(handler, question, number)

    with serving(answer) as server:
        one = judge(server.url, on_error="skip")
        found = scored(one, ["1", "2", "3", "2"])
        assert found.by_name["judge"] == [0.1, None, 0.3, None] and found.failures == {"judge": (2, 0)}
        assert scored(judge(server.url, on_error="zero"), ["2"]).by_name["judge"] == [0.0]
        scored(one, ["1", "2"])
        assert server.texts().count("Q: p\nA: 2") == 3  # what had no answer is asked again


def test_a_dead_server_is_found_by_the_first_question():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        with pytest.raises(
            RunError, match=r"^reward function judge: http\S+ cannot be reached: Connection refused \(3 tries\); start"
        ):
            scored(judge(url, retries=2), ["6"])
        one = judge(url, on_error="skip", retries=0, concurrency=1)
        tries = []
        connect = http_client.http.client.HTTPConnection.connect
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(http_client.http.client.HTTPConnection, "connect", lambda c: tries.append(c) or connect(c))
            assert scored(one, list("12345")).by_name["judge"] == [None] * 5
        assert len(tries) == 1 and one.record.failed == 1


def test_ctrl_c_does_not_wait_for_the_server(monkeypatch):
    import os
    import signal

    def answer(handler, question, number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        server.over.wait()

    with serving(answer) as server:
        with pytest.raises(KeyboardInterrupt):
            scored(judge(server.url, timeout=3600.0, concurrency=2), list("123456"))
        assert len(server.requests) == 2 and not server.over.is_set()


def test_prompts_stay_on_this_computer_unless_told_otherwise(monkeypatch):
    local = [
        "127.0.0.1",
        "127.9.9.9",
        "10.1.2.3",
        "192.168.0.9",
        "172.16.0.1",
        "169.254.1.1",
        "100.64.0.1",
        "::1",
        "fe80::1%eth0",
    ]
    assert all(map(is_local, [*local, "fd00::1", "::ffff:10.0.0.1", "0.0.0.0"]))
    assert not any(map(is_local, ["8.8.8.8", "172.32.0.1", "::ffff:8.8.8.8", "2001:4860:4860::8888"]))
    with pytest.raises(
        UserError, match=r"option url: 8\.8\.8\.8 is neither of this computer nor private.*allow_remote"
    ):
        judge("http://8.8.8.8/v1")
    judge("http://8.8.8.8/v1", allow_remote=True)
    judge("http://localhost:1/v1")
    named = {"judge.example": "8.8.8.8", "lan.example": "10.0.0.1"}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: [(2, 1, 6, "", (named[host], 0))])
    with pytest.raises(UserError, match=r"judge\.example is neither of this computer nor private"):
        judge("https://judge.example/v1")
    judge("https://lan.example/v1")


def test_a_name_that_leads_elsewhere_later_is_not_sent_to(monkeypatch):
    with serving(last_number) as server:
        one = judge(server.url)
        monkeypatch.setattr(http_client, "is_local", lambda address: False)
        with pytest.raises(
            RunError, match=r"is at 127\.0\.0\.1, which is not a private address; set allow_remote: true$"
        ):
            scored(one, ["6"])
        assert not server.requests


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "url: got '127.0.0.1:8000'; give the address that ends in /v1"),
        ({"url": "http://127.0.0.1:x/v1"}, "url: got 'http://127.0.0.1:x/v1', which is no address"),
        ({"url": "http://me:pw@127.0.0.1/v1"}, "url: got"),
        ({"prompt": "{prompt}"}, "prompt: has no place for the answer that is judged; write {completion}"),
        ({"prompt": "{completion} {"}, "prompt: '{completion} {' is not a template"),
        ({"model": " "}, "model: got ''"),
        ({"scale": [1.0]}, "scale: got [1.0]; give the two numbers"),
        ({"scale": ["1", "2"]}, "option scale: got ['1', '2']; give a list of numbers"),
        ({"scale": [1.0, 1.0]}, "scale: got [1.0, 1.0]; give the two numbers"),
        ({"max_tokens": 0}, "max_tokens: got 0; give a whole number from 1"),
        ({"concurrency": 0}, "concurrency: got 0; give a whole number from 1"),
        ({"timeout": 0.0}, "timeout: got 0; give a number of seconds above 0"),
        ({"retries": -1}, "retries: got -1; give a whole number from 0"),
        (
            {"api_key_env": "sk-abc"},
            "api_key_env: is no name of an environment variable; give the name, and not the key",
        ),
        ({"api_key_env": "hf_abc"}, "api_key_env: names an environment variable that is not set"),
    ],
)
def test_what_the_options_of_a_judge_refuse(options, message):
    with pytest.raises(UserError) as caught:
        judge(options.pop("url", "http://127.0.0.1:1/v1"), **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "_abc" not in str(caught.value) and "-abc" not in str(caught.value)


def test_slowness_within_the_time_is_no_fault():
    def answer(handler, question, number):
        content = json.dumps({"choices": [{"message": {"content": "4"}}]}).encode()
        handler.wfile.write(ENDLESS + b"\r\n")
        for place in range(len(content)):
            handler.wfile.write(content[place : place + 1])
            handler.wfile.flush()
            time.sleep(0.001)

    with serving(answer) as server:
        assert scored(judge(server.url), ["x"]).by_name["judge"] == [0.4]
