"""Rollouts by vLLM, against a stand-in on loopback: whole runs, and all that a server may do wrong."""

import json
import math
import socket
import sys
import threading
from dataclasses import replace

import pytest
import torch
from tiny_runs import learned, save_tiny_model, tiny_recipe
from vllm_standin import LIMITS, StandIn, base_of, drawn, error, program_of, send, served_base

from lowmem_rlhf import progress
from lowmem_rlhf.engine.roles import POLICY, REFERENCE
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.planning.memory.rollout import ROLLOUT_BYTES
from lowmem_rlhf.planning.run_plan import plan_recipe
from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.report import html
from lowmem_rlhf.rollout import engine as engines
from lowmem_rlhf.rollout.engine import engine_for
from lowmem_rlhf.rollout.sampling import Sampling
from lowmem_rlhf.rollout.server.engine import ServerEngine
from lowmem_rlhf.rollout.server.served import seeds_of
from lowmem_rlhf.session.train import train
from lowmem_rlhf.training.sampling_check import SamplingCheck

TRAINING = {"max_steps": 3, "save_steps": 1}
GRPO = {"beta": 0.0, "importance_sampling_correction": True, "importance_sampling_mode": "token_truncate"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One thread, and no report, which is not what they test."""
    monkeypatch.setattr(html, "write_report", lambda run: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("served") / "model"))


def recipe_of(model, url, server=None, max_steps=3, **generation):
    generation = {"engine": "vllm", "server": {"url": url, "timeout": 20, **(server or {})}, **generation}
    return tiny_recipe(model, generation=generation, grpo=GRPO, training={**TRAINING, "max_steps": max_steps})


@pytest.fixture(scope="module")
def theirs(model):
    return served_base(tiny_recipe(model))


@pytest.fixture
def server(model, theirs):
    with StandIn(theirs, model).serving() as one:
        yield one


@pytest.fixture(scope="module")
def base(model):
    return base_of(tiny_recipe(model))


class ByPrompt:
    """This package's own engine, which draws each prompt with the seed that a server is given."""

    def __init__(self, base, dequantize):
        self.base = base

    def sync(self):
        pass

    def generate(self, prompts, num_generations, most, sampling, limits, seed, progress=None):
        own = {key: getattr(sampling, key) for key in ("temperature", "top_p", "top_k", "min_p")}
        own |= {"repetition_penalty": sampling.repetition_penalty, "min_tokens": sampling.min_new_tokens}
        own |= {"stop": sampling.stop_strings, "n": num_generations, "max_tokens": most}
        rows = range(0, len(prompts) * num_generations, num_generations)
        seeds = [seeds_of(seed, [row])[0] for row in rows]
        return [
            drawn(self.base, {**own, "prompt": list(prompt), "seed": seed})
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]


@pytest.fixture(scope="module")
def ours(model, tmp_path_factory):
    """What a run with our own engine learns."""
    engines.register_engine("by_prompt", ByPrompt)
    try:
        recipe = tiny_recipe(model, generation={"engine": "by_prompt"}, grpo=GRPO, training=TRAINING)
        return learned(train(recipe, tmp_path_factory.mktemp("own") / "run"))
    finally:
        del engines.ENGINES["by_prompt"], ROLLOUT_BYTES["by_prompt"]


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0"])
def test_a_served_run_is_the_run_of_our_own_engine(model, tmp_path, server, ours, version):
    server.version = version
    theirs = learned(train(recipe_of(model, server.url, {"sleep": True}), tmp_path / "served"))
    for key in ("metrics", "samples", "evaluation"):
        assert theirs[key] == ours[key]
    assert all(torch.equal(weight, ours["adapter"][name]) for name, weight in theirs["adapter"].items())
    assert all(row["sampling/logp_difference"] < 1e-5 for row in theirs["metrics"])
    # awake only while it samples, with a new adapter each time, of which only the last is left
    turn = ["/wake_up", "load"]
    rollouts = "".join(one[0] if one != "/wake_up" else "|" for one in server.log).split("|")
    assert [one.replace("c", "") for one in rollouts] == ["l/", *["l/"] * 5] and server.log[-1] == "/sleep"
    assert server.log[server.log.index("/wake_up") :][:2] == turn
    names = [body["lora_name"] for path, body in server.requests if path == "/v1/load_lora_adapter"]
    assert len(set(names)) == len(names) == 6 and list(server.loaded) == names[-1:]


def test_a_run_goes_on_after_its_server_died(model, tmp_path, server, ours):
    recipe = recipe_of(model, server.url)

    def dies(handler, body):
        handler.connection.shutdown(socket.SHUT_RDWR)

    loads = []

    def load(handler, body):  # of the check, the evaluation, the first step, and the second, in which it dies
        loads.append(body)
        if len(loads) == 4:
            server.broken["/v1/completions"] = dies
        with server.lock:
            send(handler, *server.answer("/v1/load_lora_adapter", {}, body))

    server.broken["/v1/load_lora_adapter"] = load
    with pytest.raises(RunError, match=r"broke the connection off.*go on with --resume from the last checkpoint"):
        train(recipe, tmp_path / "died")
    server.broken.clear()
    assert learned(train(recipe, tmp_path / "died", resume=True))["metrics"] == ours["metrics"]


def test_log_probs_that_differ_are_weighed(model, tmp_path, server):
    server.broken["/v1/completions"] = with_body(
        logprobs=lambda choice: {"token_logprobs": [x - 0.1 for x in choice["logprobs"]["token_logprobs"]]}
    )(server)
    [row] = train(recipe_of(model, server.url, max_steps=1), tmp_path / "run").metrics()
    assert row["sampling/logp_difference"] == pytest.approx(0.1, rel=1e-3)
    assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(math.exp(0.1), rel=1e-3)


def completion(base, recipe, sampling=None, count=3, most=6, **more):
    """Return completions of one prompt by the server of a recipe."""
    engine = ServerEngine(base, recipe)
    with base.role(POLICY):
        engine.sync()
        return engine.generate([[5, 6, 7]], count, most, sampling or Sampling(), LIMITS, 7, **more)[0]


def test_completions_end_with_stop_strings_and_greedy_ones_are_alike(base, model, server):
    greedy = completion(base, recipe_of(model, server.url), Sampling(0.0))
    assert greedy[0] == greedy[1] == greedy[2]
    whole = completion(base, recipe_of(model, server.url))[0]
    string = base.tokenizer.decode(whole.ids[1:2])
    server.broken["/v1/completions"] = lambda handler, body: send(
        handler, *server.answer("/v1/completions", {}, {**body, "stop": []})
    )
    cut = completion(base, recipe_of(model, server.url), Sampling(stop_strings=(string,)))[0]
    assert cut.ids == whole.ids[: len(cut.ids)] and len(cut.ids) <= 2 and not cut.truncated
    assert cut.logps == whole.logps[: len(cut.ids)]


def test_a_run_that_is_over_needs_no_server(base):
    assert type(engine_for(base, "vllm")) is type(engine_for(base, "auto"))


def with_body(**changes):
    """Answer with one good choice in which something is otherwise."""

    def answer(server):
        def broken(handler, body):
            status, found = server.answer("/v1/completions", {}, body)
            for choice in found["choices"]:
                choice.update({key: value(choice) for key, value in changes.items()})
            send(handler, status, found)

        return broken

    return answer


def plain(status, found):
    return lambda server: lambda handler, body: send(handler, status, found)


def slow(server):
    over = threading.Event()
    return lambda handler, body: over.wait(5)


def short(server):
    def cut(handler, body):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"choices": [')
        handler.close_connection = True

    return cut


FAULTS = {
    "is not there any more": (plain(*error(500, "EngineCore died", "InternalServerError")), r"500 \(EngineCore died\)"),
    "cuts its JSON": (plain(200, '{"choices": [{"index"'), "no JSON object"),
    "cuts its reply": (short, "broke the connection off: IncompleteRead"),
    "is slow": (slow, "did not answer within 0.5 seconds"),
    "gives too few": (plain(200, {"choices": []}), "with 0 completions, and 3 were asked for"),
    "gives none": (plain(200, {"text": "?"}), "with no completions"),
    "gives no ids": (with_body(token_ids=lambda choice: None), "without the token ids"),
    "gives texts as ids": (with_body(token_ids=lambda choice: ["5"]), "without the token ids"),
    "gives no log-probs": (with_body(logprobs=lambda choice: None), "without a log-prob for each token"),
    "gives too few log-probs": (
        with_body(logprobs=lambda choice: {"token_logprobs": choice["logprobs"]["token_logprobs"][1:]}),
        "without a log-prob for each token",
    ),
    "gives minus infinity": (
        with_body(logprobs=lambda choice: {"token_logprobs": [-9999.0] * len(choice["token_ids"])}),
        "log-probs that are not finite",
    ),
    "gives foreign ids": (with_body(token_ids=lambda choice: [10**6] * len(choice["token_ids"])), "another base"),
    "aborts": (with_body(finish_reason=lambda choice: "abort"), "for another reason: 'abort'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_server_does_wrong_ends_the_run_with_a_sentence(base, model, server, fault):
    make, said = FAULTS[fault]
    engine = ServerEngine(base, recipe_of(model, server.url))
    server.broken["/v1/completions"] = make(server)
    with base.role(POLICY):
        engine.sync()
        if make is slow:
            engine.server._client = replace(engine.server._client, timeout=0.5)
        with pytest.raises(RunError, match=f"{said}.*--resume"):
            engine.generate([[5, 6, 7], [5, 8]], 3, 6, Sampling(), LIMITS, 7)


def test_nobody_answers(base, model):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match=r"cannot be reached.*start the server, or mend generation\.server\.url"):
        ServerEngine(base, recipe_of(model, url))


REFUSED = {
    "version='0.30.2'": ({}, r"is vLLM 0\.30\.2; this package knows it from 0\.31 on"),
    "version='dev'": ({}, "is no vLLM"),
    "version=None": ({}, "is no vLLM"),
    "model='another/model'": ({}, "has another base: it serves 'another/model'"),
    "max_model_len=20": ({}, r"takes texts of 20 tokens \(max_model_len\).*--max-model-len 28"),
    "runtime_lora=False": ({}, "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
    "dev_mode=False": ({"server": {"sleep": True}}, "cannot be sent to sleep; start it with VLLM_SERVER_DEV_MODE=1"),
    "mode='processed_logprobs'": ({"top_k": 3}, "tells processed_logprobs.*--logprobs-mode raw_logprobs"),
    "mode='raw_logprobs'": ({"temperature": 0.7}, "tells raw_logprobs.*--logprobs-mode processed_logprobs"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_server_that_was_started_otherwise_is_refused(base, model, server, how):
    more, said = REFUSED[how]
    name, _, value = how.partition("=")
    setattr(server, name, eval(value))
    with pytest.raises(UserError, match=said):
        ServerEngine(base, recipe_of(model, server.url, **more))


def test_either_mode_serves_where_nothing_shapes(base, model, server):
    server.mode = "processed_logprobs"
    assert len(completion(base, recipe_of(model, server.url))) == 3
    warm = completion(base, recipe_of(model, server.url, temperature=0.7), Sampling(0.7))
    assert all(one.logps for one in warm)


def test_another_base_under_the_same_name_is_refused(base, model, server, tmp_path):
    server.base = served_base(tiny_recipe(save_tiny_model(tmp_path / "other", seed=1, initializer_range=0.5)))
    with pytest.raises(UserError, match=r"has another base: on a short text its log-probs are .* nats a token from"):
        ServerEngine(base, recipe_of(model, server.url))


def test_a_server_without_log_probs_is_refused(base, model, server):
    server.broken["/v1/completions"] = with_body(logprobs=lambda choice: None)(server)
    with pytest.raises(UserError, match="serves no log-probs"):
        ServerEngine(base, recipe_of(model, server.url))


def test_a_server_that_cannot_see_the_folder_says_so(base, model, server):
    server.broken["/v1/load_lora_adapter"] = plain(*error(404, "No adapter found for /x", "NotFoundError"))(server)
    with pytest.raises(UserError, match=r"No adapter found for /x.*has to see the folder .*generation\.server\.adapt"):
        ServerEngine(base, recipe_of(model, server.url))


def test_a_newer_server_is_said_to_be_new(base, model, server):
    told = Told()
    server.version = "0.40.0"
    with progress.shown_by(told):
        ServerEngine(base, recipe_of(model, server.url))
    [text] = told.texts
    assert "newer than what this package was written for (0.31 to 0.33)" in text


class Told(progress.Silence):
    """Keeps the lines that stay."""

    def __init__(self):
        self.texts = []

    def message(self, text):
        self.texts.append(text)


def test_a_server_is_started_beside_and_ends_with_the_engine(base, model, server, tmp_path):
    program = program_of(server, tmp_path)
    own = {"url": None, "command": program, "options": "--dtype float32", "devices": "1"}
    engine = ServerEngine(base, recipe_of(model, server.url, {**own, "gpu_memory_utilization": 0.5}))
    [(arguments, devices)] = server.started
    assert arguments[:2] == ["serve", model] and devices == "1"
    text = " ".join(arguments)
    assert "--enable-lora --max-lora-rank 8 --max-loras 1 --max-model-len 28 --logprobs-mode raw_logprobs" in text
    assert text.endswith("--gpu-memory-utilization 0.5 --dtype float32")
    process = engine.server._started.process
    assert process.poll() is None
    with base.role(POLICY):
        engine.sync()
        assert len(engine.generate([[5, 6]], 2, 4, Sampling(), LIMITS, 1)[0]) == 2
        process.kill()
        process.wait()
        with pytest.raises(RunError, match=r"ended with code -9.*--resume"):
            engine.sync()
    del engine


def test_a_program_that_ends_at_once_says_its_last_words(base, model, server):
    command = f"{sys.executable} -c \"print('no such device'); raise SystemExit(3)\""
    recipe = recipe_of(model, server.url, {"url": None, "command": command})
    with pytest.raises(UserError, match="ended with code 3; it said last: no such device"):
        ServerEngine(base, recipe)
    with pytest.raises(UserError, match="there is no program vllm-that-is-not-there"):
        ServerEngine(base, recipe_of(model, server.url, {"url": None, "command": "vllm-that-is-not-there"}))


def test_a_program_that_never_answers_is_ended(base, model, server):
    command = f"{sys.executable} -c 'import time; time.sleep(60)'"
    recipe = recipe_of(model, server.url, {"url": None, "command": command, "start_timeout": 0.3})
    with pytest.raises(UserError, match=r"did not answer within 0\.3 seconds \(generation\.server\.start_timeout\)"):
        ServerEngine(base, recipe)


def test_where_the_server_is_and_what_it_is_told(base, model, server, tmp_path, monkeypatch):
    """Its key goes along, adapters lie where the recipe says, and its own name of the base is asked for."""
    monkeypatch.setenv("THE_KEY", "secret")
    server.model, keys = "served-name", []
    server.broken["/v1/load_lora_adapter"] = lambda handler, body: (
        keys.append(handler.headers["Authorization"]),
        send(handler, *server.answer("/v1/load_lora_adapter", {}, body)),
    )
    folder = tmp_path / "adapters"
    own = {"url": f"{server.url}/v1", "api_key_env": "THE_KEY", "adapters": str(folder), "model": "served-name"}
    engine = ServerEngine(base, recipe_of(model, server.url, own))
    assert keys == ["Bearer secret"]
    [name] = server.loaded
    assert (folder / engine._folder.name / name / "adapter_model.safetensors").is_file()
    with base.role(REFERENCE):  # the base alone: no adapter is loaded then
        engine.sync()
        engine.generate([[5, 6]], 1, 2, Sampling(), LIMITS, 1)
    assert server.requests[-1][1]["model"] == "served-name" and not server.loaded
    engine._gone()
    assert not any(folder.iterdir())


def test_prompts_go_nowhere_else_than_is_allowed(base, model):
    with pytest.raises(UserError, match=r"generation\.server\.url: 8\.8\.8\.8 is neither .* set allow_remote: true"):
        ServerEngine(base, recipe_of(model, "http://8.8.8.8:8000"))
    assert recipe_of(model, "http://8.8.8.8:8000", {"allow_remote": True}).generation.server.address.remote


@pytest.mark.parametrize(
    ("generation", "said"),
    [
        (
            {"engine": "auto", "server": {"sleep": True}},
            r"generation\.server: is read where engine is vllm or llama_cpp",
        ),
        ({"engine": "llama_cpp", "server": {"url": "http://[::1]:1"}}, r"server\.url: llama\.cpp's server takes an ad"),
        ({"engine": "vllm", "temperature": 0.5, "top_p": 0.9}, r"temperature: got 0\.5 beside top_p: vLLM tells"),
        ({"engine": "llama_cpp", "min_new_tokens": 2}, r"min_new_tokens: llama\.cpp's server knows no least length"),
        (
            {"engine": "vllm", "server": {"url": "http://[::1]:1", "command": "vllm"}},
            r"server\.command: is of a server",
        ),
        ({"engine": "vllm", "server": {"api_key_env": "KEY"}}, r"server\.api_key_env: is of a server that runs"),
        ({"engine": "vllm", "server": {"url": "[::1]"}}, r"server\.url: got '\[::1\]'; give the address"),
    ],
)
def test_what_no_server_can_do_is_refused_with_the_recipe(model, generation, said):
    with pytest.raises(UserError, match=said):
        tiny_recipe(model, generation=generation)


def test_a_server_may_differ_by_more_than_our_own_engine():
    said = []
    look = SamplingCheck("none", "float32", 1.0, server=True)
    look.check(0.1, 1, said.append)
    assert not said
    look.check(0.4, 2, said.append)
    assert "weights in the server that are those of the plan" in said[0]
    with pytest.raises(RunError, match="the policy that samples is not the one that trains"):
        look.check(2.0, 3, said.append)


@pytest.mark.parametrize(
    ("engine", "server", "rollout", "update"),
    [
        ("vllm", {"gpu_memory_utilization": 0.25, "sleep": True}, 0.25 * 24, 2.0),
        ("vllm", {"gpu_memory_utilization": 0.25}, 0.25 * 24, 0.25 * 24),
        ("vllm", {"devices": "1"}, 0.0, 0.0),
        ("vllm", {"url": "http://127.0.0.1:1"}, 0.0, 0.0),
        ("llama_cpp", {"sleep": True}, 2.0, 0.0),
    ],
)
def test_the_plan_counts_a_server_on_the_same_card(engine, server, rollout, update):
    given = [
        f"generation.engine={engine}",
        f"generation.server={json.dumps(server)}",
        "model=Qwen/Qwen2.5-0.5B-Instruct",
    ]
    plan = plan_recipe(load_recipe("grpo_gsm8k", [*given, "hardware.profile=rtx-4090"], quiet=True))
    phases = plan.memory["phases"]
    taken = [phases[name].get("server", 0) / 2**30 for name in ("rollout", "update")]
    assert "kv_cache" not in phases["rollout"] and plan.time is None
    if engine == "vllm":
        assert taken == pytest.approx([rollout, update])
        assert ("not on this card" in plan.reasons["rollout_batch_size"]) == (not rollout)
    else:  # 1 GiB of weights, and 16 completions of 832 tokens
        assert 1.0 < taken[0] < rollout and taken[1] == update
