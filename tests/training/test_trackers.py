"""A tracker that fails is told nothing more; the run and its other trackers do not depend on it."""

import sys
from typing import Any

import pytest
import torch
from training_cases import recipe_of

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.session.train import _check_trackers
from lowmem_rlhf.training import trackers
from lowmem_rlhf.training.trackers import Trackers


class Told:
    """A tracker that notes what it is told, and fails at a step."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at, self.steps, self.ended = fails_at, [], False

    def log(self, values: dict[str, Any], step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("the tracker's host is away")
        self.steps.append(step)

    def finish(self) -> None:
        self.ended = True


def opened(model_folder, tmp_path, monkeypatch, **found: Any) -> Trackers:
    """Return the trackers of a run that begins, each as given; an error in place of one is raised."""

    def opening(one: Any) -> Any:
        def open(recipe, run, step):
            if isinstance(one, Exception):
                raise one
            return one

        return open

    monkeypatch.setattr(trackers, "_OPEN", {name: opening(one) for name, one in found.items()})
    recipe = recipe_of(model_folder, training={"report_to": list(found)})
    made = Trackers(torch.device("cpu"), recipe, RunDirectory(tmp_path / "run"))
    made.begin(0)
    return made


def test_a_tracker_that_fails_is_said_once_and_told_nothing_more(model_folder, tmp_path, monkeypatch, caplog):
    bad, good = Told(fails_at=2), Told()
    made = opened(model_folder, tmp_path, monkeypatch, wandb=bad, tensorboard=good)
    for step in (1, 2, 3):
        made.log({"loss": 1.0}, step)
    made.end()
    assert bad.steps == [1] and not bad.ended
    assert good.steps == [1, 2, 3] and good.ended
    assert caplog.text.count("wandb failed and is told nothing more: the tracker's host is away") == 1


def test_a_tracker_that_cannot_be_opened_is_said_and_the_others_are_told(model_folder, tmp_path, monkeypatch, caplog):
    good = Told()
    made = opened(model_folder, tmp_path, monkeypatch, mlflow=OSError("no store"), tensorboard=good)
    made.log({"loss": 1.0}, 1)
    made.end()
    assert good.steps == [1] and caplog.text.count("mlflow failed and is told nothing more: no store") == 1


def test_only_finite_numbers_are_told(model_folder, tmp_path, monkeypatch):
    good, told = Told(), []
    good.log = lambda values, step: told.append((values, step))
    made = opened(model_folder, tmp_path, monkeypatch, tensorboard=good)
    made.log({"step": 4, "loss": 0.5, "kl": None, "eval/headline": "accuracy", "grad_norm": float("nan")}, 4)
    assert told == [({"loss": 0.5}, 4)]


def test_names_are_written_as_mlflow_takes_them():
    assert trackers._for_mlflow({"reward/my_rewards.py:short": 1.0, "pass@8": 0.5}) == {
        "reward/my_rewards.py:short": 1.0,
        "pass_8": 0.5,
    }


@pytest.mark.parametrize(
    ("settings", "environment", "offline"),
    [
        ({}, {}, True),
        ({"api_key": "from-the-settings"}, {}, False),
        ({}, {"WANDB_API_KEY": "x" * 40}, False),
        ({}, {"WANDB_MODE": "online"}, False),
    ],
)
def test_wandb_is_offline_unless_the_user_has_logged_in_or_says_otherwise(
    tmp_path, monkeypatch, settings, environment, offline
):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine other.example login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    class Settings:
        base_url, api_key = "https://api.wandb.ai", settings.get("api_key")

    assert trackers._is_offline(Settings()) is offline
    netrc.write_text("machine api.wandb.ai login me password secret\n")
    assert trackers._is_offline(Settings()) is False


def test_a_folder_that_a_tracker_left_is_no_package(model_folder, tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="wandb is not installed; pip install wandb"):
        _check_trackers(recipe_of(model_folder, training={"report_to": ["wandb"]}))
