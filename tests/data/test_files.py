import errno
import os
from pathlib import Path

import pytest

from edgeattn.data.files import atomic_file, atomic_folder
from edgeattn.errors import DeviceError, UsageError


def test_folder_appears_complete_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "whole").read_text() == "x" and len(list(tmp_path.iterdir())) == 1


def test_existing_output_is_kept_unless_asked(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with (
        pytest.raises(UsageError, match="exists; choose another folder, or pass --overwrite"),
        atomic_folder(tmp_path / "out"),
    ):
        pass
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out", overwrite=True):
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "old").exists(), "an interrupted overwrite leaves the old one"
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"] and len(list(tmp_path.iterdir())) == 1


def test_file_as_output_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(UsageError, match="is a file"), atomic_folder(tmp_path / "out", overwrite=True):
        pass


@pytest.mark.parametrize("code, said", [(errno.ENOSPC, "no space left"), (errno.EACCES, "cannot write")])
def test_operating_system_refusals_say_what_to_do(tmp_path, code, said):
    for context in (atomic_file, atomic_folder):
        with pytest.raises(DeviceError, match=said), context(tmp_path / "out"):
            raise OSError(code, os.strerror(code))
    assert list(tmp_path.iterdir()) == []


def test_a_real_full_disk(tmp_path):
    with pytest.raises(DeviceError, match="no space left"), atomic_file(tmp_path / "out"):
        Path("/dev/full").write_text("x")
    assert list(tmp_path.iterdir()) == []
