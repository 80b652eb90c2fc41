"""A Slurm cluster of two nodes on this machine, with daemons, keys and ports of its own."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from machine import patience
from small_run import ENVIRON, ROOT, wait_for, with_variable

from lcm_ds.distributed.environment import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

# No cgroups, no accounting, and cores that need not be there. The first node has the name of this machine, so that the
# tasks can look up rank 0's host, as on a cluster. The tasks' port comes from the job's number.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
FirstJobId={first_job}
NodeName={host} NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs=2 RealMemory=4096
NodeName={host}-second NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[2]} CPUs=2 RealMemory=4096
PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""


def missing():
    """Why no cluster can be started here; None if one can."""
    if os.geteuid() != 0:
        return "needs root: slurmd starts tasks in their users' names"
    absent = [name for name in PROGRAMS if _which(name) is None]
    return f"needs the packages slurm-wlm and munge: there is no {', '.join(absent)}" if absent else None


class Supervisor:
    """Entered, it runs; left, however its start or a test went, its daemons and all that they started are gone."""

    def __enter__(self):
        with ExitStack() as stack:
            # Not pytest's folder: the path of a socket has to be short, and munged wants it open to all.
            self.folder = Path(tempfile.mkdtemp(prefix="lcm-ds-slurm-"))
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.folder.chmod(0o755)
            self.environ = {**ENVIRON, "SLURM_CONF": str(self.folder / "slurm.conf")}
            host = socket.gethostname().partition(".")[0]
            ports = [free_port() for _ in range(3)]
            first_job = random.randrange(1, 1_000_000)
            text = CONFIG.format(folder=self.folder, host=host, ports=ports, first_job=first_job)
            (self.folder / "slurm.conf").write_text(text)
            self._start_munged(stack)
            self._start(stack, "slurmctld", "-D", "-c")
            for node in (host, f"{host}-second"):
                self._start(stack, "slurmd", "-D", "-N", node)
            stack.callback(self._end_jobs)
            wait_for(lambda: self("sinfo", "--noheader", "--format=%t %D").split() == ["idle", "2"], 30, self.logs)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception):
        self._stack.close()

    def __call__(self, *command):
        """Run a command of Slurm's; returns its output, which is empty if it fails."""
        done = subprocess.run(command, env=self.environ, cwd=ROOT, capture_output=True, text=True, timeout=patience(60))
        return done.stdout if done.returncode == 0 else ""

    def submit(self, config, *options):
        """sbatch, as a user calls it, for two nodes with a task each and no GPU; returns the job's number."""
        size = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")
        log = f"--output={config.parent}/job.log"
        number = self("sbatch", "--parsable", *size, log, *options, "launch/slurm.sbatch", str(config)).strip()
        assert number.isdigit(), self.logs()
        return number

    def job(self, number):
        """What Slurm says of a job: {"JobState": "RUNNING", "Restarts": "0", …}."""
        return dict(re.findall(r"(\w+)=(\S*)", self("scontrol", "show", "job", number)))

    def wait_for_job(self, number, seconds, *states, restarts=0):
        """Wait until a job is in one of these states after this number of restarts; returns Slurm's record of it."""

        def reached():
            job = self.job(number)
            ended = job.get("JobState") in ENDED and not set(states) & set(ENDED)
            assert not ended, f"{job}\n{self.logs()}"
            return job if job.get("JobState") in states and job["Restarts"] == str(restarts) else None

        return wait_for(reached, seconds, self.logs)

    def processes(self, number):
        """The processes of a job: those with its number in their environment."""
        return with_variable("SLURM_JOB_ID", number) & self._ours()

    def logs(self):
        """The ends of the daemons' logs, to explain a failure."""
        return "".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    def _ours(self):
        return with_variable("SLURM_CONF", self.environ["SLURM_CONF"])

    def _start_munged(self, stack):
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        names = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        paths = [f"--{option}={self.folder}/munge.{name}" for option, name in names.items()]
        self._start(stack, "munged", "--foreground", f"--key-file={key}", *paths)
        wait_for((self.folder / "munge.socket").exists, 10, self.logs)

    def _start(self, stack, name, *options):
        with (self.folder / "daemons.log").open("ab") as log:
            command = [_which(name), *options]
            daemon = subprocess.Popen(command, env=self.environ, cwd=self.folder, stdout=log, stderr=log)
        stack.callback(_end, daemon)

    def _end_jobs(self):
        """Jobs that a failed test left: told to end, then killed."""
        self("scancel", "--quiet", "--user=root")
        deadline = time.monotonic() + patience(5)
        while left := self._ours() & with_variable("SLURM_JOB_ID"):
            for pid in left if time.monotonic() > deadline else ():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


def _which(name):
    """The path of a program; daemons are not on every user's PATH."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _end(daemon):
    daemon.terminate()
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
