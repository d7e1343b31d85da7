"""Two processes for the tests of a worker, and the runs of one process that they are compared with."""

import pytest
from process_cases import recipe_of
from process_pool import Processes
from tiny_runs import save_tiny_chat_model

from lowmem_rlhf.session.train import train


@pytest.fixture(scope="session")
def two():
    processes = Processes(2)
    yield processes
    processes.end()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_tiny_chat_model(tmp_path_factory.mktemp("processes") / "model")


@pytest.fixture(scope="session")
def alone(model, tmp_path_factory):
    """Return a function that gives a case's recipe and its run in this process, which is made once."""
    made = {}

    def run(case, **hardware):
        key = (case, *sorted(hardware.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("alone")
            judge = run("reward_model")[1].path if case == "reward_adapter" else None
            recipe = recipe_of(model, folder, case, judge, **hardware)
            made[key] = recipe, train(recipe, folder / "run")
        return made[key]

    return run
