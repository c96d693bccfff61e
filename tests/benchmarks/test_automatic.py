"""The command of `benchmarks.quality.automatic`."""

import pytest

from benchmarks.quality import automatic


def test_tasks_whose_rate_is_not_tuned_are_refused_at_once(capsys, tmp_path):
    """Not after hours, when their turn comes."""
    with pytest.raises(SystemExit):
        automatic.main(["--tuned", "--tasks", "boston,minilm", "--only-report", "--out", str(tmp_path)])
    assert "tuned for minilm" in capsys.readouterr().err
