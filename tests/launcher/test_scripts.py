"""The scripts that a user copies."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from lcm_ds.config import TrainConfig, load
from lcm_ds.deepspeed_config import accumulation_steps
from lcm_ds.launcher.multihost.hostfile import read_hostfile

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "launch"
PAGES = [*LAUNCH.glob("*.s*"), *ROOT.glob("docs/*.md"), ROOT / "README.md", *ROOT.glob("configs/train/*.yaml")]
PER_NODE = 8  # devices, as in slurm.sbatch
# What the lines `sbatch [--nodes=N] launch/slurm.sbatch CONFIG` and `NODES=N … launch/torchrun.sh CONFIG` name, and
# the numbers of processes of the other scripts.
LINE = re.compile(
    r"(sbatch |NODES=|PROCESSES=)(?:(?:--nodes=)?(\d+))?[^\n`]*?"
    r"launch/(?:slurm\.sbatch|\w+\.sh) (configs/train/\S+\.yaml)(.*)"
)


@pytest.mark.parametrize("path", sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]), ids=lambda path: path.name)
def test_a_script_is_executable_and_bash_can_read_it(path):
    assert path.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""


def test_the_other_files_are_what_they_say():
    assert read_hostfile(LAUNCH / "hostfile.example") == {"worker-0": 8, "worker-1": 8}
    assert yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())["kind"] == "PyTorchJob"


def test_the_lines_that_start_a_run_name_world_sizes_that_its_config_takes():
    script = (LAUNCH / "slurm.sbatch").read_text()
    assert f"#SBATCH --ntasks-per-node={PER_NODE}\n" in script
    default = re.search(r"^#SBATCH --nodes=(\d+)$", script, re.MULTILINE)[1]
    sizes = {}
    for page in PAGES:
        for kind, number, path, rest in LINE.findall(page.read_text()):
            ranks = int(number or default) * (1 if kind == "PROCESSES=" else PER_NODE)
            config = load(TrainConfig, ROOT / path, re.findall(r"\w+=\w+", rest.split("#")[0]))
            assert accumulation_steps(config.batch.rows_per_step, config.batch.micro_batch_rows, ranks, page)
            sizes.setdefault(page.name, []).append(ranks)
    assert sizes == {
        "slurm.sbatch": [16, 64],
        "torchrun.sh": [16, 16],
        "openmpi.sh": [2, 16],
        "schedulers.md": [16, 64, 2, 16, 16, 16],
    }
