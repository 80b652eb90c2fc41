"""`lcm-ds doctor` without arguments: what a machine lacks is a row with advice, never a traceback."""

import json
import os
import resource
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub.constants as hub
import pytest
from machine import patience

from lcm_ds.doctor import kernels, machine
from lcm_ds.doctor.machine import MISSING, NONE, OK, WARN

ROOT = Path(__file__).parent.parent.parent


def run(*arguments, **environment):
    """A module of lcm-ds as a process of its own; an empty value takes a variable away."""
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    path = os.pathsep.join([*([env["PYTHONPATH"]] if env.get("PYTHONPATH") else []), str(ROOT)])
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, env={**env, "PYTHONPATH": path}, capture_output=True, text=True, timeout=patience(200)
    )


def rows(findings):
    return {finding.name: finding for finding in findings}


def test_the_table_has_a_row_for_all_that_a_run_may_need_and_nothing_else_is_printed():
    done = run("lcm_ds.cli", "doctor", COLUMNS="200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "a run can start here"
    status = {line[2:].split("  ")[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    operators = [f"DeepSpeed {name}" for name in kernels.OPERATORS]
    needed = [
        "python",
        "torch",
        "deepspeed",
        "lcm-ds",
        "accelerator",
        "precisions",
        "flash, packed rows",
        "flash, SDPA",
    ]
    asked = [*needed, "torch.compile", *operators, "hub", "minilm", "SONAR", *machine.PROGRAMS]
    for name in [*asked, "processors", "memory", "disk", "shared memory", "open files"]:
        assert status[name].removeprefix(f"  {name}").split()[0] in (OK, WARN, NONE)
    assert f" {OK} " in status["torch.compile"]
    assert "HF_HUB_OFFLINE" in status["hub"]


@pytest.mark.parametrize("lacking", [None, "NVIDIA A100 (8.0)"])
def test_fp8_is_a_precision_of_devices_that_have_it(monkeypatch, lacking):
    monkeypatch.setattr("lcm_ds.model.float8.device_without_float8", lambda: lacking)
    precisions = rows(kernels.accelerator())["precisions"].value.split(", ")
    assert ("fp8" in precisions) == (lacking is None)


def test_where_torch_or_deepspeed_is_broken_the_table_comes_all_the_same_and_ends_with_2(tmp_path):
    (tmp_path / "deepspeed.py").write_text("raise ImportError('no such symbol')")
    done = run("lcm_ds.cli", "doctor", PYTHONPATH=str(tmp_path), PATH=str(tmp_path), COLUMNS="200")
    assert done.returncode == 2
    assert done.stderr == ""
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("  accelerator ")]
    assert line.split()[1] == MISSING
    assert "ImportError: no such symbol" in line
    assert "install torch and deepspeed again" in line
    for program, (_, advice) in machine.PROGRAMS.items():
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"  {program} ")]
        assert line.split()[1] == WARN
        assert line.rstrip().endswith(advice)
    assert done.stdout.splitlines()[-1] == "no run can start here: see imports, accelerator"


@pytest.mark.slow
def test_without_a_compiler_what_has_to_be_compiled_says_what_to_install(tmp_path):
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = run("lcm_ds.doctor.kernels", PATH=str(tmp_path), **caches)
    findings = rows(machine.Finding(*json.loads(line)) for line in done.stdout.splitlines())
    assert findings["accelerator"].status == OK
    assert findings["torch.compile"].status == WARN
    assert findings["DeepSpeed CPUAdam"].status == WARN
    assert findings["DeepSpeed CPUAdam"].advice.startswith("needs g++ (apt install g++)")


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ("import os; os.kill(os.getpid(), 11)", "exit code -11 after one"),
        ("import time; time.sleep(60)", "no answer in 1 s after one"),
        ("raise SystemExit('a driver')", "exit code 1 after one: a driver"),
    ],
)
def test_a_kernel_that_crashes_or_hangs_is_a_finding(ends, expected, tmp_path, monkeypatch, capsys):
    says = 'import json; print(json.dumps(["one", "ok", "x", ""]), flush=True)'
    (tmp_path / "kernels_that_fail.py").write_text(f"{says}\n{ends}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(machine, "MODULE", "kernels_that_fail")
    monkeypatch.setattr(machine, "PART_SECONDS", 1)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COLUMNS", "200")
    assert machine.examine() == 2
    out = capsys.readouterr().out
    found = {line.split()[0]: line.split()[1] for line in out.splitlines() if expected in line}
    assert found == {"kernels": MISSING, "compiler": WARN}  # runs start without torch.compile
    assert out.splitlines()[-1] == "no run can start here: see kernels"


# --- the rows one by one ----------------------------------------------------------------------------------------------


def test_versions_are_held_against_what_the_package_asks_for(monkeypatch):
    asked = ["numpy>=1", "torch<1", "no-such-package>=1", "pytest>=1; extra == 'a'", "no-such; extra == 'b'"]
    monkeypatch.setattr(machine.importlib.metadata, "requires", lambda name: asked)
    findings = rows([*machine.software(), *machine.extras()])
    assert findings["numpy"].status == OK
    assert findings["torch"].status == WARN
    assert findings["torch"].value.endswith("made for <1")
    assert findings["no-such-package"][1:] == (MISSING, "not installed", "pip install 'no-such-package>=1'")
    assert findings["lcm-ds[a]"].status == OK
    assert findings["lcm-ds[b]"][1:3] == (NONE, "no-such not installed")


def test_a_container_s_memory_counts(tmp_path, monkeypatch):
    total_memory, _ = machine._memory()
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "MEMORY_LIMITS", (limit, tmp_path / "nowhere"))
    for text, total in (("max\n", total_memory), (f"{2 * total_memory}\n", total_memory), ("5000\n", 5000)):
        limit.write_text(text)
        assert machine._memory()[0] == total
    assert machine._memory()[1] == 5000


@pytest.fixture
def answering():
    """A server that has no pages: its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def closed():
    """An address at which nobody answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_the_hub_is_reached_if_it_answers_whatever_it_says(answering, closed, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ENDPOINT", answering)
    assert rows(machine.models())["hub"].status == OK
    monkeypatch.setattr(hub, "ENDPOINT", closed)
    finding = rows(machine.models())["hub"]
    assert finding.status == WARN
    assert finding.value == f"{closed}: [Errno 111] Connection refused"
    assert "HF_ENDPOINT" in finding.advice


def test_few_open_files_are_told(monkeypatch):
    monkeypatch.setattr(machine, "MIN_OPEN_FILES", resource.getrlimit(resource.RLIMIT_NOFILE)[1] + 1)
    finding = rows(machine.limits())["open files"]
    assert finding.status == WARN
    assert "nofile" in finding.advice
