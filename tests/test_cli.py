"""The command line: what it prints, what it writes, how it exits, and that the quick commands stay quick."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowmem_rlhf import __version__, cli
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.hardware.profiles import load_profiles
from lowmem_rlhf.recipe.loading import shipped_recipes, validate_recipe
from lowmem_rlhf.recipe.schema import Recipe

CONFIG = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


@pytest.fixture
def run(monkeypatch, lowmem_rlhf, tmp_path) -> Callable[..., Any]:
    """Return a function that runs a command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lowmem_rlhf


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return f"model={folder}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["profiles"],
        ["recipes"],
        ["rewards"],
        ["rewards", "try", "regex", "--option", "pattern=a+", "--text", "aa"],
        ["detect", "--device", "cpu"],
        ["plan", "quickstart", "MODEL"],
        ["plan", "quickstart", "MODEL", "--profile", "rtx-2080-ti", "--json"],
        ["train", "quickstart", "MODEL", "--dry-run"],
    ],
    ids=" ".join,
)
def test_a_quick_command_does_not_import_torch(arguments, model, tmp_path):
    arguments = [model if argument == "MODEL" else argument for argument in arguments]
    code = (
        "import sys\n"
        f"sys.argv = ['lowmem-rlhf', *{arguments!r}]\n"
        "from lowmem_rlhf.cli import main\n"
        "try:\n    main()\nexcept SystemExit as exit:\n    assert not exit.code, exit.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'bitsandbytes', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = str(Path(cli.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not list(tmp_path.iterdir()), "an informational command wrote something"


def test_the_module_is_the_installed_command():
    (entry,) = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "lowmem-rlhf"] or [
        None
    ]
    installed = shutil.which("lowmem-rlhf", path=str(Path(sys.executable).parent))
    if entry is None or installed is None:
        pytest.skip("the package is not installed in this environment")
    assert entry.value == "lowmem_rlhf.cli:main"
    outputs = [
        subprocess.run([*command, "profiles", "--json"], capture_output=True, text=True, check=True).stdout
        for command in ([sys.executable, "-m", "lowmem_rlhf"], [installed])
    ]
    assert outputs[0] == outputs[1] and json.loads(outputs[0])


def test_the_module_passes_the_exit_code_on(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "lowmem_rlhf", "plan", "quickstrt"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert (
        done.stderr.startswith("error: recipe 'quickstrt' is neither") and "did you mean 'quickstart'?" in done.stderr
    )


def test_help_names_every_command(run):
    done = run("--help")
    assert done.code == 0
    for command in ("detect", "profiles", "recipes", "plan", "train", "report", "watch"):
        assert f" {command} " in done.out
        assert run(command, "--help").code == 0
    assert run("--version").out == f"lowmem-rlhf {__version__}\n"


def test_profiles_prints_the_known_cards(run):
    listed, plain = run("profiles", "--json"), run("profiles")
    assert set(json.loads(listed.out)) == set(load_profiles())
    assert json.loads(listed.out)["rtx-2080-ti"]["compute_capability"] == "7.5"
    assert len(plain.out.splitlines()) == len(load_profiles())


def test_recipes_prints_the_shipped_ones(run):
    listed, plain = run("recipes", "--json"), run("recipes")
    found = json.loads(listed.out)
    assert set(found) == set(shipped_recipes())
    assert isinstance(validate_recipe(found["quickstart"]), Recipe)
    assert all(name in plain.out for name in found)


def test_detect_prints_the_device(run):
    found = json.loads(run("detect", "--device", "cpu", "--json").out)
    assert set(found) == {*Device.__dataclass_fields__, "profile"}
    assert found["torch_device"] == found["profile"] == "cpu" and found["total_bytes"] >= found["free_bytes"] > 0
    assert "profile: cpu" in run("detect", "--device", "cpu").out


@pytest.mark.parametrize(
    ("arguments", "profile", "gib"),
    [
        (["--profile", "rtx-2080-ti"], "rtx-2080-ti", 11),
        (["--profile", "rtx-2080-ti", "--vram", "9GB"], "rtx-2080-ti", 9),
    ],
)
def test_plan_for_a_card_keeps_the_contract(run, model, arguments, profile, gib):
    plan = json.loads(run("plan", "quickstart", model, *arguments, "--json").out)
    keys = {"fits", "verdict", "peak_bytes_range", "device", "profile", "settings", "reasons", "memory", "time"}
    assert set(plan) == keys
    assert {
        "quantization",
        "compute_dtype",
        "gradient_checkpointing",
        "micro_batch_tokens",
        "rollout_batch_size",
        "lora",
    } <= set(plan["settings"])
    assert set(plan["reasons"]) == set(plan["settings"]) and all(plan["reasons"].values())
    assert set(plan["memory"]) == {"budget_bytes", "peak_bytes", "low_bytes", "high_bytes", "phases", "host"}
    assert set(plan["memory"]["phases"]) == {"rollout", "scoring", "update", "optimizer", "export"}
    assert plan["profile"] == profile
    assert plan["device"]["total_bytes"] == pytest.approx(gib * 2**30, rel=0.01)
    assert plan["settings"]["compute_dtype"] == "float16" and plan["fits"] is True


def test_vram_limits_the_plan_for_this_machine(run, model):
    plan = json.loads(run("plan", "quickstart", model, "hardware.device=cpu", "--vram", "2GB", "--json").out)
    assert plan["device"]["total_bytes"] == 2 * 2**30
    assert plan["memory"]["budget_bytes"] < 2 * 2**30


def test_a_plan_that_does_not_fit_is_printed_and_says_what_to_change(run, model):
    done = run("plan", "quickstart", model, "--profile", "rtx-2080-ti", "--vram", "100MB")
    assert done.code == 0
    assert "does not fit" in done.out and "short" in done.out and "a card with more free memory" in done.out


def test_dry_run_prints_recipe_and_plan_and_writes_nothing(run, model, tmp_path):
    done = run("train", "quickstart", model, "training.max_steps=7", "--dry-run")
    assert done.code == 0, done.err
    text, _, plan = done.out.partition("\n\n")
    resolved = validate_recipe(yaml.safe_load(text))
    assert resolved.training.max_steps == 7 and resolved.name == "quickstart"
    assert "micro_batch_tokens" in plan and "fits" in plan
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["plan", "quickstrt"], ["recipe 'quickstrt' is neither a file nor", "did you mean 'quickstart'?"]),
        (
            ["plan", "quickstart", "--profile", "rtx-2080x"],
            ["profile 'rtx-2080x' is not known", "did you mean 'rtx-2080"],
        ),
        (["plan", "quickstart", "--vram", "lots"], ["'lots' is not an amount of memory", "11GB"]),
        (["plan", "quickstart", "--processes", "0"], ["processes: got 0; give 1 or more, one for each card"]),
        (["plan", "quickstart", "--processes", "999"], ["processes: got 999, but a step has only"]),
        (["plan", "quickstart", "--machines", "2"], ["machines: got 2, which is for several processes"]),
        (["plan", "quickstart", "--processes", "4", "--machines", "3"], ["machines: got 3", "divided evenly"]),
        (
            ["plan", "quickstart", "--network", "-1", "--processes", "4", "--machines", "2"],
            ["network: got -1; give 10^9 bits a second"],
        ),
        (
            ["plan", "quickstart", "--profile", "rtx-3090,rtx-3091", "--processes", "2"],
            ["profile 'rtx-3091' is not known", "did you mean 'rtx-3090'?"],
        ),
        (
            ["plan", "quickstart", "--profile", "rtx-3090,t4", "--processes", "3"],
            ["profile: got 2 cards for 3 processes"],
        ),
        (
            ["plan", "quickstart", "--profile", "rtx-3090,t4"],
            ["profile: got 2 cards, but one process is planned; ask for 2 processes"],
        ),
        (["plan", "quickstart", "--all-profiles", "--processes", "2"], ["--all-profiles", "leave out --processes"]),
        (["plan", "quickstart", "hardware.shard_base=true"], ["in one process there is nobody to share the base"]),
        (["plan", "quickstart", "hardware.vram=lots"], ["'lots' is not an amount of memory", "11GB"]),
        (["plan", "quickstart", "hardware.device=gpu!"], ["device 'gpu!' is not a device", "cuda:N"]),
        (
            ["plan", "quickstart", "hardware.device=cuad"],
            ["device 'cuad' is not known to torch", "did you mean 'cuda'?"],
        ),
        (["plan", "quickstart", "training.max_step=1"], ["unknown key; did you mean 'max_steps'?"]),
        (["plan", "quickstart", "nonsense"], ["'nonsense' is not of the form key=value"]),
        (["plan", "quickstart", "model=./nowhere"], ["model './nowhere' does not exist"]),
        (["plan", "quickstart", "model=a b"], ["neither a path nor a Hub id"]),
        (["detect", "--device", "cuda:x"], ["device 'cuda:x' is not a device"]),
        (
            ["train", "quickstart", "rewards=[arithmetic]"],
            ["rewards: got 'arithmetic'", "did you mean 'arithmetic_answer'?"],
        ),
        (
            ["plan", "quickstart", "rewards=[{function: regex, options: {pattern: '(a'}}]"],
            ["rewards: regex: option pattern: got '(a', which is no regular expression"],
        ),
        (["rewards", "try", "regx", "--text", "a"], ["rewards: got 'regx'", "did you mean 'regex'?"]),
        (["rewards", "try", "regex", "--text", "a"], ["regex needs the option 'pattern'"]),
        (["rewards", "try", "regex", "--text", "a", "--option", "patern=a"], ["did you mean 'pattern'?"]),
        (
            ["rewards", "try", "regex", "--text", "a", "--option", "pattern"],
            ["--option: got 'pattern'; give it as KEY="],
        ),
        (["rewards", "try", "regex", "--option", "pattern=a"], ["no text to score; give one or more with --text"]),
        (["rewards", "try", "exact_match", "--text", "a"], ["a column 'answer'; give --column answer=VALUE"]),
        (
            [
                "rewards",
                "try",
                "gsm8k_answer",
                "--text",
                "a",
                "--text",
                "b",
                "--text",
                "c",
                *["--column", "answer=1"] * 2,
            ],
            ["--column answer: given 2 times for 3 texts"],
        ),
        (
            ["rewards", "try", "length", "--text", "a", "--option", "target=5"],
            ["needs a tokenizer", "--tokenizer MODEL"],
        ),
        (["rewards", "try", "reward_adapter", "--text", "a"], ["lowmem-rlhf eval RUN"]),
        (["rewards", "try", "classifier", "--text", "a", "--option", "labl=1"], ["unknown key; did you mean 'label'?"]),
        (["rewards", "try", "nothing.py:f", "--text", "a"], ["there is no file nothing.py"]),
        (["report", "nowhere"], ["nowhere does not exist", "runs/NAME"]),
    ],
    ids=lambda value: " ".join(value[:3]),
)
def test_wrong_input_is_one_clear_message_and_exit_code_2(run, model, tmp_path, arguments, parts):
    if arguments[0] in ("plan", "train") and not any(one.startswith("model=") for one in arguments):
        arguments = [*arguments, model]
    done = run(*arguments)
    assert done.code == 2, done
    assert done.err.startswith("error: ") and "Traceback" not in done.err
    assert all(part in done.err for part in parts), done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: [", "cannot be read as YAML"),
        ("- a\n- b\n", "is not a mapping"),
        ("", "model: missing"),
        ("model: m\nmodel: n\n", "cannot be read as YAML"),
        ("a: \xff", "cannot be read as YAML"),
    ],
)
def test_a_bad_recipe_file_is_named(run, tmp_path, text, part):
    (tmp_path / "bad.yaml").write_bytes(text.encode("latin-1"))
    done = run("plan", "bad.yaml")
    assert done.code == 2
    assert "bad.yaml" in done.err and part in done.err and "Traceback" not in done.err, done.err


@pytest.mark.parametrize("arguments", [["plan"], ["fly"], ["plan", "quickstart", "--nope"]])
def test_a_wrong_command_is_a_usage_error(run, arguments):
    done = run(*arguments)
    assert done.code == 2 and "Traceback" not in done.err and "Usage" in done.err
