"""Coverage-guided fuzzing of all that strangers send: a minute here, longer in `make chaos`."""

import pytest

from tests.fuzz.run import TARGETS, fuzz, is_installed

SECONDS = 8


@pytest.mark.slow
@pytest.mark.skipif(not is_installed(), reason="not run: no atheris for this Python")
@pytest.mark.parametrize("target", TARGETS)
def test_no_input_does_more_than_be_refused(target, tmp_path):
    outcome = fuzz(target, seconds=SECONDS, folder=tmp_path)
    assert not outcome.crash, outcome.crash
    assert outcome.inputs > 1000
