"""Every damaged file ends in a correct reading, a reported problem, or one clear error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_damaged_files(count):
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", Path(__file__).with_name("fuzz.py"), "0", str(count)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sum(found["results"].values()) == count and len(found["results"]) == 4
    assert found["grown_mb"] < 100  # whatever a header claims
