"""The wheel carries recipes and profiles, and the package finds them without a checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "integration"))
from tiny_runs import save_tiny_chat_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = folder.glob("lowmem_rlhf-*.whl")
    return wheel


@pytest.fixture(scope="module")
def unpacked(wheel):
    folder = wheel.parent
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_recipe_and_profile(unpacked):
    for kind in ("recipes", "profiles"):
        shipped = {path.name for path in (unpacked / "lowmem_rlhf" / "_shipped" / kind).iterdir()}
        assert shipped == {path.name for path in (ROOT / kind).iterdir()}
    tested = unpacked / "lowmem_rlhf" / "_shipped" / "constraints.txt"
    assert tested.read_bytes() == (ROOT / "constraints.txt").read_bytes()
    assert not (unpacked / "tests").exists()


def test_the_wheel_holds_the_page_with_the_charting_library_and_its_licence(unpacked):
    assets = Path("lowmem_rlhf", "page", "assets")
    shipped, ours = ({path.relative_to(top / assets) for path in (top / assets).rglob("*")} for top in (unpacked, ROOT))
    assert shipped == ours and {Path("uplot/LICENSE"), Path("page.js")} < shipped


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


@pytest.fixture(scope="module")
def clean_python(wheel, tmp_path_factory):
    """Return the interpreter of a new environment with the wheel; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (site,) = {path.resolve() for path in folder.glob("[Ll]ib*/**/site-packages")}
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for place in dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")):
        with (site / "dependencies.pth").open("a", encoding="utf-8") as file:
            file.write(f"{place}\n")  # what editable installs add there is not followed from here
    return next(path for path in (folder / "bin" / "python", folder / "Scripts" / "python.exe") if path.exists())


def test_the_script_of_the_readme_runs_on_the_installed_wheel(clean_python, tmp_path):
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## From Python")[1]
    script = section.split("```python\n")[1].split("```")[0]
    assert len([line for line in script.splitlines() if line.strip()]) <= 12
    small = [f"model={save_tiny_chat_model(tmp_path / 'tiny')}", "training.max_steps=2", "data.eval_size=4"]
    assert '["training.max_steps=2"]' in script
    script = script.replace('["training.max_steps=2"]', repr(small))
    script += "import json; print(json.dumps([lm.__file__, len(run.metrics()), run.recipe.rewards[0].function]))\n"
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    command = [str(clean_python), "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr
    file, steps, reward = json.loads(result.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(clean_python.parents[1]) and (steps, reward) == (2, "python:has_answer")
    assert (tmp_path / "runs" / "quickstart" / "export" / "merged" / "model.safetensors").is_file()
