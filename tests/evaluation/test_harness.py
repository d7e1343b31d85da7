"""lm-eval's tasks on the live base, against its own wrapper of a stock model; skipped where it is not installed."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import tiny_recipe, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")

from lm_eval.models.huggingface import HFLM

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.evaluation.harness import SharedBaseLM
from lowmem_rlhf.evaluation.target import EvalTarget, open_run_target
from lowmem_rlhf.inference.open_run import OpenRun
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.run.evaluations import read_evaluations
from lowmem_rlhf.session.train import train

CHOICES = """task: tiny_sums
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}="
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ANSWERS = """task: tiny_answers
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}="
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["a", "7"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def run(eval_model, tmp_path_factory, no_report) -> RunDirectory:
    recipe = tiny_recipe(eval_model, training={"learning_rate": 0.1})
    return train(recipe, tmp_path_factory.mktemp("lm-eval") / "run")


@pytest.fixture(scope="module")
def target(run) -> EvalTarget:
    return open_run_target(OpenRun(run), [], judged=False)


@pytest.fixture(scope="module")
def stock(eval_model) -> HFLM:
    """Return lm-eval's own wrapper of the same model without an adapter, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(eval_model, dtype=torch.float32)
    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(eval_model), batch_size=1, device="cpu")


@pytest.fixture
def task(tmp_path) -> dict[str, Path]:
    rows = [
        {"question": f"{a}+{b}", "choices": [str(a + b), str(a + b + 1), f"{a}{b}a"], "label": 0}
        for a in range(1, 8)
        for b in range(1, 6)
    ]
    file = write_jsonl(tmp_path / "sums.jsonl", rows)
    paths = {"choices": tmp_path / "tiny_sums.yaml", "answers": tmp_path / "tiny_answers.yaml"}
    paths["choices"].write_text(CHOICES.format(file=file))
    paths["answers"].write_text(ANSWERS.format(file=file))
    return paths


def requests(*arguments: tuple) -> list:
    return [SimpleNamespace(args=one) for one in arguments]


def test_log_probs_and_greediness_are_those_of_lm_eval_s_own_wrapper(target, stock):
    pairs = [
        ("3+4=", "7"),
        ("3+4=", "12"),
        ("3+4=", "a b"),
        ("", "5-2"),
        ("1 ", "2"),
        ("9" * 300, "ab"),
        ("a", "b" * 40),
    ]
    ours = SharedBaseLM(target, "reference", "r").loglikelihood(requests(*pairs))
    theirs = stock.loglikelihood(requests_of_lm_eval(pairs, "loglikelihood"))
    for (a, greedy), (b, likewise) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=2e-4) and greedy == likewise
    policy = SharedBaseLM(target, "policy", "p")
    [text] = policy.generate_until(requests(("3+4=", {"max_gen_toks": 1})))
    other = "a" if text != "a" else "b"
    assert [greedy for _, greedy in policy.loglikelihood(requests(("3+4=", text), ("3+4=", other)))] == [True, False]


def requests_of_lm_eval(arguments: list[tuple], kind: str) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def test_whole_texts_are_scored_in_windows_as_lm_eval_does(target, stock):
    texts = [("1+2=3 a",), ("ab" * 400,)]
    ours = SharedBaseLM(target, "reference", "r").loglikelihood_rolling(requests(*texts))
    theirs = stock.loglikelihood_rolling(requests_of_lm_eval(texts, "loglikelihood_rolling"))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_answers_stop_where_lm_eval_s_own_do(target, stock):
    contexts = ["3+4=", "5-2=", "1", "a b", "7 7"]
    given = [(text, {"until": ["a", "7"], "max_gen_toks": 8, "do_sample": False}) for text in contexts]
    ours = SharedBaseLM(target, "reference", "r").generate_until(requests(*given))
    assert ours == stock.generate_until(requests_of_lm_eval(given, "generate_until"))
    free = [(text, {"until": [], "max_gen_toks": 8, "do_sample": False}) for text in contexts]
    longer = SharedBaseLM(target, "reference", "r").generate_until(requests(*free))
    assert any(len(a) < len(b) for a, b in zip(ours, longer, strict=True))


def test_tasks_run_on_both_roles_of_one_base_and_are_kept(lowmem_rlhf, run, task, stock, monkeypatch):
    loads = []
    load = SharedBase.load.__func__
    monkeypatch.setattr(SharedBase, "load", classmethod(lambda cls, *a, **k: loads.append(a) or load(cls, *a, **k)))
    done = lowmem_rlhf("eval", run.path, "--lm-eval", f"{task['choices']},{task['answers']}", "--json")
    assert done.code == 0, done.err
    got = json.loads(done.out[done.out.index("{\n") :])
    assert len(loads) == 1
    assert read_evaluations(run.path)[-1]["results"] == got["results"]
    assert got["counts"] == {"tiny_sums problem": 35, "tiny_answers problem": 35}
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task["choices"].parent))
    theirs = simple_evaluate(stock, tasks=["tiny_sums", "tiny_answers"], task_manager=manager)["results"]
    for role in ("reference", "policy"):
        assert set(got["results"][role]) == {"tiny_sums/acc", "tiny_sums/acc_norm", "tiny_answers/exact_match"}
    for metric in ("acc", "acc_norm"):
        one = got["results"]["reference"][f"tiny_sums/{metric}"]
        assert one["value"] == pytest.approx(theirs["tiny_sums"][f"{metric},none"])
        assert one["low"] < one["value"] < one["high"]
    assert got["results"]["policy"] != got["results"]["reference"]
    difference = got["difference"]["tiny_sums/acc"]
    assert difference["low"] <= difference["value"] <= difference["high"]


def test_a_model_needs_no_recipe_for_tasks_and_a_limit_is_kept(lowmem_rlhf, eval_model, task):
    done = lowmem_rlhf("eval", eval_model, "--lm-eval", task["choices"], "--limit", 4, "--json")
    assert done.code == 0, done.err
    got = json.loads(done.out[done.out.index("{\n") :])
    assert got["counts"] == {"tiny_sums problem": 4} and list(got["results"]) == [eval_model.name]


def test_prompts_can_be_written_as_chats(lowmem_rlhf, run, eval_model, task, tmp_path, target):
    done = lowmem_rlhf("eval", run.path, "--lm-eval", task["choices"], "--chat")
    assert done.code == 2 and "--chat" in done.err and "no chat template" in done.err
    folder = Path(shutil.copytree(eval_model, tmp_path / "chat"))
    template = "{% for m in messages %}a{{ m['content'] }}.{% endfor %}{% if add_generation_prompt %}b{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    plain, chat = (
        json.loads(done.out[done.out.index("{\n") :])["results"]["chat"]
        for done in (
            lowmem_rlhf("eval", folder, "--lm-eval", task["choices"], *more, "--json") for more in ([], ["--chat"])
        )
    )
    wanted = []
    lm = SharedBaseLM(target, "reference", "r")
    for row in map(json.loads, (task["choices"].parent / "sums.jsonl").read_text().splitlines()):
        pairs = [(f"a{row['question']}=.b", choice) for choice in row["choices"]]
        wanted.append(max(range(3), key=[logp for logp, _ in lm.loglikelihood(requests(*pairs))].__getitem__) == 0)
    assert chat["tiny_sums/acc"]["value"] == pytest.approx(sum(wanted) / len(wanted))
    assert chat != plain


@pytest.mark.parametrize(
    ("tasks", "parts"),
    [
        ("arc_eazy", ["no such task", "arc_easy"]),
        ("nowhere.yaml", ["no readable task file"]),
        ("arc_easy", ["cannot be had", "Hub"]),
    ],
)
def test_tasks_that_are_not_there_are_said(lowmem_rlhf, run, tasks, parts):
    done = lowmem_rlhf("eval", run.path, "--lm-eval", tasks)
    assert done.code == 2 and all(part in done.err for part in parts), done.err
    assert "Traceback" not in done.err
