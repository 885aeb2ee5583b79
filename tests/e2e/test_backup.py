"""A backup of a mesh that is used, and a mesh that is started on what was restored from it."""

import stat
from pathlib import Path

from deploy.local.data_folder import DataFolder
from tests.backups import back_up_in_use, begin_story, same_story, tenfold, violations

# A video whose worker was alive at the backup's moment is left to it for so long.
LEASE = {"TENFOLD_MEDIA_LEASE_S": "1"}


def require_private(backup: Path) -> None:
    kept = DataFolder(backup / "data")
    files = {path for path in backup.rglob("*") if path.is_file()}
    assert {kept.secret, kept.admin_key, kept.identity / "edge.pem"} <= files
    assert [path for path in files if stat.S_IMODE(path.stat().st_mode) & 0o077] == []
    assert stat.S_IMODE(backup.stat().st_mode) == 0o700


def test_a_mesh_restored_from_a_backup_taken_in_use_has_lost_and_doubled_nothing(
    start_mesh, tmp_path: Path
) -> None:
    with start_mesh(environ_of_start=LEASE) as mesh:
        told = begin_story(mesh)
        backup = back_up_in_use(told, tmp_path / "backup")
        mesh.kill_all()
        assert not list(mesh.data.glob(".backup-*"))
    require_private(backup.folder)
    restored = tenfold("restore", str(backup.folder), "--data", str(tmp_path / "restored"))
    assert restored["bytes"] == backup.printed["bytes"]
    with start_mesh(data=tmp_path / "restored") as again:
        told = same_story(told, again)
        assert violations(told, backup) == []
        assert backup.half.finish(told.story) == "Upload successful"
