"""What goes wrong with an export: each is one clear sentence, and nothing half-written replaces something whole."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from export_cases import change_tensors, make_run, save_model, shard
from transformers import LlamaConfig

from lowmem_rlhf.errors import RunError, UserError, with_notes
from lowmem_rlhf.export import push, target
from lowmem_rlhf.export.export import Export
from lowmem_rlhf.export.merging import merge
from lowmem_rlhf.export.options import ExportOptions
from lowmem_rlhf.export.source import base_folder
from lowmem_rlhf.files import temp_path
from lowmem_rlhf.run.directory import RunDirectory

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Return a folder with a run of a model in three files."""
    folder = tmp_path_factory.mktemp("kept")
    shard(save_model("llama", folder / "whole"), folder / "model")
    make_run(folder / "run", folder / "model", 0.05)
    return folder


@pytest.fixture
def run(kept, tmp_path):
    """Return a copy of that run whose model lies beside it and may be broken."""
    shutil.copytree(kept, tmp_path / "case")
    recipe = tmp_path / "case" / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(kept / "model"), str(tmp_path / "case" / "model")))
    return RunDirectory(tmp_path / "case" / "run")


def export(run, **options):
    return Export(run, ExportOptions(**options)).make()


def model_of(run) -> Path:
    return run.path.parent / "model"


def exports(run):
    folder = run.path / "export"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def stop_after(monkeypatch, stop, file: str = "model-00002"):
    """Let the merge do ``stop()`` once a part of its second file is written."""
    written = merge.write_tensors

    def write(path, layout, pieces):
        def until():
            for number, piece in enumerate(pieces):
                if number == 2 and path.name.startswith(file):
                    assert path.parent.name.startswith(".")  # what is written so far is hidden
                    stop()
                yield piece

        written(path, layout, until())

    monkeypatch.setattr(merge, "write_tensors", write)


def fail_with(error):
    def fail():
        raise error

    return fail


def test_a_full_disk_says_so_and_leaves_the_older_export(run, monkeypatch):
    export(run)
    before = (run.path / "export" / "merged" / "model-00002-of-00003.safetensors").read_bytes()
    stop_after(monkeypatch, fail_with(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(RunError, match=r"cannot be written: the disk is full; nothing was kept"):
        export(run)
    assert exports(run) == ["merged"]
    assert (run.path / "export" / "merged" / "model-00002-of-00003.safetensors").read_bytes() == before


def test_a_second_export_to_the_same_folder_is_refused_while_the_first_writes(run, monkeypatch):
    refused = []

    def again():
        with pytest.raises(UserError, match=r"the export in .*merged is being written by this process"):
            export(run)
        refused.append(True)

    stop_after(monkeypatch, again)
    export(run)
    assert refused and exports(run) == ["merged"]


def test_an_interrupted_export_leaves_nothing(run, monkeypatch):
    stop_after(monkeypatch, fail_with(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt) as caught:
        export(run)
    assert with_notes("interrupted", caught.value) == "interrupted; nothing was kept"
    assert exports(run) == []


def test_an_interrupted_upload_leaves_the_export(run, monkeypatch):
    monkeypatch.setattr(push, "check_push", lambda repo: None)
    monkeypatch.setattr(push, "push", lambda *_: fail_with(KeyboardInterrupt())())
    with pytest.raises(KeyboardInterrupt) as caught:
        export(run, push="me/model")
    assert "the export in" in with_notes("interrupted", caught.value)
    assert "nothing was kept" not in with_notes("interrupted", caught.value)
    assert exports(run) == ["merged"]


@pytest.mark.skipif(sys.platform == "win32", reason="processes are not forked on Windows")
def test_a_killed_export_leaves_no_half_model_and_the_next_one_is_whole(run, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, lambda: os.kill(os.getpid(), signal.SIGKILL))
        child = multiprocessing.get_context("fork").Process(target=export, args=(run,))
        child.start()
        child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert exports(run) == [".merged.lock", temp_path(Path("merged")).name]
    export(run)
    assert exports(run) == ["merged"]


def test_a_small_disk_is_refused_before_anything_is_written(run, monkeypatch):
    monkeypatch.setattr(target.shutil, "disk_usage", lambda path: Usage(10**6, 0, 10**6))
    with pytest.raises(RunError, match=r"needs .* \([\d,]+ bytes\) on the disk of .* \(1,000,000 bytes\) are free"):
        export(run)
    assert exports(run) == []


def test_an_8b_export_is_planned_and_refused_without_its_weights(run, monkeypatch):
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    config = LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False)
    shutil.rmtree(model_of(run))
    config.save_pretrained(model_of(run))
    plan = json.loads((run.path / "plan.json").read_text())
    plan["settings"] |= {"quantization": "nf4", "compute_dtype": "float16"}
    (run.path / "plan.json").write_text(json.dumps(plan))
    monkeypatch.setattr(target.shutil, "disk_usage", lambda path: Usage(2**40, 0, 10 * 2**30))
    found = Export(run, ExportOptions()).plan()
    assert found["disk_bytes"] == pytest.approx(2 * 8.03e9, rel=0.005) and found["free_disk_bytes"] == 10 * 2**30
    assert found["memory_bytes"]["merge"] < 2**30 < 4 * 2**30 < found["memory_bytes"]["live_policy"] < 9 * 2**30
    with pytest.raises(RunError, match=r"needs 14\.99 GiB .* 10\.00 GiB"):
        export(run)
    assert Export(run, ExportOptions(format="gguf", quantize="q8_0")).plan()["disk_bytes"] > 1.5 * found["disk_bytes"]


def test_a_base_that_is_gone_is_one_sentence(run):
    shutil.rmtree(model_of(run))
    with pytest.raises(UserError, match="does not exist"):
        export(run)
    assert exports(run) == []


@pytest.mark.parametrize(
    "breaks, message",
    [
        (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), r"lacks model-00002-of-00003\.safetensors"),
        (lambda f: [path.unlink() for path in f.glob("*.safetensors*")], r"neither model\.safetensors nor"),
        (
            lambda f: (f / "model-00002-of-00003.safetensors").rename(f / "model-2.safetensors"),
            "the files were renamed or not all fetched",
        ),
        (
            lambda f: (f / "model-00002-of-00003.safetensors").write_bytes(
                (f / "model-00002-of-00003.safetensors").read_bytes()[:-100]
            ),
            "is cut off",
        ),
        (
            lambda f: shutil.copyfile(f / "model-00001-of-00003.safetensors", f / "model-00002-of-00003.safetensors"),
            "the files were mixed up",
        ),
    ],
)
def test_broken_base_files_are_one_sentence(run, breaks, message):
    breaks(model_of(run))
    with pytest.raises(UserError, match=message):
        export(run)
    assert exports(run) == []


def test_a_hub_model_is_taken_from_the_cache_and_what_it_lacks_is_told(run, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--org--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    shutil.copytree(model_of(run), cached / "snapshots" / "abc")
    assert base_folder("org/tiny", None) == cached / "snapshots" / "abc"
    (cached / "snapshots" / "abc" / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"is not whole in the cache and cannot be fetched: .* lacks model-00003"):
        base_folder("org/tiny", None)


def test_another_base_than_the_run_s_is_one_sentence(run):
    shutil.rmtree(model_of(run))
    save_model("llama", model_of(run), intermediate_size=192)
    with pytest.raises(UserError, match=r"was trained on other weights than the recipe.s model has"):
        export(run)
    shutil.rmtree(model_of(run))
    save_model("llama", model_of(run))
    change_tensors(model_of(run), lambda tensors: {name.replace("layers", "blocks"): t for name, t in tensors.items()})
    with pytest.raises(UserError, match=r"was trained on other weights than the recipe.s model has"):
        export(run)


def test_a_broken_adapter_is_one_sentence(run):
    file = run.path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"adapter is damaged: adapter_model.safetensors has .* bytes"):
        Export(run, ExportOptions()).make()
    (run.path / "adapter" / "hashes.json").unlink()  # as of a run of before
    with pytest.raises(UserError, match=r"cannot be read .*take a checkpoint"):
        export(run)


def test_only_an_older_export_is_replaced(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"is not empty and holds no export \(thesis.txt\)"):
        Export(run, ExportOptions(output=tmp_path / "mine"))
    with pytest.raises(UserError, match="is a file"):
        Export(run, ExportOptions(output=tmp_path / "mine" / "thesis.txt"))
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        export(run, output=tmp_path / "empty")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"format": "mergd"}, "--format: got 'mergd'; give adapter, merged, gguf, ollama; did you mean 'merged'?"),
        ({"onto": "nf4"}, "--onto: got 'nf4'; give quantized, original"),
        ({"dtype": "fp8"}, "--dtype: got 'fp8'"),
        ({"format": "gguf", "quantize": "q5"}, "--quantize: got 'q5'"),
        ({"format": "adapter", "dtype": "float16"}, "--dtype has no meaning with --format adapter"),
        ({"format": "gguf", "dtype": "float16"}, "a GGUF's numbers are chosen with --quantize"),
        ({"format": "adapter", "onto": "original"}, "--onto has no meaning"),
        ({"quantize": "q8_0"}, "--quantize has no meaning with --format merged"),
        ({"format": "gguf", "heads": True}, "a GGUF holds no value or score heads"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(run, given, message):
    with pytest.raises(UserError) as refused:
        Export(run, ExportOptions(**given))
    assert message in str(refused.value)


def test_a_classifier_is_already_a_model(run):
    data = {"train": "texts.jsonl", "text": "text", "label": "label"}
    recipe = {"name": "style", "algorithm": "classifier", "model": str(model_of(run)), "data": data}
    (run.path / "recipe.yaml").write_text(json.dumps(recipe))  # which is YAML, too
    with pytest.raises(UserError, match="trained a classifier whole"):
        Export(run, ExportOptions())


@pytest.mark.parametrize("format", ["merged", "adapter", "gguf", "ollama"])
def test_what_the_system_refuses_to_write_is_one_sentence_in_every_format(run, format):
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, before[1]))  # bytes of a file: for real, in every library
    try:
        with pytest.raises(RunError) as caught:
            export(run, format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = "cannot be written: the file would be larger than allowed; nothing was kept, raise the limit"
    assert said in str(caught.value) and "--output" in str(caught.value)
    assert exports(run) == []
