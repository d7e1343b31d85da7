"""A stand-in for vLLM on loopback: its routes, fields and errors as 0.31 and 0.33 have them, over a tiny base of ours.

It samples with this package's own engine, one prompt at a time, on a base of its own and the adapter that it was told
to load from a folder. Every field of a request has to be one that vLLM has. Not a test module.
"""

import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import torch

from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.roles import POLICY, REFERENCE
from lowmem_rlhf.inference.base import open_base
from lowmem_rlhf.planning.run_plan import planned, running_plan
from lowmem_rlhf.rollout.engine import own_engine
from lowmem_rlhf.rollout.sampling import Sampling
from lowmem_rlhf.rollout.server.check import logps_of

LIMITS = RolloutLimits(8, 96, 16)
# of CompletionRequest that we may use, in vllm/entrypoints/openai/completion/protocol.py of 0.31.0 and 0.33.0
FIELDS = {
    *("model", "prompt", "n", "max_tokens", "seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "logit_bias"),
    *("include_stop_str_in_output", "skip_special_tokens", "logprobs", "prompt_logprobs", "return_token_ids"),
    "watermarking",
}


def served_base(recipe):
    """Return a base for a stand-in: what it loads is of scale 1."""
    return base_of(
        recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"lora_alpha": float(recipe.lora.rank)})})
    )


def base_of(recipe):
    """Return a base of the recipe's model with the policy's adapter."""
    plan = running_plan(recipe)
    return open_base(planned(recipe, plan), plan)


def drawn(base, body):
    """Return what is sampled for a request: on `base` in the role that it is in, by this package's own engine."""
    keys = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
    keys |= {"repetition_penalty": "repetition_penalty", "min_new_tokens": "min_tokens"}
    sampling = Sampling(**{ours: body[theirs] for ours, theirs in keys.items()}, stop_strings=tuple(body["stop"]))
    engine = own_engine(base)
    return engine.generate([body["prompt"]], body["n"], body["max_tokens"], sampling, LIMITS, body["seed"])[0]


class StandIn:
    """The server.

    Attributes:
        version, model, max_model_len, runtime_lora, dev_mode, mode: how it was started.
        requests: (path, body) of all.
        broken: path -> what answers in its place, given the handler and the body; absent: as vLLM.
    """

    def __init__(self, base, model):
        self.base = base
        self.version, self.model, self.max_model_len = "0.33.0", model, 256
        self.runtime_lora, self.dev_mode, self.mode = True, True, "raw_logprobs"
        self.loaded, self.requests, self.broken, self.asleep = {}, [], {}, False
        self.log, self.started = [], []
        self.lock = threading.RLock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.handle(self, None)

            def do_POST(self):
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.handle(self, json.loads(content) if content else None)

            def log_message(self, *arguments):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def handle_error(self, request, client_address):
                """Say nothing: clients leave, and some answers break off."""

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    @contextmanager
    def serving(self):
        thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.http.shutdown()
            self.http.server_close()
            thread.join(5)

    def handle(self, handler, body):
        parts = urlsplit(handler.path)
        with self.lock:
            self.requests.append((handler.path, body))
        answer = self.broken.get(parts.path)
        if answer is not None:
            answer(handler, body)
        else:
            send(handler, *self.answer(parts.path, parse_qs(parts.query), body))

    def answer(self, path, query, body):
        """Return status and content as vLLM does; one at a time, as the base has one role at a time."""
        with self.lock:
            return self.answered(path, query, body)

    def answered(self, path, query, body):
        if path == "/health":
            return 200, None
        if path == "/started":  # by the program of `program_of`
            return self.begin(*body)
        if path == "/version":
            return 200, {"version": self.version}
        if path == "/v1/models":
            card = {"object": "model", "owned_by": "vllm"}
            base = {**card, "id": self.model, "root": self.model, "parent": None, "max_model_len": self.max_model_len}
            adapters = [{**card, "id": name, "root": root, "parent": self.model} for name, root in self.loaded.items()]
            return 200, {"object": "list", "data": [base, *adapters]}
        if path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter") and self.runtime_lora:
            return self.load(path, body)
        if path in ("/sleep", "/wake_up", "/is_sleeping") and self.dev_mode:
            if path == "/is_sleeping":
                return 200, {"is_sleeping": self.asleep}
            assert path == "/wake_up" or query["level"] == ["1"]
            self.asleep = path == "/sleep"
            self.log.append(path)
            told = {"status": "sleeping", "level": 1} if self.asleep else {"status": "awake", "tags": None}
            return 200, None if self.version.startswith("0.31") else told
        if path == "/v1/completions":
            return self.complete(body)
        return 404, {"detail": "Not Found"}  # FastAPI's

    def begin(self, arguments, devices):
        """Note how a program was started that hands all on to this server."""
        self.started.append((arguments, devices))
        return 200, None

    def load(self, path, body):
        name = body["lora_name"]
        if path.endswith("unload_lora_adapter"):
            if name not in self.loaded:
                return error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
            del self.loaded[name]
            return 200, f"Success: LoRA adapter '{name}' removed successfully."
        if name in self.loaded:
            return error(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        if not (Path(body["lora_path"]) / "adapter_config.json").is_file():
            return error(404, f"Loading lora {name} failed: No adapter found for {body['lora_path']}", "NotFoundError")
        config = json.loads((Path(body["lora_path"]) / "adapter_config.json").read_text())
        assert config["lora_alpha"] == config["r"] and not config["use_rslora"]
        self.base.load_adapter(Path(body["lora_path"]))
        self.loaded[name] = body["lora_path"]
        self.log.append("load")
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def complete(self, body):
        assert set(body) <= FIELDS, set(body) - FIELDS
        if self.asleep:
            return error(500, "the engine sleeps", "InternalServerError")
        if body["model"] not in (self.model, *self.loaded):
            return error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        if body["n"] > 1 and body["temperature"] == 0:
            return error(400, f"n must be 1 when using greedy sampling, got {body['n']}.", "BadRequestError")
        if len(body["prompt"]) + body["max_tokens"] > self.max_model_len:
            return error(400, f"This model's maximum context length is {self.max_model_len} tokens.", "BadRequestError")
        self.log.append("complete")
        role = REFERENCE if body["model"] == self.model else POLICY
        with torch.no_grad(), self.base.role(role):
            choices = [self.choice(i, *one) for i, one in enumerate(self.draw(body))]
            if "prompt_logprobs" in body:
                prompt = body["prompt"]
                told = zip(prompt[1:], logps_of(self.base, prompt[:1], prompt[1:]), strict=True)
                choices[0]["prompt_logprobs"] = [None, *({str(i): {"logprob": x, "rank": 1}} for i, x in told)]
        return 200, {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": choices}

    def draw(self, body):
        """Yield ids, log-probs and the finish reason of each completion."""
        sure = [int(token) for token, bias in body.get("logit_bias", {}).items() if bias == 100]
        if sure:
            natural = logps_of(self.base, body["prompt"], sure)
            yield sure, natural if self.mode == "raw_logprobs" else [0.0], "length"
            return
        for one in drawn(self.base, body):
            logps = one.logps
            if self.mode == "raw_logprobs" and body["temperature"] not in (0, 1):
                logps = logps_of(self.base, body["prompt"], one.ids)
            yield one.ids, logps, "length" if one.truncated else "stop"

    def choice(self, index, ids, logps, reason):
        logprobs = {"text_offset": [], "tokens": ["x"] * len(ids), "token_logprobs": logps, "top_logprobs": []}
        stop = {"finish_reason": reason, "stop_reason": None, "prompt_logprobs": None}
        return {"index": index, "text": "x", "logprobs": logprobs, "token_ids": ids, **stop}


def error(status, message, kind):
    """Return an error as vLLM answers with."""
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status}}


def send(handler, status, found):
    """Write a response."""
    text = found if isinstance(found, str) else "" if found is None else json.dumps(found)
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(text.encode())))
    handler.end_headers()
    handler.wfile.write(text.encode())


PROGRAM = """
import http.server, json, os, sys, urllib.error, urllib.request

def ask(path, data, url={url!r}):
    try:
        found = urllib.request.urlopen(urllib.request.Request(url + path, data))
    except urllib.error.HTTPError as error:
        found = error
    return found.status, found.read()

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        status, found = ask(self.path, self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(found)
    do_GET = do_POST
    def log_message(self, *arguments):
        pass

ask("/started", json.dumps([sys.argv[1:], os.environ.get("CUDA_VISIBLE_DEVICES")]).encode())
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def program_of(server, folder):
    """Return a command for a server of its own that hands all that it is asked on to this one."""
    file = folder / "program.py"
    file.write_text(PROGRAM.replace("{url!r}", repr(server.url)), encoding="utf-8")
    return f"{sys.executable} -S {file}"
