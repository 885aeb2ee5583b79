"""The list of settings: every name known, every secret masked."""

from pathlib import Path

import pytest

from deploy.local.errors import LaunchError
from deploy.settings import Setting, load_settings, require_known


def test_a_typing_error_is_refused_and_the_meant_name_is_given() -> None:
    with pytest.raises(
        LaunchError, match=r"no setting TENFOLD_EDGE_LISTN\. Did you mean TENFOLD_EDGE_LISTEN"
    ):
        require_known({"TENFOLD_EDGE_LISTN": "x"}, load_settings())


def test_other_variables_are_no_concern_of_ours() -> None:
    require_known({"PATH": "/bin", "TENFOLD_DATA": "x"}, load_settings())


def test_a_secret_is_never_shown() -> None:
    setting = Setting("TENFOLD_KEY", "", "The key. (secret)")
    assert setting.shown({"TENFOLD_KEY": "hunter2"}) == "********"
    assert setting.shown({}) == ""


def test_every_setting_of_the_list_has_a_comment() -> None:
    settings = load_settings()
    assert len(settings) > 5
    assert all(setting.comment for setting in settings.values())


@pytest.mark.parametrize("text", ["TENFOLD_X=1\n", "# Comment.\nX=1\n", "# Comment.\nTENFOLD_X\n"])
def test_a_list_that_says_too_little_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.env").write_text(text)
    with pytest.raises(ValueError, match="a setting is a comment line"):
        load_settings(tmp_path / "list.env")
