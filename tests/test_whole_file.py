import ast
import errno
import os
import re
from pathlib import Path

import pytest

from dbkernels.whole_file import make_directory, new_file, whole_file, write_whole

PACKAGE = Path(__file__).parents[1] / "dbkernels"


def test_a_file_has_all_or_what_it_had(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "old é\n")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"half of the n")
        file.flush()
        assert path.read_text(encoding="utf-8") == "old é\n"
        raise KeyboardInterrupt
    assert path.read_bytes() == "old é\n".encode() and os.listdir(tmp_path) == ["a.txt"]
    with whole_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_file_is_durable_before_it_has_its_name_and_so_is_the_name(tmp_path, monkeypatch):
    events, replace = [], os.replace

    def replaced(source, target):
        events.append("replace")
        replace(source, target)

    def synced(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        events.append((os.path.relpath(path, tmp_path), os.path.getsize(path)))

    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "fsync", synced)
    write_whole(tmp_path / "a", "12345")
    (name, size), replace_event, (directory, _) = events
    assert size == 5 and re.fullmatch(r"\.a-[0-9a-f]{16}", name)
    assert (replace_event, directory) == ("replace", ".")


def test_a_directory_that_is_missing_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "none" / "a", "")
    assert not (tmp_path / "none").exists()


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    "fails", ["", "os.fsync", "os.replace", "dbkernels.whole_file.make_durable"]
)
def test_an_error_at_any_point_leaves_no_temporary_file(tmp_path, monkeypatch, fails):
    write_whole(tmp_path / "a", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails:
        monkeypatch.setattr(fails, full)
    with pytest.raises(OSError, match="No space"), whole_file(tmp_path / "a") as file:
        file.write(b"new")
        if not fails:
            full()
    assert names(tmp_path) == ["a"]
    # it has its name by the time its directory is written
    assert (tmp_path / "a").read_bytes() == (b"new" if "durable" in fails else b"old")


def test_files_of_the_user_are_safe_whatever_their_names(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "a").symlink_to("mine")
    others = [f".a-{os.getpid()}", ".a", "a.tmp", ".a.tmp", ".a-0123456789abcdef"]
    for name in others:
        (tmp_path / name).symlink_to("mine")
    write_whole(tmp_path / "a", "new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "a").is_symlink() and (tmp_path / "a").read_text() == "new"
    # and where chance has it that the name is there
    monkeypatch.setattr("secrets.token_hex", lambda count: "0123456789abcdef")
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "a", "newer")
    assert names(tmp_path) == sorted(["a", "mine", *others])
    assert (tmp_path / "mine").read_text() == "mine"


def test_temporary_names_are_never_the_same_and_fit_where_the_name_does(tmp_path, monkeypatch):
    seen, replace = set(), os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: seen.add(a.name) or replace(a, b))
    for name in ("a", "x" * 255, "é" * 127):
        for _ in range(20):
            write_whole(tmp_path / name, "text")
    assert len(seen) == 60


@pytest.mark.parametrize("make", [Path.write_text, Path.symlink_to])
def test_a_new_file_is_new(tmp_path, make):
    make(tmp_path / "a", "nothing")
    with pytest.raises(FileExistsError):
        new_file(tmp_path / "a")


def test_a_directory_and_those_above_it_are_made_and_durable(tmp_path, monkeypatch):
    events, mkdir = [], os.mkdir

    def made(path, *args, **options):
        events.append(f"make {os.path.relpath(path, tmp_path)}")
        mkdir(path, *args, **options)

    def synced(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        events.append(f"sync {os.path.relpath(path, tmp_path)}")

    monkeypatch.setattr(os, "mkdir", made)
    monkeypatch.setattr(os, "fsync", synced)
    make_directory(tmp_path / "a/b/c")
    assert events == ["make a", "sync .", "make a/b", "sync a", "make a/b/c", "sync a/b"]
    make_directory(tmp_path / "a/b")
    assert len(events) == 6
    (tmp_path / "file").write_text("")
    for path in ("file", "file/a", "file/a/b"):
        with pytest.raises(NotADirectoryError):
            make_directory(tmp_path / path)


# whatever else writes


WRITE = {"write_bytes", "write_text", "mkstemp", "NamedTemporaryFile", "touch"}


def writers(tree):
    """Calls that make or open a file for writing: line and name of each."""
    for node in filter(lambda node: isinstance(node, ast.Call), ast.walk(tree)):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        texts = [str(value.value) for value in values if isinstance(value, ast.Constant)]
        writes = any(re.fullmatch("[rwaxbt+]{1,3}", t) and set(t) & set("wax+") for t in texts)
        opens = name in ("open", "fdopen") and (writes or "O_CREAT" in ast.unparse(node))
        if name in WRITE or opens:
            yield node.lineno, name


def test_files_are_written_by_this_room_alone():
    found = {
        (str(path.relative_to(PACKAGE)), name)
        for path in PACKAGE.rglob("*.py")
        for _, name in writers(ast.parse(path.read_text()))
    }
    # the log is appended to, under the lock of its run
    assert found == {("whole_file.py", "fdopen"), ("training/log.py", "open")}


@pytest.mark.parametrize(
    "text",
    [
        "open(p, 'w')",
        "p.open('ab')",
        "p.write_text(t)",
        "os.open(p, os.O_CREAT)",
        "io.open(p, mode='x')",
    ],
)
def test_a_writer_is_found(text):
    assert len(list(writers(ast.parse(text)))) == 1
