import os

import pytest

from dbkernels.whole_file import whole_file, write_whole


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
    assert (name, size) == (f".a-{os.getpid()}", 5)
    assert (replace_event, directory) == ("replace", ".")


def test_a_directory_that_is_missing_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "none" / "a", "")
    assert not (tmp_path / "none").exists()
