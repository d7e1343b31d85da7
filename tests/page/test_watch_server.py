"""The server of the page: who is answered, what, and what it never does."""

import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
from page_runs import append, lines, metrics_row, sample_row, write_run

from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.page import chat as chats
from lowmem_rlhf.page.chat import Chat
from lowmem_rlhf.page.followed import Followed
from lowmem_rlhf.page.server import PageServer
from lowmem_rlhf.run.lock import LOCK, Lock

POLICY = "default-src 'none'"


class Client:
    """Asks a server as the page does."""

    def __init__(self, server):
        self.server, self.port = server, server.server_address[1]

    def ask(self, path, method="GET", body=None, token=None, host=None, **headers):
        """Return status, headers and content; JSON is decoded."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {"X-Token": self.server.token if token is None else token, **headers}
        if host is not None:
            sent["Host"] = host
        try:
            connection.request(method, path, None if body is None else json.dumps(body), sent)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        is_json = answer.headers["Content-Type"] == "application/json" and content
        return answer.status, answer.headers, json.loads(content) if is_json else content.decode()

    def get(self, path):
        """Return what is answered."""
        status, _, content = self.ask(path)
        assert status == 200, content
        return content

    def refused(self, path, **how):
        """Return status and sentence of what is not answered."""
        status, _, content = self.ask(path, **how)
        assert status >= 400 and list(content) == ["error"] and "Traceback" not in content["error"]
        return status, content["error"]


@contextmanager
def serving(followed, open_run=None, page=lambda data, token: (f"<p>{token}", POLICY)):
    server = PageServer(followed, Chat(open_run, followed), page=page)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield Client(server)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "runs" / "sums", steps=4, samples=2, left="adapter")


@pytest.fixture
def client(run):
    with serving(Followed([run], [])) as client:
        yield client


@pytest.fixture
def key(client):
    (one,) = client.get("/api/runs")
    return one["id"]


def test_the_page_is_given_to_who_has_its_address(client):
    path = client.server.address.removeprefix(f"http://127.0.0.1:{client.port}")
    status, headers, content = client.ask(path, token="")
    assert (status, content) == (200, f"<p>{client.server.token}")
    assert headers["Content-Security-Policy"] == POLICY and headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Referrer-Policy"] == "no-referrer" and headers["Cache-Control"] == "no-store"
    assert headers["X-Frame-Options"] == "DENY" and headers["X-Content-Type-Options"] == "nosniff"
    assert client.ask("/favicon.ico", token="")[0] == 204


@pytest.mark.parametrize("token", ["", "wrong", "ü", None])
@pytest.mark.parametrize("path", ["/", "/api/runs", "/api/gpu", "/api/run/x", "/nothing", "/../../etc/passwd"])
def test_a_wrong_or_missing_token_is_refused(client, path, token):
    right = client.server.token
    for given in (token, right[:-1], right + "x", right.swapcase()) if token else ("",):
        where = f"{path}?token={given}" if path == "/" and given.isascii() else path
        status, _, content = client.ask(where, token="" if path == "/" else given.encode("utf-8").decode("latin-1"))
        assert status == 403 and "the token is missing or wrong" in str(content) and right not in str(content)
    assert client.ask("/api/run/x/chat", "POST", {"prompt": "a"}, token="no")[0] == 403


def test_a_token_in_an_address_opens_the_page_alone(client):
    assert client.ask(f"/api/runs?token={client.server.token}", token="")[0] == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[", "10.0.0.1", "a@b"]
)
def test_another_host_name_is_refused(client, host):
    for path in ("/api/runs", f"/?token={client.server.token}", "/favicon.ico"):
        assert client.ask(path, host=host)[0] == 403
    assert client.ask("/api/run/x/chat", "POST", {"prompt": "a"}, host=host)[0] == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1:80", "[::1]:8000"])
def test_this_machines_names_are_answered(client, host):
    assert client.ask("/api/runs", host=host)[0] == 200  # also through a tunnel, where the port is another one


def test_only_this_machine_is_listened_to(client):
    assert client.server.server_address[0] == "127.0.0.1"


def spoken(client, text):
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as connection:
        connection.sendall(text.encode("latin-1"))
        return connection.makefile("rb").read().decode()


def test_what_is_no_question_is_answered_with_a_sentence(client):
    token = f"Host: localhost\r\nX-Token: {client.server.token}\r\nConnection: close\r\n"
    for text in ("nonsense\r\n\r\n", f"BREW /api/runs HTTP/1.1\r\n{token}\r\n", "GET / HTTP/9.9\r\n\r\n"):
        answer = spoken(client, text)
        assert '{"error":"' in answer and "<html" not in answer.lower() and "Traceback" not in answer
    assert " 403 " in spoken(client, "GET /api/runs HTTP/1.0\r\n\r\n")  # no Host at all
    assert " 403 " in spoken(client, f"GET /api/runs HTTP/1.1\r\nHost: evil.example\r\n{token}\r\n")  # two of them
    for target in ("http://evil.example/api/runs", "*"):
        assert " 400 " in spoken(client, f"GET {target} HTTP/1.1\r\n{token}\r\n")
    more = token.replace("Connection: close", "Content-Length: 5")
    assert spoken(client, f"GET /api/runs HTTP/1.1\r\n{more}\r\nGET /").count("HTTP/1.1 ") == 1  # no second question
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
        assert " 405 " in spoken(client, f"{method} /api/runs HTTP/1.1\r\n{token}\r\n")
    assert spoken(client, f"HEAD /api/runs HTTP/1.1\r\n{token}\r\n").endswith("\r\n\r\n")


def test_one_connection_takes_several_questions(client):
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    for path, status in (("/api/runs", 200), ("/api/nothing", 404), ("/api/runs", 200)):
        connection.request("GET", path, headers={"X-Token": client.server.token})
        answer = connection.getresponse()
        assert answer.status == status and json.loads(answer.read())
    connection.close()


def test_what_the_page_asks_is_what_the_run_has(client, key, run):
    (one,) = client.get("/api/runs")
    assert one["path"].endswith("runs/sums") and (one["state"], one["step"]) == ("finished", 4)
    told = client.get(f"/api/run/{key}")
    assert told["recipe"] == (run / "recipe.yaml").read_text() and told["rewards"] == ["exact", "length"]
    columns = client.get(f"/api/run/{key}/columns?since=2&points=10")
    assert columns["step"] == [3, 4] and columns["columns"]["reward/mean"] == [0.003, 0.004]
    asked = "text=STEP+3&task=&low=0.3&high=&reward=length&first=1&last=4&truncated=false&sort=oldest&offset=1&limit=5"
    found = client.get(f"/api/run/{key}/samples?{asked}")
    assert (found["total"], found["all"]) == (2, 8) and [row["index"] for row in found["rows"]] == [5]
    same = client.get(f"/api/run/{key}/same_prompt?index=5&limit=4")
    assert same["rows"][-1]["index"] <= 7 and {row["prompt"][0]["content"] for row in same["rows"]} == {
        "What is 4 + 1?"
    }
    assert client.get("/api/gpu")["now"] == [] or {"name", "utilization"} <= set(client.get("/api/gpu")["now"][0])


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("columns?since=-1", 400, "since: got '-1'; it should be a whole number from 0 to"),
        ("columns?points=0", 400, "points: got '0'; it should be a whole number from 1 to 2000"),
        ("columns?points=2.5", 400, "points: got '2.5'"),
        ("columns?point=5", 400, "there is no parameter 'point'; did you mean 'points'?; there is since, points"),
        ("columns?since=1&since=2", 400, "since: it is given twice"),
        (f"columns?since={'9' * 900}", 400, "since: got '9"),
        ("samples?limit=-1", 400, "limit: got '-1'; it should be a whole number from 0 to 200"),
        ("samples?limit=100000", 400, "limit: got '100000'"),
        ("samples?offset=abc", 400, "offset: got 'abc'"),
        ("samples?offset=%C2%B2", 400, "offset: got '²'"),
        ("samples?low=nan", 400, "low: got 'nan'; it should be a number"),
        ("samples?truncated=1", 400, "truncated: got '1'; it should be true or false"),
        ("samples?sort=best", 400, "sort: got 'best'; did you mean 'oldest'?; give one of newest, oldest"),
        ("samples?reward=style", 400, "reward: got 'style'; there is exact, length"),
        ("samples?text=" + "x" * 1001, 400, "text: it has 1,001 characters"),
        ("samples?text=%ff", 400, "the parameters cannot be read"),
        ("same_prompt", 400, "index: it is missing"),
        ("same_prompt?index=8", 404, "index: there is no sample 8; they are 0 to 7"),
        ("nothing", 404, "there is no '/api/run/"),
        ("columns/more", 404, "there is no '/api/run/"),
        ("../columns", 404, "there is no '/api/run/"),
    ],
)
def test_what_cannot_be_asked_is_a_sentence(client, key, path, status, says):
    told = client.refused(f"/api/run/{key}/{path}")
    assert told[0] == status and told[1].startswith(says)


def test_no_path_leads_to_a_file(client, run):
    for path in ("..", "%2e%2e", "%2e%2e%2f%2e%2e", str(run), "sums", "x" * 5000, "%00"):
        assert client.refused(f"/api/run/{path}") == (404, client.refused(f"/api/run/{path}")[1])
    for path in ("/recipe.yaml", "/api/../recipe.yaml", "/sums/recipe.yaml", f"{run}/recipe.yaml"):
        assert client.ask(path)[0] == 404


def test_a_running_run_is_followed(client, key, run):
    assert client.get(f"/api/run/{key}/columns")["last"] == 4
    append(run / "metrics.jsonl", [metrics_row(5)])
    append(run / "samples.jsonl", [sample_row(5, 0)])
    assert client.get(f"/api/run/{key}/columns?since=4")["step"] == [5]
    assert client.get(f"/api/run/{key}/samples")["rows"][0]["step"] == 5 and client.get("/api/runs")[0]["step"] == 5
    with (run / "metrics.jsonl").open("a") as file:
        file.write(lines([metrics_row(6)])[:-9])
    assert client.get(f"/api/run/{key}/columns?since=5")["step"] == []


def test_a_run_that_goes_away_is_said_and_the_others_go_on(tmp_path, run):
    other = write_run(tmp_path / "runs" / "other", steps=1)
    with serving(Followed([run, other], [])) as client:
        keys = {one["path"].rpartition("/")[2]: one["id"] for one in client.get("/api/runs")}
        assert client.get(f"/api/run/{keys['sums']}/samples")["all"] == 8
        run.rename(tmp_path / "elsewhere")
        for what in ("", "/columns", "/samples", "/same_prompt?index=0"):
            assert client.refused(f"/api/run/{keys['sums']}{what}")[1].endswith("the run was moved or deleted")
        told = {one["path"].rpartition("/")[2]: one for one in client.get("/api/runs")}
        assert told["sums"]["state"] == "gone" and "moved or deleted" in told["sums"]["error"]
        assert told["other"]["state"] == "stopped" and client.get(f"/api/run/{keys['other']}/columns")["last"] == 1
        (tmp_path / "elsewhere").rename(run)
        assert client.get(f"/api/run/{keys['sums']}/samples")["all"] == 8


def test_runs_that_begin_below_a_folder_are_listed_and_those_deleted_are_not(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with serving(Followed.named([])) as client:
        assert [one["name"] for one in client.get("/api/runs")] == ["sums"]
        write_run(tmp_path / "runs" / "new", steps=1, name="new")
        (tmp_path / "runs" / "notes").mkdir()
        found = client.get("/api/runs")
        assert sorted(one["name"] for one in found) == ["new", "sums"]
        shutil.rmtree(tmp_path / "runs" / "new")
        assert [one["name"] for one in client.get("/api/runs")] == ["sums"]
        gone = next(one["id"] for one in found if one["name"] == "new")
        assert client.refused(f"/api/run/{gone}")[0] == 404


def test_which_runs_are_meant(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    assert Followed.named([]).list()[0]["name"] == "sums"
    older, newer = (write_run(tmp_path / "runs" / name, steps=1, name="adder") for name in ("adder", "adder-2"))
    for path, when in ((run, 1), (older, 2), (newer, 3)):
        os.utime(path / "metrics.jsonl", (when, when))
    assert [source.path for source in Followed.named(["adder"]).all().values()] == [newer]  # though it has not finished
    assert [one["path"].rpartition("/")[2] for one in Followed.named(["runs"]).list()] == ["adder-2", "adder", "sums"]
    both = Followed.named(["runs/sums", "runs", "runs/../runs/sums"]).list()
    assert len(both) == 3 == len({one["id"] for one in both})
    with pytest.raises(UserError, match=r"^other does not exist; give the folder of a run"):
        Followed.named(["other"])
    with pytest.raises(UserError, match=r"^runs/sums/recipe.yaml is a file; give"):
        Followed.named(["runs/sums/recipe.yaml"])


def test_nothing_is_written(client, key, run):
    def state():
        files = [run.parent, run, *run.rglob("*")]
        times = [(path, path.stat().st_mtime_ns) for path in files]
        return times, [hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()]

    (run / LOCK).write_text("{}")
    before = state()
    for path in ("", "/columns", "/samples?text=a", "/same_prompt?index=0"):
        client.get(f"/api/run/{key}{path}")
    client.get("/api/runs")
    assert state() == before


class Model:
    """A run that answers without a model."""

    def __init__(self, path):
        self.path, self.closed, self.asked = path, False, []

    def generate(self, prompt, compare, task):
        self.asked.append(prompt)
        if prompt == "break":
            raise RunError("the device's memory ran out with tiny")
        return {"policy": [f"{self.path.name}: {prompt}"], "reference": [task or "hf_" + "a" * 30]}

    def close(self):
        self.closed = True


@pytest.fixture
def models():
    return []


@pytest.fixture
def talking(tmp_path, run, models):
    """A client of two finished runs, a classifier, and what opens them."""

    def open_run(path):
        if path.name == "judge":
            raise UserError(f"the run in {path} trained a classifier, which names classes and no answers")
        models.append(Model(path))
        return models[-1]

    others = [write_run(tmp_path / "runs" / name, 4, left="adapter") for name in ("second", "judge")]
    with serving(Followed([run, *others], []), open_run) as client:
        client.keys = {one["path"].rpartition("/")[2]: one["id"] for one in client.get("/api/runs")}
        yield client


def asked(client, name, body):
    return client.ask(f"/api/run/{client.keys[name]}/chat", "POST", body)


def test_a_finished_run_answers_and_its_model_is_loaded_once(talking, models):
    for prompt in ("1 + 1?", "2 + 2?"):
        status, _, told = asked(talking, "sums", {"prompt": prompt})
        assert status == 200 and (told["policy"], told["reference"]) == (f"sums: {prompt}", "***")  # no secrets
    assert len(models) == 1 and models[0].asked == ["1 + 1?", "2 + 2?"] and told["seconds"] >= 0
    assert asked(talking, "second", {"prompt": "x", "task": "words"})[2]["reference"] == "words"
    assert len(models) == 2 and models[0].closed and not models[1].closed  # one model at a time
    talking.server.chat.close()
    assert models[1].closed


def test_a_model_that_failed_or_was_trained_on_is_loaded_anew(talking, models, run):
    status, _, told = asked(talking, "sums", {"prompt": "break"})
    assert (status, told) == (500, {"error": "the device's memory ran out with tiny"}) and models[0].closed
    assert asked(talking, "sums", {"prompt": "again"})[0] == 200 and len(models) == 2
    os.utime(run / "adapter", ns=(5, 5))
    assert asked(talking, "sums", {"prompt": "again"})[0] == 200 and len(models) == 3 and models[1].closed


def test_a_model_that_nobody_asks_is_freed(talking, models, monkeypatch):
    monkeypatch.setattr(chats, "IDLE", 0.01)
    asked(talking, "sums", {"prompt": "a"})
    talking.server.chat._idle.join(30)
    assert models[0].closed


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"prompt": " \n"}, 400, "prompt: give a text to answer"),
        ({"prompt": 5}, 400, "prompt: give a text"),
        ({}, 400, "prompt: give a text"),
        ({"prompt": "x" * 20_001}, 400, "prompt: it has 20,001 characters; at most 20,000 are taken"),
        ({"prompt": "a", "task": 1}, 400, "task: give the name"),
        ({"prompt": "a", "path": "/"}, 400, "the body has 'path'; it takes prompt and task"),
        (["a"], 400, "the body should be a JSON object"),
        ({"prompt": "x" * 300_000}, 413, "the body has 300,014 bytes"),
    ],
)
def test_what_cannot_be_answered_is_a_sentence(talking, models, body, status, says):
    told = asked(talking, "sums", body)
    assert told[0] == status and told[2]["error"].startswith(says) and not models


def test_only_a_finished_policy_answers(talking, tmp_path, run):
    assert "trained a classifier" in asked(talking, "judge", {"prompt": "a"})[2]["error"]
    shutil.rmtree(run / "adapter")
    assert asked(talking, "sums", {"prompt": "a"})[2]["error"].endswith(
        "is stopped; a run can be talked to once it is finished"
    )
    assert talking.refused(f"/api/run/{talking.keys['sums']}/columns", method="POST", body={})[0] == 404
    token = f"Host: localhost\r\nX-Token: {talking.server.token}\r\n"
    where = f"POST /api/run/{talking.keys['second']}/chat HTTP/1.1\r\n{token}"
    assert " 411 " in spoken(talking, f"{where}\r\n")
    assert " 413 " in spoken(talking, f"{where}Connection: close\r\nContent-Length: {'9' * 5000}\r\n\r\n{{")
    assert " 400 " in spoken(talking, f"{where}Connection: close\r\nContent-Length: 1\r\n\r\n{{")


def test_no_model_is_loaded_beside_a_run_that_trains_on_a_card(talking, models, run):
    training = run.parent / "second"
    for path in (run, training):
        (path / "plan.json").write_text(json.dumps({"device": {"torch_device": "cuda:0"}}))
    lock = Lock(training / LOCK, "the run")
    lock.acquire()
    told = asked(talking, "sums", {"prompt": "a"})
    assert told[0] == 400 and "runs/second is training" in told[2]["error"] and not models
    (run / "plan.json").write_text(json.dumps({"device": {"torch_device": "cpu"}}))
    assert asked(talking, "sums", {"prompt": "a"})[0] == 200
    lock.release()


def test_a_model_answers_beside_its_reference(tmp_path, monkeypatch):
    from tiny_runs import save_tiny_model, tiny_recipe

    import lowmem_rlhf as lm

    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(save_tiny_model(tmp_path / "model"), training={"max_steps": 1}, data={"eval_size": 0})
    run = lm.train(recipe, output=tmp_path / "runs" / "tiny", progress=None)
    with serving(Followed([run.path], []), lambda path: lm.open_run(path, progress=None)) as client:
        (one,) = client.get("/api/runs")
        status, _, told = client.ask(f"/api/run/{one['id']}/chat", "POST", {"prompt": "1+1"})
        expected = run.generate("1+1", compare=True)
        assert status == 200 and [told["policy"]] == expected["policy"] and [told["reference"]] == expected["reference"]
        long = client.ask(f"/api/run/{one['id']}/chat", "POST", {"prompt": "1" * 5000})
        assert long[0] == 400 and "positions" in long[2]["error"]
        client.server.chat.close()
    run.close()


def test_a_port_that_is_taken_is_a_sentence(tmp_path, monkeypatch, lowmem_rlhf):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = lowmem_rlhf("watch", "--port", port)
    assert done.code == 2 and done.out == "" and done.err.startswith(f"error: --port: {port} cannot be had (")
    assert lowmem_rlhf("watch", "nowhere").err.startswith("error: nowhere does not exist; give the folder of a run")
    assert lowmem_rlhf("watch", "").err.startswith("error: a run's name is empty; give the folder of a run or of runs")
    assert lowmem_rlhf("watch", "--port", "70000").code == 2


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(("number", "code", "more"), [(signal.SIGINT, 0, ["--open"]), (signal.SIGTERM, 143, [])])
def test_a_signal_ends_it_at_once(tmp_path, run, number, code, more):
    command = [sys.executable, "-m", "lowmem_rlhf", "watch", *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "BROWSER": "echo opened %s"}, **pipes)
    address, about = process.stdout.readline().strip(), process.stdout.readline()
    if more:
        assert process.stdout.readline() == f"opened {address}\n"
    assert about == "1 run; Ctrl-C ends the page\n" and address.startswith("http://127.0.0.1:")
    port, token = address.removeprefix("http://127.0.0.1:").split("/?token=")
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
    connection.request("GET", "/api/runs", headers={"X-Token": token})
    assert json.loads(connection.getresponse().read())[0]["name"] == "sums"  # and the connection stays open
    connection.request("GET", f"/?token={token}")
    answer = connection.getresponse()
    assert "connect-src 'self'" in answer.headers["Content-Security-Policy"] and token in answer.read().decode()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "") and err in ("", "stopped by SIGTERM\n")


BUSY = """
import sys, time
from types import SimpleNamespace
from lowmem_rlhf.page.server import watch
from lowmem_rlhf.stopping import stoppable
def generate(*given, **more):
    print("asked", flush=True)
    time.sleep(600)
with stoppable():
    watch([], None, False, lambda path: SimpleNamespace(generate=generate), lambda line: print(line, flush=True))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_an_answer_that_is_being_written_keeps_nobody_waiting(tmp_path, run):
    process = subprocess.Popen([sys.executable, "-c", BUSY], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    port, token = process.stdout.readline().strip().removeprefix("http://127.0.0.1:").split("/?token=")
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
    connection.request("GET", "/api/runs", headers={"X-Token": token})
    key = json.loads(connection.getresponse().read())[0]["id"]
    connection.request("POST", f"/api/run/{key}/chat", '{"prompt": "a"}', {"X-Token": token})
    assert [process.stdout.readline() for _ in range(2)][1] == "asked\n"
    other = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
    other.request("GET", f"/api/run/{key}", headers={"X-Token": token})  # others are answered meanwhile
    assert other.getresponse().status == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
