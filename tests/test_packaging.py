"""The wheel carries recipes and profiles, and the package finds them without a checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = folder.glob("lowmem_rlhf-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_recipe_and_profile(unpacked):
    for kind in ("recipes", "profiles"):
        shipped = {path.name for path in (unpacked / "lowmem_rlhf" / "_shipped" / kind).iterdir()}
        assert shipped == {path.name for path in (ROOT / kind).iterdir()}
    assert not (unpacked / "tests").exists()


def test_the_installed_package_finds_its_recipes_outside_the_checkout(unpacked, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "from lowmem_rlhf.resources import shipped; assert '_shipped' in str(shipped('recipes'))\n"
        "from lowmem_rlhf.cli import main; main()"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for arguments, expected in ((["recipes"], "quickstart"), (["profiles"], "rtx-2080-ti")):
        command = [sys.executable, "-c", code, str(unpacked), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
        assert result.returncode == 0, result.stderr
        assert expected in result.stdout
