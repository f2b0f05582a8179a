"""Files and folders are replaced only by complete ones, and broken files are reported."""

import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from pera.errors import UserError
from pera_lab.files import (
    InUse,
    Journal,
    atomic_folder,
    check_journal,
    check_output,
    disk_errors,
    locked,
    read_json,
    read_lines,
    require_free,
    reserved,
    updated_object,
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


FORK = multiprocessing.get_context("fork")


@pytest.fixture
def killed_while():
    """Runs a function that kills its own process, in another process."""

    def kill(function, *arguments):
        process = FORK.Process(target=function, args=arguments)
        process.start()
        process.join(10)
        assert process.exitcode == -signal.SIGKILL

    return kill


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_writing_folder(target):
    with reserved(target), atomic_folder(target) as partial:
        (partial / "weights").write_text("half")
        die()


def die_writing_file(file):
    os.replace = lambda *_: die()
    write_atomic(file, "new")


def die_updating(file):
    os.replace = lambda *_: die()
    with updated_object(file) as content:
        content["a"] = 1


def test_a_lock_is_refused_to_another_process_and_leaves_no_file(tmp_path):
    lock, ready = tmp_path / ".lock", FORK.Event()

    def hold():
        with locked(lock, tmp_path):
            ready.set()
            time.sleep(60)

    process = FORK.Process(target=hold)
    process.start()
    ready.wait(10)
    with pytest.raises(InUse, match=rf"^{str(tmp_path)!r} is in use by another process; "), locked(lock, tmp_path):
        pytest.fail("the block must not run")
    process.kill()
    process.join()
    with locked(lock, tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_processes_that_wait_for_a_lock_lose_no_update(tmp_path):
    """The holder removes the lock file, so a waiting process may have opened a removed one."""
    file = tmp_path / "scores.json"

    def update(worker):
        for i in range(50):
            with updated_object(file) as scores:
                scores[f"{worker}-{i}"] = i

    processes = [FORK.Process(target=update, args=(worker,)) for worker in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(read_json(file)) == 200
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", ["model", "m" * 250, "ü" * 125])
def test_what_a_killed_process_left_of_a_folder_is_removed_by_the_next(name, killed_while, tmp_path):
    own = tmp_path / "model.partial-0badcafe"  # a folder of the user
    own.mkdir()
    killed_while(die_writing_folder, tmp_path / name)
    assert len(list(tmp_path.rglob("weights"))) == 1
    with reserved(tmp_path / name), atomic_folder(tmp_path / name) as partial:
        (partial / "file").touch()
    assert set(tmp_path.rglob("*")) == {own, tmp_path / name, tmp_path / name / "file"}


def test_a_folder_that_another_process_writes_is_refused(tmp_path):
    ready = FORK.Event()

    def write():
        with reserved(tmp_path / "model"), atomic_folder(tmp_path / "model"):
            ready.set()
            time.sleep(60)

    process = FORK.Process(target=write)
    process.start()
    ready.wait(10)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(InUse, match="in use"), reserved(tmp_path / "model"):
        pytest.fail("the block must not run")
    assert set(tmp_path.rglob("*")) == before
    process.kill()
    process.join()


@pytest.mark.parametrize("write", [die_writing_file, die_updating])
def test_what_a_killed_process_left_of_a_file_is_removed_by_the_next(write, killed_while, tmp_path):
    file = tmp_path / "file"
    own = tmp_path / ".file.0badcafe"
    write_json(file, {})
    own.touch()
    killed_while(write, file)
    assert read_json(file) == {}
    assert len(list(tmp_path.iterdir())) > 2
    write_json(file, {"b": 2})
    assert set(tmp_path.iterdir()) == {file, own}


def test_parents_of_a_reserved_place_are_removed_if_nothing_was_written(tmp_path):
    with pytest.raises(KeyError), reserved(tmp_path / "a" / "b" / "c"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with reserved(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b").mkdir()
    assert list(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "b"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("n" * 256, "File name too long"),
        ("a\0b", "null"),
        ("file/below", "Not a directory"),
        ("loop", "symbolic links"),
        ("/proc/x/y", "No such file or directory"),
    ],
)
def test_a_place_where_nothing_can_be_written_is_refused(name, reason, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=rf"^output: .* cannot be written: .*{reason}"), reserved(tmp_path / name):
        pytest.fail("the block must not run")
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        check_output(tmp_path / "file")


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^output: '\.' is the current folder; give a folder inside it\.$"):
        require_free(Path())
    require_free(Path(), replaced=False)


def test_a_file_of_the_user_is_not_taken_for_a_journal(tmp_path):
    for content in ('{"mine": 1}\n', "mine", '{"key": 1, "mine": 2}\n'):
        (tmp_path / "mine.partial").write_text(content)
        with pytest.raises(UserError, match=r"mine\.partial' exists and was not written by pera"):
            Journal(tmp_path / "mine.partial", {})
        assert (tmp_path / "mine.partial").read_text() == content
    Journal(tmp_path / "other.partial", {"a": 1})
    check_journal(tmp_path / "other.partial")


@pytest.fixture
def full_disk(tmp_path):
    """A folder on a disk of one megabyte of which 64 kilobytes are free."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs the right to mount")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False).returncode:
        pytest.skip("needs the right to mount")
    (folder / "filling").write_bytes(bytes(960 * 1024))
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_named_and_keeps_only_what_was_there(full_disk):
    write_json(full_disk / "file", {"a": 1})
    before = {path: path.read_bytes() for path in full_disk.rglob("*")}

    def folder():
        with reserved(full_disk / "model"), atomic_folder(full_disk / "model") as partial:
            (partial / "weights").write_bytes(bytes(10**6))

    def update():
        with updated_object(full_disk / "file") as content:
            content["b"] = "b" * 10**6

    def journal():
        Journal(full_disk / "journal", {}).add({0: {"answer": "a" * 10**6}})

    for write in (folder, update, lambda: write_atomic(full_disk / "file", bytes(10**6))):
        with pytest.raises(UserError, match=r"^output: .* cannot be written: No space left on device"):
            write()
        assert {path: path.read_bytes() for path in full_disk.rglob("*")} == before
    with pytest.raises(UserError, match="No space left on device"):
        journal()
