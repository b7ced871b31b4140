"""The job on PySpark 3.5 and Python 3.9, which is what EMR 7 runs, in an environment of its own (make test-spark35)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from conftest import HOME, NO_JAVA, java_is_there, path_env, read_lake, run_etl

PYTHON = HOME / ".venv-spark35" / "bin" / "python"


@pytest.mark.skipif(
    not PYTHON.exists(), reason="PySpark 3.5 has an environment and a run of its own: make test-spark35"
)
@pytest.mark.skipif(not java_is_there(), reason=NO_JAVA)
def test_spark_35_gives_the_same_tables(tmp_path: Path) -> None:
    env = path_env(PATH=f"{PYTHON.parent}:{os.environ['PATH']}")
    command = [str(PYTHON), str(HOME / "etl.py"), "--engine", "spark", "--output", str(tmp_path / "old")]
    old = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=300)
    assert (old.returncode, "Traceback" in old.stderr) == (0, False), old.stderr
    new = run_etl("--output", tmp_path / "new")
    assert new.returncode == 0, new.stderr
    assert read_lake(tmp_path / "old") == read_lake(tmp_path / "new")
