"""The scripts that a user copies."""

import subprocess
from pathlib import Path

import pytest
import yaml

from lcm_ds.launcher.multihost.hostfile import read_hostfile

LAUNCH = Path(__file__).parent.parent.parent / "launch"


@pytest.mark.parametrize("path", sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]), ids=lambda path: path.name)
def test_a_script_is_executable_and_bash_can_read_it(path):
    assert path.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""


def test_the_other_files_are_what_they_say():
    assert read_hostfile(LAUNCH / "hostfile.example") == {"worker-0": 8, "worker-1": 8}
    assert yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())["kind"] == "PyTorchJob"
