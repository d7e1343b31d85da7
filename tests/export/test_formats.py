"""A format from outside the package works everywhere, and no format's name is known outside `export.formats`."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from export_cases import make_run, save_model
from safetensors.torch import load_file
from typer.testing import CliRunner

import lowmem_rlhf
from lowmem_rlhf import cli
from lowmem_rlhf.algorithms.registry import spec_of
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.export import push
from lowmem_rlhf.export.formats.format import ExportBytes, ExportFormat, Written
from lowmem_rlhf.export.formats.table import FORMATS, register_format
from lowmem_rlhf.run.directory import RunDirectory

PACKAGE = Path(lowmem_rlhf.__file__).parent
WEIGHTS = "adapter_model.safetensors"


class ToyFormat(ExportFormat):
    """The mean of each of the adapter's tensors, as JSON."""

    name = "toy"
    takes = frozenset({"quantize"})
    choices = {"quantize": ("decimal", "hex")}  # noqa: RUF012 (as a user would write it)
    library = "toylib"
    tags = ("toy-tag",)
    lies = False  # what is written differs from the adapter

    def check(self, options, run):
        if options.step is not None:
            raise UserError("--step: a toy is made of the finished adapter")
        return options

    def bytes(self, job, dims):
        return ExportBytes("float64", {"toy_part": 8}, dims.hidden_size * 2**20)

    def write(self, job, folder):
        means = {name: float(tensor.mean()) for name, tensor in load_file(job.adapter / WEIGHTS).items()}
        text = json.dumps({name: mean + self.lies for name, mean in means.items()})
        (folder / "toy.json").write_text(text, encoding="utf-8")
        return Written({"quantize": job.options.quantize, "tensors": len(means)}, means)

    def prove(self, job, folder, written):
        difference = max(
            abs(mean - written.evidence[name])
            for name, mean in json.loads((folder / "toy.json").read_text(encoding="utf-8")).items()
        )
        if difference:
            raise RunError(f"the toy is off by {difference}; nothing was kept")
        return {"largest_difference": difference}

    def usage(self, folder, name, base, spec):
        return f"Read {folder.joinpath('toy.json').name} of {name}, trained by {spec.name}."


@pytest.fixture
def toy() -> Iterator[ToyFormat]:
    """Register a toy for one test."""
    toy = ToyFormat()
    register_format(toy)
    yield toy
    del FORMATS["toy"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("toy")
    return make_run(folder / "run", save_model("llama", folder / "model"), 0.05)


def export(run, *args):
    return CliRunner().invoke(cli.app, ["export", str(run.path), *args])


def refused(run, *args):
    error = export(run, *args).exception
    assert isinstance(error, UserError)
    return str(error)


def test_a_format_from_outside_is_exported_proven_and_described(toy, run):
    done = export(run, "--format", "Toy", "--quantize", "HEX", "--json")
    assert done.exit_code == 0, done.output
    target = run.path / "export" / "toy"
    facts = json.loads(done.stdout)
    assert facts == {"folder": str(target)} | json.loads((target / "export.json").read_text(encoding="utf-8"))
    assert (facts["format"], facts["quantize"], facts["proof"]) == ("toy", "hex", {"largest_difference": 0.0})
    assert facts["tensors"] == len(json.loads((target / "toy.json").read_text(encoding="utf-8")))
    card = (target / "README.md").read_text(encoding="utf-8")
    assert "## Use\n\nRead toy.json of tiny, trained by grpo.\n" in card
    assert "library_name: toylib" in card and "- toy-tag" in card and "| largest difference | 0 |" in card
    done = export(run, "--format", "toy")
    assert "largest difference" in done.stdout and f"export: {target}" in done.stdout.replace("\n", "")


def test_its_bytes_are_planned(toy, run):
    plan = json.loads(export(run, "--format", "toy", "--dry-run", "--json").stdout)
    assert (plan["format"], plan["dtype"]) == ("toy", "float64")
    assert (plan["memory_bytes"], plan["disk_bytes"]) == ({"toy_part": 8}, 64 * 2**20)
    shown = export(run, "--format", "toy", "--dry-run").stdout
    assert "toy part" in shown and "disk for toy float64: 64 MiB, " in shown


def test_a_toy_that_fails_its_proof_leaves_nothing(toy, run, tmp_path):
    toy.lies = True
    done = export(run, "--format", "toy", "--output", str(tmp_path / "out" / "toy"))
    assert isinstance(done.exception, RunError) and str(done.exception).startswith("the toy is off by ")
    assert list((tmp_path / "out").iterdir()) == []


def test_it_is_pushed(toy, run, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(push, "check_push", pushed.append)
    monkeypatch.setattr(push, "push", lambda folder, repo: f"{repo} of {folder.name}")
    done = export(run, "--format", "toy", "--output", str(tmp_path / "toy"), "--push", "me/toy", "--json")
    assert json.loads(done.stdout)["pushed"] == "me/toy of toy" and pushed == ["me/toy"]


def test_its_options_are_checked_as_those_of_every_format(toy, run):
    known = "give adapter, merged, gguf, ollama, toy; did you mean 'toy'?"
    assert refused(run, "--format", "tay") == f"--format: got 'tay'; {known}"
    assert refused(run, "--format", "toy", "--quantize", "q8_0") == "--quantize: got 'q8_0'; give decimal, hex"
    usual = "--{} has no meaning with --format toy; leave it out"
    assert refused(run, "--format", "toy", "--onto", "original") == usual.format("onto")
    assert refused(run, "--format", "toy", "--heads") == usual.format("heads")
    assert refused(run, "--format", "toy", "--step", "7") == "--step: a toy is made of the finished adapter"


def test_a_name_is_one_format_s(toy):
    with pytest.raises(ValueError, match="'toy' is registered already"):
        register_format(ToyFormat())
    assert list(FORMATS) == ["adapter", "merged", "gguf", "ollama", "toy"]


def test_the_docs_show_what_the_card_says_of_use(tmp_path):
    (tmp_path / "NAME-Q8_0.gguf").touch()
    docs = (PACKAGE.parent / "docs" / "export.md").read_text(encoding="utf-8")
    for name, format in FORMATS.items():
        for algorithm in ("grpo", *(["reward_model"] if format.holds_scores else [])):
            assert format.usage(tmp_path, "NAME", "BASE", spec_of(algorithm)) in docs, (name, algorithm)


def compared_texts(file: Path) -> set[str]:
    """Return the constant texts that a module compares something with."""
    compares = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Compare)]
    texts = (one.value for node in compares for one in ast.walk(node) if isinstance(one, ast.Constant))
    return {text for text in texts if isinstance(text, str)}


def test_no_format_is_known_by_name_outside_its_module():
    """A recipe's ``adapter`` is a name of other things, so it is looked for in the export only."""
    knows = {}
    for file in PACKAGE.rglob("*.py"):
        place = file.relative_to(PACKAGE)
        names = set(FORMATS) if place.parts[0] == "export" else set(FORMATS) - {"adapter"}
        if place.parts[:2] != ("export", "formats") and (found := compared_texts(file) & names):
            knows[str(place)] = found
    assert knows == {}
