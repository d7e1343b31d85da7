"""The commands of the tutorial, of the README's first steps and of the page on extending run as they are written.

They run one after another in one folder, on a tiny model and rows of their own: what the Hub would give is put before
what a command says itself.
"""

import re
import shlex
from pathlib import Path

import pytest
from tiny_runs import save_tiny_chat_model, write_jsonl

ROOT = Path(__file__).parents[2]
ROWS = [{"question": f"{a} + {b} = ?", "answer": f"#### {a + b}"} for a in range(13) for b in range(13)]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """Return the lines of a page's blocks that call this program, without their comments."""
    lines = re.findall(r"^lowmem-rlhf .*$", text.replace("\\\n", ""), re.MULTILINE)
    return [" ".join(shlex.quote(word) for word in shlex.split(line, comments=True)) for line in lines]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a tiny chat model, rows, and the reward of the page on extending."""
    folder = tmp_path_factory.mktemp("commands")
    save_tiny_chat_model(folder / "tiny")
    write_jsonl(folder / "sums.jsonl", ROWS)
    write_jsonl(folder / "mine.jsonl", [{**row, "source": "Smith"} for row in ROWS])
    (folder / "my_rewards.py").write_text(re.findall(r"```python\n(.*?)```", page("docs/extending.md"), re.DOTALL)[0])
    return folder


def smaller(words: list[str]) -> list[str]:
    """Return a command's words with what makes it small and independent of the Hub, before what it says itself."""
    own = [word for word in words[2:] if "=" in word and not word.startswith("-")]
    given = [
        *("model=tiny", "hardware={device: cpu, quantization: none, compute_dtype: float32}"),
        *(
            "data.train=sums.jsonl",
            "data.eval=null",
            "data.config=null",
            "data.system=null",
            "data.max_prompt_length=64",
        ),
        *("data.eval_size=2", "generation.num_generations=4", "generation.max_completion_length=32"),
        *("training.max_steps=1", "training.prompts_per_step=4", "training.warmup_steps=0"),
        "rewards=[{function: length, options: {target: 9}}]",
    ]
    keys = {word.partition("=")[0] for word in own}
    return [*words[:2], *[word for word in given if word.partition("=")[0] not in keys], *words[2:]]


def as_run(command: str, rehearse: bool) -> list[str]:
    """Return the words of a command as it is run here, without the program's name."""
    words = shlex.split(command)[1:]
    if words[0] in ("train", "data"):
        words = smaller(words) + ["data.train_size=6"] * (words[0] == "data")
    if words[0] == "train" and rehearse and "--dry-run" not in words:
        words.append("--dry-run")
    return words


@pytest.mark.long
def test_the_commands_of_the_pages_run(place, monkeypatch, lowmem_rlhf):
    monkeypatch.chdir(place)
    readme = page("README.md").split("## On your card")[1].split("\n| ")[0]
    tutorial, extending = commands(page("docs/tutorial.md")), commands(page("docs/extending.md"))
    assert len(tutorial) >= 13 and len(commands(readme)) >= 6 and len(extending) >= 4
    done = set()
    for command, rehearse in [
        *((one, False) for one in [*tutorial, *commands(readme)]),
        *((one, True) for one in extending),
    ]:
        if command in done:
            continue
        done.add(command)
        result = lowmem_rlhf(*as_run(command, rehearse))
        assert result.code == 0, f"{command}\n{result.err}"
        if command == "lowmem-rlhf plan grpo_gsm8k --profile rtx-2080-ti":
            told = " ".join(result.out.split())
            assert "GeForce RTX 2080 Ti (11 GB) has no bfloat16" in told
            assert "peak 10.00 GiB of 10.18 GiB: fits" in told and "the run of 300 steps 33m" in told
    assert (place / "runs" / "grpo_gsm8k" / "report.html").is_file()
    (example,) = re.findall(r"```python\n(.*?)```", page("docs/tutorial.md"), re.DOTALL)
    exec(compile(example, "tutorial.md", "exec"), {})
