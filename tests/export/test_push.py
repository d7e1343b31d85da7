"""Pushing an export to a Hub on this machine, by LFS and by xet; and what is said when it cannot be done."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as constants
import pytest
from hub_stand_in import Hub

from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.export.push import check_push, push

TOKEN = "hf_" + "x" * 30


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """Return a Hub that huggingface_hub asks in this process; files go by LFS."""
    served = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield served
    served.close()


@pytest.fixture
def export(tmp_path) -> Path:
    """Return a folder as an export leaves it: a card, a picture, weights in shards, a folder inside."""
    folder = tmp_path / "export"
    (folder / "critic").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: unknown\n---\n\n# tiny\n", encoding="utf-8")
    (folder / "curve.png").write_bytes(b"\x89PNG" + os.urandom(500))
    for number in (1, 2):
        (folder / f"model-0000{number}-of-00002.safetensors").write_bytes(os.urandom(70_000 * number))
    (folder / "critic" / "head.safetensors").write_bytes(os.urandom(99))
    (folder / "config.json").write_text('{"model_type": "llama", "name": "größe"}', encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_file_arrives_as_it_is_in_a_private_repository(hub, export):
    address = push(export, "me/tiny")
    assert address == f"{hub.url}/me/tiny"
    assert hub.repos["me/tiny"]["visibility"] == "private"
    assert hub.files() == contents(export)
    assert set(hub.oids()) == {name for name in contents(export) if name.endswith((".safetensors", ".png"))}
    assert len(hub.commits) == 1
    api = [call for call in hub.calls if call[1].startswith("/api/models/") or "/info/lfs/" in call[1]]
    assert api and all(authorization == f"Bearer {TOKEN}" for _, _, authorization in api)


def test_a_name_without_an_owner_is_the_account_s_own(hub, export):
    assert push(export, "tiny", private=False) == f"{hub.url}/me/tiny"
    assert hub.repos["me/tiny"]["visibility"] == "public"
    assert all("/me/tiny/" in path for _, path, _ in hub.calls if path.startswith("/api/models/"))


def test_a_repository_that_is_there_is_written_to(hub, export):
    push(export, "me/tiny")
    (export / "config.json").write_text("{}")
    push(export, "me/tiny", private=False)
    assert len(hub.commits) == 2 and hub.files()["config.json"] == b"{}"
    assert hub.repos["me/tiny"]["visibility"] == "private"


@pytest.mark.parametrize(
    ("refused", "status", "kind", "parts"),
    [
        ("/api/repos/create", 401, UserError, ["does not know the token", "hf auth login"]),
        ("/api/repos/create", 500, RunError, ["the Hub failed (500", "hf upload me/tiny"]),
        ("/api/repos/create", 400, UserError, ["refuses it (400", "OWNER/NAME"]),
        ("/preupload/", 403, UserError, ["may not write there", "write access"]),
        ("/preupload/", 404, UserError, ["refuses it (404"]),
        ("/objects/batch", 403, UserError, ["may not write there"]),
        ("/commit/", 403, UserError, ["may not write there"]),
        ("/commit/", 500, RunError, ["the Hub failed (500", "is whole"]),
    ],
)
def test_a_refusal_is_one_clear_sentence(hub, export, refused, status, kind, parts):
    hub.refuse[refused] = (status, "because of the moon")
    with pytest.raises(kind) as caught:
        push(export, "me/tiny")
    message = str(caught.value)
    assert type(caught.value) is kind and "\n" not in message
    assert "because of the moon" in message and "--push me/tiny" in message
    assert all(part in message for part in parts), message
    assert TOKEN not in message
    assert not hub.commits


def test_forbidden_to_make_a_repository(hub, export):
    hub.refuse = {"/api/repos/create": (403, "no"), "/api/models/other/tiny": (404, "gone")}
    with pytest.raises(UserError, match="may not write there"):
        push(export, "other/tiny")


def test_a_hub_that_cannot_be_reached_is_said(hub, export, monkeypatch):
    hub.close()
    with pytest.raises(RunError) as caught:
        push(export, "me/tiny")
    assert f"{hub.url} cannot be reached" in str(caught.value)
    assert f"hf upload me/tiny {export}" in str(caught.value)


@pytest.mark.parametrize("repo", ["", "a/b/c", "me/ti ny", "me/-tiny", "../tiny", "me/" + "x" * 100])
def test_bad_names_are_refused_before_anything_is_asked(hub, export, repo):
    with pytest.raises(UserError, match="names no repository"):
        push(export, repo)
    assert not hub.calls


def test_without_a_token_nothing_is_asked(hub, export, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for work in (lambda: check_push("me/tiny"), lambda: push(export, "me/tiny")):
        with pytest.raises(UserError, match="no token for the Hub; run `hf auth login`"):
            work()
    assert not hub.calls


def test_offline_is_said(hub, export, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push(export, "me/tiny")


def test_an_empty_export_is_refused(hub, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "gone"):
        with pytest.raises(UserError, match="there is no export in"):
            push(folder, "me/tiny")
    assert not hub.calls


def test_an_error_of_our_own_is_not_dressed_up(hub, export, monkeypatch):
    def broken(*arguments: object, **settings: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", broken)
    with pytest.raises(ZeroDivisionError):
        push(export, "me/tiny")


PROCESS = """
import sys
from pathlib import Path
from lowmem_rlhf.export.push import push
print(push(Path(sys.argv[1]), "me/tiny"))
"""
FETCH = """
import sys
import hf_xet
session = hf_xet.XetSession()
with session.new_file_download_group(endpoint=sys.argv[1]) as group:
    for source, target in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
        [info] = hf_xet.hash_files([source])
        group.start_download_file(hf_xet.XetFileInfo(info.hash, info.file_size), target)
"""


def test_a_fresh_process_sends_weights_by_xet(hub, export, tmp_path):
    """What people have: HF_ENDPOINT and HF_TOKEN in the environment, hf_xet installed; the store is a local folder."""
    pytest.importorskip("hf_xet")
    hub.cas = f"local://{tmp_path / 'cas'}"
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(export)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == f"{hub.url}/me/tiny"
    given = contents(export)
    arrived = hub.files()
    assert set(arrived) == set(given)
    assert not hub.objects  # nothing went by LFS
    for name, oid in hub.oids().items():
        assert oid == hashlib.sha256(given[name]).hexdigest()
    assert {n: c for n, c in arrived.items() if n not in hub.oids()} == {
        n: c for n, c in given.items() if n not in hub.oids()
    }
    pairs = [part for name in hub.oids() for part in (str(export / name), str(tmp_path / "back" / name))]
    command = [sys.executable, "-c", FETCH, hub.cas, *pairs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert contents(tmp_path / "back") == {name: given[name] for name in hub.oids()}
