"""Recipes: the shipped ones, numbers and overrides, messages, and that no option is there for nothing."""

import ast
import json
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

import lowmem_rlhf
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.profiles import load_profiles, profile_device
from lowmem_rlhf.planning.advice import why_not
from lowmem_rlhf.planning.plan import make_plan
from lowmem_rlhf.recipe.loading import load_recipe, shipped_recipes, validate_recipe
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.section import Section

QWEN_05B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "config.json").write_text(json.dumps(QWEN_05B))
    return folder


SAMPLING = ("grpo", "ppo", "rloo", "reinforce_plus_plus")
# a classifier trains whole: there is nothing to plan
PLANNED = [name for name in shipped_recipes() if load_recipe(name).algorithm != "classifier"]


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe("quickstart", list(overrides))
    return str(caught.value)


def test_the_main_recipes_are_shipped():
    assert {"quickstart", "grpo_gsm8k"} <= set(shipped_recipes())


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_a_shipped_recipe_is_named_like_its_file_and_says_what_it_is(name):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description
    assert recipe.data.eval_size > 0, "a shipped recipe shows what was learned"


@pytest.mark.parametrize("profile", list(load_profiles()))
@pytest.mark.parametrize("name", PLANNED)
def test_a_shipped_recipe_has_a_plan_for_every_card_or_says_why_not(name, profile, model):
    recipe = load_recipe(name, [f"model={model}"])
    plan = make_plan(recipe, profile_device(load_profiles()[profile]), profile)
    needed, budget = plan.memory["peak_bytes"], plan.memory["budget_bytes"]
    assert plan.fits == (needed <= budget)
    if plan.fits:
        assert plan.settings.compute_dtype == ("bfloat16" if plan.device.bf16 else "float16") or (
            plan.settings.quantization == "int8"
        )
    else:
        assert "short" in why_not(plan, recipe) and "try " in why_not(plan, recipe)


@pytest.mark.parametrize("name", PLANNED)
def test_a_shipped_recipe_fits_on_the_reference_card(name, model):
    device = profile_device(load_profiles()["rtx-2080-ti"])
    assert make_plan(load_recipe(name, [f"model={model}"]), device, "rtx-2080-ti").fits


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "1E-05"])
def test_an_exponent_is_a_number_in_yaml_and_in_overrides(text, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"model: m\ndata: {{train: arithmetic}}\nrewards: [length]\ntraining:\n  learning_rate: {text}\n")
    assert load_recipe(str(file)).training.learning_rate == 1e-5
    assert load_recipe("quickstart", [f"training.learning_rate={text}"]).training.learning_rate == 1e-5


def test_a_recipe_takes_its_files_name_and_rewards_may_be_plain_names(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: m\ndata: {train: arithmetic}\nrewards: [arithmetic_answer, my.py:short]\n")
    recipe = load_recipe(str(file))
    assert recipe.name == "mine"
    assert [reward.name for reward in recipe.rewards] == ["arithmetic_answer", "short"]
    assert recipe.evaluation.accuracy == "arithmetic_answer"


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("1", 1), ("0", 0), ("auto", "auto")])
def test_checkpointing_is_a_truth_or_a_number_of_layers(text, value):
    got = load_recipe("grpo_gsm8k", [f"hardware.gradient_checkpointing={text}"]).hardware.gradient_checkpointing
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("none", ["false", "0"])
def test_checkpoints_that_are_not_made_cannot_be_offloaded(none):
    with pytest.raises(UserError, match=r"offload_checkpoints: got true, but .* there are no checkpoints"):
        load_recipe("grpo_gsm8k", [f"hardware.gradient_checkpointing={none}", "hardware.offload_checkpoints=true"])


def test_dotted_overrides_reach_every_kind_of_value():
    recipe = load_recipe(
        "grpo_gsm8k",
        [
            "rewards[0].weight=2",
            "rewards[1].options={a: 1}",
            "training.max_steps=7",
            "data.system=null",
            "data.options.low=3",
            "lora.target_modules=[q_proj,v_proj]",
            "hardware.gradient_checkpointing=true",
            "data.template=What is {question}? Think: yes",
            "evaluation.temperature=0",
            "data.config='a b'",
        ],
    )
    assert [reward.weight for reward in recipe.rewards] == [2.0, 0.2]
    assert recipe.rewards[1].options == {"a": 1}
    assert recipe.training.max_steps == 7
    assert recipe.data.system is None and recipe.data.options == {"low": 3}
    assert recipe.lora.target_modules == ["q_proj", "v_proj"]
    assert recipe.hardware.gradient_checkpointing is True
    assert recipe.evaluation.temperature == 0
    assert recipe.data.config == "a b"
    assert recipe.data.template == "What is {question}? Think: yes"


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_a_resolved_recipe_loads_again_as_itself(name, tmp_path):
    recipe = load_recipe(name, ["training.learning_rate=1e-7", "data.system=Grüße: {a} # no comment"])
    file = tmp_path / "again.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(str(file)) == recipe
    assert validate_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "hardware.gradient_checkpointing=-1",
            "hardware.gradient_checkpointing: got -1; it should be true or false or at least 0 or 'auto'",
        ),
        (
            "hardware.gradient_checkpointing=2.5",
            "hardware.gradient_checkpointing: got 2.5; it should be true or false or a whole number or 'auto'",
        ),
        (
            "hardware.micro_batch_tokens=many",
            "hardware.micro_batch_tokens: got 'many'; it should be a whole number or 'auto'",
        ),
        ("hardware.micro_batch_tokens=0", "hardware.micro_batch_tokens: got 0; it should be at least 1 or 'auto'"),
        ("lora.target_modules=[1,2]", "lora.target_modules: got [1, 2]; it should be 'all-linear' or a text"),
        ("hardware.quantization=nf5", "hardware.quantization: got 'nf5'; it should be 'auto', 'nf4', 'int8' or 'none'"),
        ("training.max_steps=1.5", "training.max_steps: got 1.5; it should be a whole number"),
        ("rewards[0].weight=big", "rewards[0].weight: got 'big'; it should be a number"),
        ("rewards=[]", "rewards: missing; grpo needs at least one"),
        ("data.train=null", "data.train: got None; it should be a text"),
        ("generation.repetition_penalty=0", "generation.repetition_penalty: got 0; it should be at least 0.01"),
        ("generation.min_new_tokens=-1", "generation.min_new_tokens: got -1; it should be at least 0"),
        (
            "generation.min_new_tokens=17",
            "generation.min_new_tokens: got 17, more than max_completion_length=16, so that no stop token could end a "
            "completion; lower it, or raise that",
        ),
        (
            'generation.stop_strings=[a, ""]',
            "generation.stop_strings[1]: got an empty text, which every completion has; give the text that ends one, "
            "or leave it out",
        ),
        ("generation.stop_strings=[3]", "generation.stop_strings[0]: got 3; it should be a text"),
        (
            f"generation.stop_strings=[{'x' * 1001}]",
            "generation.stop_strings[0]: got a text of 1001 characters; it should have at most 1000",
        ),
    ],
)
def test_a_wrong_value_is_one_line_that_says_what_is_allowed(override, line):
    assert refusal(override) == f"recipe quickstart has an error:\n  {line}"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.max_step=3", ["training.max_step: unknown key", "did you mean 'max_steps'?"]),
        ("trainig.max_steps=3", ["trainig: unknown key", "did you mean 'training'?"]),
        ("rewards[0].wieght=3", ["rewards[0].wieght: unknown key", "did you mean 'weight'?"]),
        ("training=3", ["training: got 3; it should hold keys (max_steps, "]),
        ("evaluation.accuracy=arithmetic", ["no reward of this recipe", "did you mean 'arithmetic_answer'?"]),
        ("generation.num_generations=1", ["needs at least 2"]),
        ("nonsense", ["override 'nonsense' is not of the form key=value"]),
        ("=3", ["is not of the form key=value"]),
        ("training.max_steps=[1", ["training.max_steps: got '[1'; it should be a whole number"]),
        ("rewards[5].weight=1", ["the list has no item of that number"]),
        ("training.seed=${nothing}", ["training.seed: got '${nothing}'; it should be a whole number"]),
    ],
)
def test_a_wrong_override_is_refused_with_what_to_do(override, parts):
    message = refusal(override)
    assert all(part in message for part in parts), message
    assert "Config" not in message and "Settings" not in message and "full_key" not in message


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "tasks[0].generation.stop_strings=[a]",
            "tasks[0].generation.stop_strings: holds for all tasks; set generation.stop_strings",
        ),
        ("tasks[0].generation.top_p=0.5", "tasks[0].generation.top_p: holds for all tasks; set generation.top_p"),
        (
            "generation.min_new_tokens=20",
            "tasks[0].generation.max_completion_length: got 16, below generation.min_new_tokens=20; raise it, or lower "
            "that",
        ),
    ],
)
def test_tasks_are_sampled_in_one_way(override, line):
    with pytest.raises(UserError) as caught:
        load_recipe("multi_task", [override])
    assert str(caught.value) == f"recipe multi_task has an error:\n  {line}"


def test_all_errors_are_shown_at_once():
    lines = refusal("training.learning_rate=fast", "training.max_steps=x", "foo=1", "grpo.loss_type=gpro").split("\n")
    assert lines[0] == "recipe quickstart has 4 errors:"
    assert [line.split(":")[0].strip() for line in sorted(lines[1:])] == [
        "foo",
        "grpo.loss_type",
        "training.learning_rate",
        "training.max_steps",
    ]


def test_two_rewards_of_one_name_are_refused():
    assert "same name" in refusal("rewards=[length, length]")
    assert "taken by a metric" in refusal("rewards=[{function: length, name: std}]")


def sections(of: type[BaseModel] = Section) -> list[type[BaseModel]]:
    return [one for found in of.__subclasses__() for one in (found, *sections(found))]


def test_every_option_is_read_somewhere():
    """An option that nothing reads is a promise that nobody keeps (style.md)."""
    package = Path(lowmem_rlhf.__file__).parent
    read: set[str] = set()
    for file in package.rglob("*.py"):
        if file.name.startswith("recipe"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)
    unread = [f"{one.__name__}.{key}" for one in sections() for key in one.model_fields if key not in read]
    assert len(sections()) >= 9 and not unread


# sections and the names under which the package hands them on
STAGES = {
    "ppo": ({"ppo", "settings"}, ("algorithms/ppo/*.py", "algorithms/*/spec.py", "algorithms/rloo/*.py")),
    "sft": ({"sft", "settings"}, ("algorithms/sft/*.py", "data/supervised.py")),
    "reward_model": ({"reward_model"}, ("algorithms/reward_model/*.py",)),
    "classifier": ({"classifier"}, ("algorithms/classifier/*.py",)),
}


@pytest.mark.parametrize("section", STAGES)
def test_every_option_of_a_stage_is_read_by_that_stage(section):
    """Names such as max_length and eval_steps are those of several sections."""
    package = Path(lowmem_rlhf.__file__).parent
    holders, where = STAGES[section]
    read = set()
    files = {pattern: list(package.glob(pattern)) for pattern in where}
    assert all(files.values())  # a file that moves has to be looked for where it is
    for file in (file for found in files.values() for file in found):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                holder = getattr(node.value, "attr", getattr(node.value, "id", ""))
                read |= {node.attr} if holder in holders else set()
    options = set(Recipe.model_fields[section].annotation.model_fields)
    assert options and not options - read


def values(**changes):
    """Return a recipe's values; those of the data are the given ones."""
    changes["data"] = {"train": "rows.jsonl", **changes.get("data", {})}
    return {"model": "m", **changes}


def refused(**changes) -> str:
    with pytest.raises(UserError) as caught:
        validate_recipe(values(**changes))
    (line,) = str(caught.value).split("\n")[1:]
    return line.strip()


def columns(**changes) -> tuple:
    """Return which columns a recipe reads: what is learned, the reference answer, and those of pairs."""
    recipe = validate_recipe(values(**changes))
    again = validate_recipe(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe  # what was filled in stays
    data = recipe.data
    return data.completion, data.answer, data.chosen, data.rejected


def test_the_columns_follow_from_the_algorithm():
    assert columns(rewards=["gsm8k_answer"]) == (None, "answer", None, None)
    assert columns(algorithm="sft") == ("answer", "answer", None, None)
    assert columns(algorithm="sft", data={"completion": "solution"}) == ("solution", None, None, None)
    both = {"completion": "solution", "answer": "number"}
    assert columns(algorithm="sft", data=both) == ("solution", "number", None, None)
    assert columns(algorithm="sft", data={"text": "page"}) == (None, None, None, None)
    assert columns(algorithm="sft", data={"messages": "talk", "answer": "gold"}) == (None, "gold", None, None)
    assert columns(algorithm="reward_model") == (None, None, "chosen", "rejected")
    assert columns(algorithm="reward_model", data={"chosen": "good"}) == (None, None, "good", "rejected")
    assert columns(algorithm="classifier", data={"text": "page", "label": "genre"}) == (None, None, None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "sft", "data": {"answer": None}}, "data.completion: missing; name the column that is learned"),
        ({"algorithm": "sft", "data": {"text": "a", "messages": "b"}}, "data.text, data.messages: got both"),
        ({"algorithm": "sft", "data": {"text": "a", "template": "{a}"}}, "data.template: an example of data.text or"),
        ({"algorithm": "classifier"}, "data.text, data.label: a classifier needs both"),
        ({"algorithm": "classifier", "data": {"text": "a"}}, "data.text, data.label: a classifier needs both"),
        ({"algorithm": "sft", "evaluation": {"accuracy": "x"}}, "evaluation.accuracy: got 'x', which is no reward"),
        *(({"algorithm": name}, f"rewards: missing; {name} needs at least one") for name in SAMPLING),
        *(
            (
                {"algorithm": name, "rewards": ["gsm8k_answer"], "training": {"num_train_epochs": 1}},
                "training.num_train_epochs: is for sft, reward_model and classifier; set training.max_steps",
            )
            for name in SAMPLING
        ),
        ({"algorithm": "sft", "sft": {"max_length": 1}}, "sft.max_length: got 1; it should be at least 2"),
        ({"algorithm": "sft", "sft": {"packing": True}}, "sft.packing: unknown key"),
        ({"algorithm": "dpo"}, "algorithm: got 'dpo'; it is TRL's, write trl/dpo"),
        ({"algorithm": "gro"}, "algorithm: got 'gro'; it should be 'grpo', 'ppo', "),
        ({"rewards": [{"function": "reward_adapter"}]}, "rewards[0].options.adapter: missing"),
        (
            {"rewards": [{"function": "reward_adapter", "options": {"adapter": "a", "adaptr": "b"}}]},
            "rewards[0].options.adaptr: unknown key; did you mean 'adapter'?",
        ),
    ],
)
def test_a_stage_that_cannot_be_is_refused(changes, message):
    assert refused(**changes).startswith(message)


def test_an_adapter_is_for_what_lies_on_a_base():
    for algorithm in ("sft", "reward_model"):
        assert validate_recipe(values(algorithm=algorithm, adapter="runs/a")).adapter == "runs/a"
    data = {"text": "page", "label": "genre"}
    assert refused(algorithm="classifier", adapter="runs/a", data=data).startswith("adapter: a classifier trains whole")


def test_a_critic_from_the_reward_needs_a_reward_adapter():
    ppo = {"algorithm": "ppo", "ppo": {"critic": "reward"}}
    assert refused(**ppo, rewards=["gsm8k_answer"]).startswith("ppo.critic: got reward, but no reward of this recipe")
    liked = {"function": "reward_adapter", "options": {"adapter": "runs/r"}}
    assert validate_recipe(values(**ppo, rewards=["gsm8k_answer", liked])).ppo.critic == "reward"


def test_bounds_of_the_importance_correction_are_ordered_and_given():
    low = refusal("grpo.importance_sampling_clip_min=3", "grpo.importance_sampling_clip_max=2")
    assert "importance_sampling_clip_min: got 3; it should be less than importance_sampling_clip_max, which is 2" in low
    none = refusal("grpo.importance_sampling_correction=true", "grpo.importance_sampling_clip_max=null")
    assert "a bound is missing" in none


@pytest.mark.parametrize("value", [".nan", ".inf"])
@pytest.mark.parametrize("key", ["training.learning_rate", "grpo.beta", "generation.temperature", "lora.lora_alpha"])
def test_a_number_is_finite(key, value):
    with pytest.raises(UserError, match=rf"{key}: got {value[1:]}; it should be a finite number"):
        load_recipe("quickstart", [f"{key}={value}"])
