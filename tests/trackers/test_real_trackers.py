"""What trackers are told of a run that is resumed, read back from the real packages; each where it is installed."""

import importlib.metadata
import json
import struct
from collections.abc import Iterator

import pytest
from packaging.version import Version
from tiny_runs import save_tiny_model, tiny_recipe

from lowmem_rlhf.session.train import train

pytestmark = pytest.mark.long
NAMES = ("tensorboard", "wandb", "trackio", "mlflow")
PACKAGES = {"mlflow": ("mlflow", "mlflow-skinny")}
PROJECT = "told"  # of no other test
OLDEST_TRACKIO = Version("0.43.0")  # as in pyproject.toml; the first ones knew no steps and no resumed runs


def is_installed(name: str) -> bool:
    for package in PACKAGES.get(name, (name,)):
        try:
            found = Version(importlib.metadata.version(package))
            return name != "trackio" or found >= OLDEST_TRACKIO
        except importlib.metadata.PackageNotFoundError:
            pass
    return False


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Return a run of three steps, told to all trackers there are, resumed for two more; and where MLflow's is."""
    folder = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(folder / "no-netrc"))
        patch.setenv("MLFLOW_TRACKING_URI", (folder / "mlruns").as_uri())
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        model = save_tiny_model(folder / "model")
        names = [name for name in NAMES if is_installed(name)]
        for steps, resume in ((3, False), (5, True)):
            training = {"max_steps": steps, "report_to": names}
            recipe = tiny_recipe(model, name=PROJECT, training=training, evaluation={"steps": 2})
            run = train(recipe, folder / "runs" / "first", resume=resume)
        yield run


def expected(run) -> dict[tuple[str, int], float]:
    """Return some of what a tracker must have, by name and step."""
    values = {(name, row["step"]): row[name] for row in run.metrics() for name in ("loss", "reward/mean", "kl")}
    evaluation = run.evaluation()
    rows = [evaluation["before"], *evaluation["during"], evaluation["after"]]
    return values | {("eval/reward/mean", row["step"]): row["reward/mean"] for row in rows}


def assert_told(run, found: dict[tuple[str, int], list[float]]):
    """Check that every value is there once, at its step."""
    want = expected(run)
    assert {step for name, step in want if name == "loss"} == {1, 2, 3, 4, 5}
    assert {step for name, step in want if name.startswith("eval/")} == {0, 2, 4, 5}
    for key, value in want.items():
        assert found.get(key) == pytest.approx([value], rel=1e-6), key  # TensorBoard's are of 32 bits


def wanted(name: str) -> None:
    if not is_installed(name):
        pytest.skip(f"{name} is not installed")


def test_tensorboard(reported):
    wanted("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = reported.path / "tensorboard"
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    found: dict[tuple[str, int], list[float]] = {}
    for tag in events.Tags()["scalars"]:
        for one in events.Scalars(tag):
            found.setdefault((tag, one.step), []).append(one.value)
    assert_told(reported, found)
    told = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "num_generations: 4" in told and "micro_batch_tokens: 96" in told


def records_of(log: bytes) -> Iterator[bytes]:
    """Yield the records of W&B's transaction log: LevelDB's format of 32 KiB blocks, after a header of 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", log[at + 4 : at + 7])
        parts, at = parts + log[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield parts
            parts = b""


def test_wandb(reported):
    """Both parts of the run lie in its own folder, under one id, and nothing was sent."""
    wanted("wandb")
    from wandb.proto import wandb_internal_pb2

    files = sorted(reported.path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    found: dict[tuple[str, int], list[float]] = {}
    ids, config = set(), {}
    for file in files:
        for data in records_of(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add((record.run.project, record.run.run_id))
                config |= {one.key: json.loads(one.value_json) for one in record.run.config.update}
            config |= {one.key: json.loads(one.value_json) for one in record.config.update}
            values = {"/".join(one.nested_key) or one.key: one.value_json for one in record.history.item}
            for key, value in values.items():
                found.setdefault((key, record.history.step.num), []).append(json.loads(value))
    assert_told(reported, found)
    assert len(ids) == 1 and next(iter(ids))[0] == PROJECT
    assert config["generation.num_generations"] == 4 and config["training.max_steps"] == 5


def test_trackio(reported):
    wanted("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs(PROJECT)
    found: dict[tuple[str, int], list[float]] = {}
    for row in SQLiteStorage.get_logs(PROJECT, name):
        for key, value in row.items():
            found.setdefault((key, row["step"]), []).append(value)
    assert_told(reported, found)
    assert SQLiteStorage.get_run_config(PROJECT, name)["generation.num_generations"] == 4


def test_mlflow(reported):
    wanted("mlflow")
    from mlflow.tracking import MlflowClient

    client = MlflowClient((reported.path.parents[1] / "mlruns").as_uri())
    experiment = client.get_experiment_by_name(PROJECT)
    (run,) = client.search_runs([experiment.experiment_id])
    found: dict[tuple[str, int], list[float]] = {}
    for name in run.data.metrics:
        for one in client.get_metric_history(run.info.run_id, name):
            found.setdefault((name, one.step), []).append(one.value)
    assert_told(reported, found)
    assert run.data.params["generation.num_generations"] == "4" and run.info.status == "FINISHED"
