"""A tracker that fails is told nothing more; the run does not depend on it."""

import torch
from training_cases import recipe_of

from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.training.trackers import Trackers


def test_a_tracker_that_fails_is_said_once_and_told_nothing_more(model_folder, tmp_path, caplog):
    trackers = Trackers(torch.device("cpu"), recipe_of(model_folder), RunDirectory(tmp_path / "run"))
    trackers._failed, calls = False, []

    def fails(*args, **given):
        calls.append(args)
        raise ConnectionError("the tracker's host is away")

    trackers.accelerator.log = trackers.accelerator.end_training = fails
    trackers.log({"loss": 1.0}, 1)
    trackers.log({"loss": 1.0}, 2)
    trackers.end()
    assert len(calls) == 1 and caplog.text.count("the tracker's host is away") == 1
