"""Where a command may write, said before its work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvasir.cli.files import check_folder, check_writable, write
from kvasir.core.errors import ConfigError


def test_new_and_old_files_may_be_written(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text("x")
    check_writable(None, tmp_path / "new", old, Path("/dev/null"), reads=(None, "synthetic:conversation", str(tmp_path)))
    check_folder(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_missing_permission_is_said(tmp_path: Path) -> None:
    (tmp_path / "old").touch(0o400)
    tmp_path.chmod(0o500)
    for name in ("old", "new"):
        with pytest.raises(ConfigError, match="permission denied"):
            check_writable(tmp_path / name)


def test_what_is_asked_of_the_system_is_the_file_or_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    check_writable(tmp_path / "old")
    with pytest.raises(ConfigError, match=f"cannot write {tmp_path}/new: permission denied"):
        check_writable(tmp_path / "new")
    with pytest.raises(ConfigError, match=f"cannot write {tmp_path}: permission denied"):
        check_folder(tmp_path)


def test_a_file_is_found_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "trace").touch()
    (tmp_path / "link").symlink_to("trace")
    with pytest.raises(ConfigError, match="reads or writes it already"):
        check_writable(tmp_path / "link", reads=(str(tmp_path / "trace"),))


def test_pieces_are_written_and_a_failure_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "f", [b"a", b"b"])
    assert (tmp_path / "f").read_bytes() == b"ab"
    with pytest.raises(ConfigError, match="cannot write /dev/full: No space left on device"):
        write(Path("/dev/full"), [b"a"])
