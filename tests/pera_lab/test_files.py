"""Files and folders are replaced only by complete ones, and broken files are reported."""

import os
import stat

import pytest
from safetensors import SafetensorError

from pera.errors import UserError
from pera_lab.files import (
    Journal,
    atomic_folder,
    disk_errors,
    read_json,
    read_lines,
    require_free,
    write_atomic,
    write_json,
)


def begin(target, error):
    """Start to write a folder, and fail."""
    with atomic_folder(target) as partial:
        (partial / "file").touch()
        raise error


def test_a_folder_appears_when_its_content_is_complete(tmp_path):
    target = tmp_path / "a" / "b"
    with atomic_folder(target) as partial:
        (partial / "file").write_text("content")
        assert not target.exists()
        assert partial.parent == target.parent
    assert (target / "file").read_text() == "content"
    assert list(target.parent.iterdir()) == [target]


def test_an_empty_folder_is_replaced(tmp_path):
    target = tmp_path / "empty"
    target.mkdir()
    with atomic_folder(target) as partial:
        (partial / "file").touch()
    assert [path.name for path in target.iterdir()] == ["file"]


@pytest.mark.parametrize("there", [True, False])
def test_the_target_of_a_link_is_replaced(there, tmp_path):
    target = tmp_path / "disk" / "target"
    target.mkdir(parents=True)
    (tmp_path / "link").symlink_to(target)
    if not there:
        target.rmdir()
    with atomic_folder(tmp_path / "link") as partial:
        (partial / "file").touch()
        assert partial.parent == target.parent
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in target.iterdir()] == ["file"]


def test_a_mount_point_is_rejected_if_it_would_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "mounted")
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "mounted")
    for name in ("mounted", "link"):
        with pytest.raises(UserError, match=rf"{name}' is a mount point, .*; give a folder inside it\.$"):
            require_free(tmp_path / name)
        require_free(tmp_path / name, replaced=False)
    with atomic_folder(tmp_path / "mounted" / "inside"):
        pass


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt()])
def test_an_error_leaves_no_folder(tmp_path, error):
    with pytest.raises(type(error)):
        begin(tmp_path / "target", error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0: No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: No space left on device"),
    ],
)
def test_a_full_disk_leaves_no_folder_and_is_reported_in_one_sentence(tmp_path, error):
    target = tmp_path / "target"
    with pytest.raises(UserError) as caught:
        begin(target, error)
    message = str(caught.value)
    assert repr(str(target)) in message
    assert "No space left on device" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), disk_errors(tmp_path):
        raise RuntimeError("shapes differ")


def test_a_folder_with_content_is_rejected_and_kept(tmp_path):
    target = tmp_path / "full"
    target.mkdir()
    (target / "mine").write_text("mine")
    with pytest.raises(UserError, match=r"full.* exists and is not empty"), atomic_folder(target):
        pytest.fail("the block must not run")
    assert (target / "mine").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_is_rejected_as_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"'.*file' is a file"):
        require_free(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"), atomic_folder(tmp_path / "file" / "below"):
        pytest.fail("the block must not run")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_absent_or_empty_folder_is_free(tmp_path):
    require_free(tmp_path)
    require_free(tmp_path / "absent")


def test_a_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_atomic(file, "old")
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (seen.append(file.read_text()), replace(*paths)))
    write_atomic(file, "näh")
    assert seen == ["old"]
    assert file.read_bytes() == "näh".encode()
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_cannot_be_replaced_is_kept(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_atomic(file, "old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=r"'.*file' cannot be written: No space left on device"):
        write_atomic(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_new_files_have_the_permissions_of_any_other_file(tmp_path):
    (tmp_path / "ordinary").touch()
    (tmp_path / "ordinary folder").mkdir()
    write_atomic(tmp_path / "file", "text")
    with atomic_folder(tmp_path / "folder") as partial:
        (partial / "private").touch(mode=0o600)  # as safetensors creates its files

    def mode(name):
        return stat.filemode((tmp_path / name).stat().st_mode)

    assert mode("file") == mode("folder/private") == mode("ordinary") == "-rw-r--r--"
    assert mode("folder") == mode("ordinary folder")


def test_lines_after_a_broken_one_are_not_read(tmp_path):
    file = tmp_path / "lines.jsonl"
    assert read_lines(file) == []
    file.write_text('{"a": 1}\n[5]\n{"b": 2}\n{"c": 3, "d\n{"e": 4}\n{"f": 5}\n')
    assert read_lines(file) == [{"a": 1}, {"b": 2}]


def test_a_journal_ignores_lines_that_are_not_results(tmp_path):
    Journal(tmp_path / "a", {"x": 1}).add({0: {"y": 2}})
    with (tmp_path / "a").open("a") as file:
        file.write('{}\n{"index": 1}\n')
    assert Journal(tmp_path / "a", {"x": 1}).found == {0: {"y": 2}}


def test_a_journal_without_results_is_removed_if_the_work_is_refused(tmp_path):
    with pytest.raises(UserError), Journal(tmp_path / "new" / "a", {}):
        raise UserError("refused")
    assert not (tmp_path / "new").exists()
    journal = Journal(tmp_path / "new" / "a", {})
    journal.add({0: {"y": 2}})
    with pytest.raises(UserError), journal:
        raise UserError("refused")
    assert Journal(tmp_path / "new" / "a", {}).found == {0: {"y": 2}}


def test_a_pipe_in_the_place_of_a_json_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(UserError, match="is a pipe, not a file"):
        read_json(tmp_path / "a.json")


def test_json_is_read_as_it_was_written(tmp_path):
    value = {"a": [1, 2.5, None, "ü"]}
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == value


def test_missing_or_truncated_json_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"'.*none\.json' cannot be read: No such file or directory"):
        read_json(tmp_path / "none.json")
    for content in (b'{"a": 1', b"", b"\xff\xfe"):
        (tmp_path / "cut.json").write_bytes(content)
        with pytest.raises(UserError, match=r"'.*cut\.json' is not valid JSON"):
            read_json(tmp_path / "cut.json")


def test_deeply_nested_json_is_an_error_and_ends_a_journal(tmp_path):
    file, deep = tmp_path / "scores.json", "[" * 100_000
    file.write_text(deep)
    with pytest.raises(UserError, match=r"scores\.json' is not valid JSON \(it is nested too deeply"):
        read_json(file)
    file.write_text(f'{{"step": 1}}\n{deep}\n{{"step": 2}}\n')
    assert read_lines(file) == [{"step": 1}]
