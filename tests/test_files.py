"""Files appear whole or not at all, and what a disk refuses is told before any work."""

from __future__ import annotations

import pytest

from pocktvm import files
from pocktvm.errors import PockError
from pocktvm.files import check_file, check_folder, replacing_file, replacing_folder, write_whole


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "old", "it")
    full = pytest.raises(PockError, match=r"cannot write it to .*a.txt: the disk is full")
    with full, replacing_file(path, "it") as part:
        part.write_text("half")
        raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "old"


def test_places_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").touch()
    cases = {
        tmp_path / "none" / "a.txt": "no folder .*none to write a.txt",
        tmp_path: "is a folder; a thing is a file",
    }
    for path, message in cases.items():
        with pytest.raises(PockError, match=message):
            check_file(path, "a thing")
    with pytest.raises(PockError, match="is a file; -o names"):
        check_folder(tmp_path / "file")
    with pytest.raises(PockError, match="holds other files"):
        check_folder(tmp_path)
    check_file(tmp_path / "a.txt", "a thing")
    check_folder(tmp_path / "new" / "er")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_artifact_keeps_the_users_files_when_it_is_replaced(tmp_path):
    out = tmp_path / "artifact"
    for text in ("one", "two"):
        with replacing_folder(out) as fresh:
            (fresh / "manifest.json").write_text('{"files": {"model.so": {}}}')
            (fresh / "model.so").write_text(text)
        (out / "user.safetensors").touch()
    assert {p.name for p in out.iterdir()} == {"manifest.json", "model.so", "user.safetensors"}
    assert (out / "model.so").read_text() == "two" and len(list(tmp_path.iterdir())) == 1


def test_a_cache_that_cannot_be_made_is_among_the_temporary_files(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("POCKTVM_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    assert files.cache_dir().parent == tmp_path and files.cache_dir().is_dir()
