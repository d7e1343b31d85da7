"""Rollouts by llama.cpp's server: against a stand-in, and against the real one where there is one."""

import os
import shlex
import sys
from pathlib import Path

import pytest
import torch
from llama_standin import LlamaStandIn
from tiny_runs import learned, save_tiny_model, tiny_recipe
from vllm_standin import LIMITS, base_of, drawn, program_of, served_base

from lowmem_rlhf.engine.roles import POLICY, REFERENCE
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.planning.memory.rollout import ROLLOUT_BYTES
from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.report import html
from lowmem_rlhf.rollout import engine as engines
from lowmem_rlhf.rollout.sampling import Sampling
from lowmem_rlhf.rollout.server import llama_cpp
from lowmem_rlhf.rollout.server.check import check_text, logps_of
from lowmem_rlhf.rollout.server.engine import ServerEngine
from lowmem_rlhf.rollout.server.llama_cpp import whole_places
from lowmem_rlhf.rollout.server.served import seeds_of
from lowmem_rlhf.session.train import train

TRAINING = {"max_steps": 2, "save_steps": 1}
GRPO = {"beta": 0.0, "importance_sampling_correction": True}


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


@pytest.fixture(scope="module")
def base(model):
    return base_of(tiny_recipe(model))


@pytest.fixture(scope="module")
def theirs(model):
    return served_base(tiny_recipe(model))


@pytest.fixture
def server(model, theirs, tmp_path):
    with LlamaStandIn(theirs, model).serving() as one:
        yield one


def recipe_of(model, server, folder, own=None, **generation):
    file = folder / "base.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    own = {"command": program_of(server, folder), "model": str(file), "timeout": 20, **(own or {})}
    generation = {"engine": "llama_cpp", "server": own, **generation}
    return tiny_recipe(model, generation=generation, grpo=GRPO, training=TRAINING)


class OneByOne:
    """This package's own engine, which draws each completion with the seed that a server is given."""

    def __init__(self, base, dequantize):
        self.base = base

    def sync(self):
        pass

    def generate(self, prompts, num_generations, most, sampling, limits, seed, progress=None):
        own = {"temperature": sampling.temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        own |= {"min_tokens": 0, "stop": (), "n": 1, "max_tokens": most}
        seeds = seeds_of(seed, range(len(prompts) * num_generations))
        return [
            [
                drawn(self.base, {**own, "prompt": list(prompt), "seed": seeds[b * num_generations + g]})[0]
                for g in range(num_generations)
            ]
            for b, prompt in enumerate(prompts)
        ]


def test_a_served_run_is_the_run_of_our_own_engine(model, tmp_path, server):
    theirs = learned(train(recipe_of(model, server, tmp_path, {"sleep": True, "parallel": 4}), tmp_path / "served"))
    engines.register_engine("one_by_one", OneByOne)
    try:
        own = tiny_recipe(model, generation={"engine": "one_by_one"}, grpo=GRPO, training=TRAINING)
        ours = learned(train(own, tmp_path / "own"))
    finally:
        del engines.ENGINES["one_by_one"], ROLLOUT_BYTES["one_by_one"]
    for key in ("metrics", "samples", "evaluation"):
        assert theirs[key] == ours[key]
    assert all(torch.equal(weight, ours["adapter"][name]) for name, weight in theirs["adapter"].items())
    assert len(server.started) == 5  # the check, two steps, and the evaluations before and after
    text = " ".join(server.started[0][0])
    assert "--parallel 4 --ctx-size 116" in text and "--lora" in text


def test_log_probs_that_the_server_leaves_out_are_asked_for(base, model, server, tmp_path, monkeypatch):
    """Of tokens within a character: here of some that are said to be."""
    engine = ServerEngine(base, recipe_of(model, server, tmp_path, temperature=0.7))
    with base.role(POLICY):
        engine.sync()
        whole = engine.generate([[5, 6, 7]], 2, 6, Sampling(0.7), LIMITS, 7)
        server.silent = set(whole[0][0].ids[:1])
        monkeypatch.setattr(
            llama_cpp, "whole_places", lambda ids, *_: [i for i, one in enumerate(ids) if one not in server.silent]
        )
        again = engine.generate([[5, 6, 7]], 2, 6, Sampling(0.7), LIMITS, 7)
        monkeypatch.setattr(llama_cpp, "whole_places", lambda ids, *_: [])  # then of all that are not expected
        third = engine.generate([[5, 6, 7]], 2, 6, Sampling(0.7), LIMITS, 7)
    for got in (again, third):
        assert [one.ids for one in got[0]] == [one.ids for one in whole[0]]
        for one, two in zip(got[0], whole[0], strict=True):
            assert one.logps == pytest.approx(two.logps, abs=1e-5)


def test_where_characters_end():
    text = "aé😀".encode()
    tokens = {i: text[i : i + 1] for i in range(len(text))} | {99: b"<s>"}
    assert whole_places([0, 1, 2, 3, 4, 5, 6], tokens, {99}) == [0, 2, 6]
    assert whole_places([1, 99, 2], tokens, {99}) == [2]  # a special token is no text


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"command": "llama-server-that-is-not-there"}, "there is no program llama-server-that-is-not-there"),
        ({"model": "somewhere"}, r"generation\.server\.model: llama\.cpp reads a GGUF, and somewhere is none"),
    ],
)
def test_what_cannot_be_started_is_refused(base, model, server, tmp_path, own, said):
    with pytest.raises(UserError, match=said):
        ServerEngine(base, recipe_of(model, server, tmp_path, own))


def test_a_server_without_room_is_refused(base, model, server, tmp_path):
    server.room = 20
    with pytest.raises(UserError, match="takes texts of 20 tokens, and prompt and completion have up to 28 together"):
        ServerEngine(base, recipe_of(model, server, tmp_path))


def test_a_server_that_loads_no_adapter_is_refused(base, model, server, tmp_path):
    server.read_adapter = lambda: setattr(server, "adapter", None)
    with pytest.raises(UserError, match=r"did not load the adapter: it tells of \[\]"):
        ServerEngine(base, recipe_of(model, server, tmp_path))


def real_server() -> str:
    """Return the command of a real server of llama.cpp; skip where there is none."""
    if program := os.environ.get("LLAMA_SERVER"):
        return program
    folder = os.environ.get("XLLAMACPP", "")
    if not (Path(folder) / "xllamacpp").is_dir():
        pytest.skip(
            "no llama.cpp server: set $LLAMA_SERVER to a llama-server, or $XLLAMACPP to a folder with the wheel "
            "(pip install --no-deps --target FOLDER xllamacpp)"
        )
    return shlex.join([sys.executable, str(Path(__file__).with_name("llama_server.py")), folder])


@pytest.mark.slow
def test_the_real_server_samples_the_policy_of_a_real_model(smollm2):
    """Its kernels round activations to 8 bits, so log-probs are near ours, and far from those without the adapter."""
    own = f"{{command: {real_server()!r}, options: --threads 1, parallel: 2}}"
    given = [
        "generation.engine=llama_cpp",
        f"generation.server={own}",
        "hardware.quantization=none",
        f"model={smollm2}",
    ]
    recipe = load_recipe("quickstart", [*given, "lora.r=4"])
    base = base_of(recipe)
    engine = ServerEngine(base, recipe)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in base.adapter_layers():
            layer.masters(POLICY)[1].normal_(std=0.3, generator=generator)
    base.adapters_changed()
    prompt = check_text(base, 100)
    with base.role(POLICY):
        engine.sync()
        found = engine.generate([prompt], 2, 24, Sampling(), LIMITS, 3)[0]
    apart = {}
    for role in (POLICY, REFERENCE):
        with base.role(role):
            apart[role] = sum(
                abs(a - b) for one in found for a, b in zip(one.logps, logps_of(base, prompt, one.ids), strict=True)
            ) / sum(len(one.ids) for one in found)
    assert apart[POLICY] < 0.3 and apart[REFERENCE] > 3 * apart[POLICY]


@pytest.mark.slow
def test_the_real_server_serves_a_whole_run(smollm2, tmp_path):
    own = f"{{command: {real_server()!r}, options: --threads 1, parallel: 4}}"
    given = [
        "generation.engine=llama_cpp",
        f"generation.server={own}",
        "hardware.quantization=none",
        f"model={smollm2}",
    ]
    given += ["data.eval_size=4", "training.max_steps=2", "training.prompts_per_step=2"]
    run = train(load_recipe("quickstart", [*given, "grpo.importance_sampling_correction=true"]), tmp_path / "run")
    rows = run.metrics()
    assert len(rows) == 2 and all(row["sampling/logp_difference"] < 0.3 for row in rows)
    assert run.evaluation()["after"]
