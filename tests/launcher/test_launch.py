"""`lcm-ds launch` and `lcm-ds doctor`: errors are reported once, before anything starts."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from runs import ROOT, finish, run_dir, start, write_tiny_config

from lcm_ds.doctor.run_checks import doctor
from lcm_ds.errors import InputError
from lcm_ds.launcher.launch import launch
from lcm_ds.launcher.task import LaunchOptions, local_devices


@pytest.fixture
def config(synthetic_dataset, tmp_path):
    """A run of two steps of a tiny model."""
    return write_tiny_config(synthetic_dataset(), tmp_path)


def mistakes_of(*arguments, **keywords):
    with pytest.raises(InputError) as caught:
        launch(*arguments, **keywords)
    return caught.value.errors


def put_first_on_path(folder, monkeypatch, does):
    """A pdsh and an ssh that only do this."""
    for name in ("pdsh", "ssh"):
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_exactly_one_way_to_launch_is_asked_for(config):
    assert len(mistakes_of(config)) == 1
    assert len(mistakes_of(config, local=2, slurm=True)) == 1


def test_hosts_are_chosen_of_a_hostfile_alone(config):
    lines = mistakes_of(config, local=1, include="a", exclude="b")
    assert lines == ["--include: goes with --hostfile", "--exclude: goes with --hostfile"]


def test_mistakes_of_the_hostfile_and_the_config_come_together_and_nothing_starts(config, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("a slots=2\nb\n")
    lines = mistakes_of(config, ["noise_std=-1", "optim.lrr=1"], hostfile=hostfile)
    assert [line.split(": ")[0] for line in lines] == [str(hostfile), str(config), str(config)]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ways", [{"local": 0}, {"openmpi": -1}, {"local": 3}])
def test_a_number_of_processes_that_cannot_be_is_refused(config, ways):
    (line,) = mistakes_of(config, **ways)
    assert "rows_per_step" in line if ways == {"local": 3} else "1 or more" in line


@pytest.mark.parametrize(
    ("visible", "ranks", "devices"),
    [
        (None, 2, 2),
        ("1", 1, 1),
        ("", 2, 0),
        (" 0, 1,", 2, 2),
        # DeepSpeed is asked: before a launch is refused, and of what only CUDA can count.
        (None, 3, "asked"),
        ("0,1,7", 3, "asked"),
        ("-1", 2, "asked"),
        ("MIG-a", 1, "asked"),
    ],
)
def test_devices_are_counted_by_what_the_system_has_of_them(monkeypatch, visible, ranks, devices):
    build = {"cuda": "13.0", "hip": None, "xpu": None}
    monkeypatch.setattr("runpy.run_path", lambda path: build)
    monkeypatch.setattr("pathlib.Path.glob", lambda self, pattern: [self / "null", self / "zero"])
    device = SimpleNamespace(device_name=lambda: "cuda", device_count=lambda: 7)
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: device)
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert local_devices(environ, ranks) == (7 if devices == "asked" else devices)
    assert local_devices({**environ, "DS_ACCELERATOR": "cpu"}, ranks) == 0
    assert local_devices({**environ, "DS_ACCELERATOR": "xpu"}, ranks) == 7
    build["hip"] = "7.1"
    assert local_devices(environ, ranks) == 7
    build |= {"hip": None, "cuda": None}  # a build for CPUs, beside cards
    assert local_devices(environ, ranks) == 0


@pytest.mark.parametrize(("vendors", "devices"), [((), 0), (("0x8086",), 0), (("0x8086", "0x10de"), 7)])
def test_cards_whose_nodes_are_not_there_yet_are_counted_by_deepspeed(monkeypatch, tmp_path, vendors, devices):
    """As after a boot: NVIDIA's nodes appear when CUDA is first used."""
    monkeypatch.setattr("runpy.run_path", lambda path: {"cuda": "13.0", "hip": None, "xpu": None})
    for index, vendor in enumerate(vendors):
        (tmp_path / f"{index}-vendor").write_text(f"{vendor}\n")
    on_the_bus = [*tmp_path.iterdir()]
    monkeypatch.setattr("pathlib.Path.glob", lambda self, pattern: on_the_bus if pattern == "*/vendor" else [])
    device = SimpleNamespace(device_name=lambda: "cuda", device_count=lambda: 7)
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: device)
    assert local_devices({}, 1) == devices


def test_more_workers_than_devices_are_refused(monkeypatch, config):
    monkeypatch.setattr("lcm_ds.launcher.task.local_devices", lambda environ, ranks: 1)
    assert mistakes_of(config, local=2) == ["--local 2: this host has 1 device(s)"]


def test_a_launch_imports_neither_torch_nor_deepspeed(config):
    code = (
        "import sys; from lcm_ds.launcher import launch\n"
        "launch.run_local = lambda *arguments: print([name for name in sys.argv[2:] if name in sys.modules]) or 0\n"
        "sys.exit(launch.launch(sys.argv[1], local=2))"
    )
    environ = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, "-c", code, config, "torch", "deepspeed", "transformers"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_a_hostfile_that_names_this_machine_alone_needs_no_ssh(config, tmp_path, monkeypatch):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    put_first_on_path(tmp_path, monkeypatch, "exit 1")
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "lcm_ds.cli", "launch", "--hostfile", str(hostfile), str(config)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run/checkpoints/step_00000002/COMPLETE").exists()


def test_hosts_that_are_not_reached_and_paths_that_a_remote_shell_changes_are_told(config, tmp_path, monkeypatch):
    put_first_on_path(tmp_path, monkeypatch, "for h in a b; do echo $h: ssh: no way to $h >&2; done; exit 255")
    (tmp_path / "hostfile").write_text("a slots=1\nb slots=1\n")
    lines = mistakes_of(config, hostfile=tmp_path / "hostfile")
    assert lines == [f"{tmp_path}/hostfile: {host}: ssh: no way to {host}" for host in "ab"]
    (line,) = mistakes_of(config, [f"run_dir={tmp_path}/my {{runs}}"], hostfile=tmp_path / "hostfile")
    assert "a remote shell would change this path" in line


def test_a_0_that_the_run_folder_does_not_bear_out_is_not_believed(config, tmp_path, monkeypatch, capfd):
    (tmp_path / "mpirun").write_text("#!/bin/sh\necho 'mpirun (Open MPI) 4.1.4'\n")
    (tmp_path / "mpirun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert launch(config, openmpi=2) == 1
    assert "run is at step 0 of 2" in capfd.readouterr().err


def test_a_hostfile_that_names_this_machine_keeps_the_devices_of_its_scheduler(config, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        "lcm_ds.launcher.launch.run_local", lambda worker, size, environ, *rest: started.append(environ) or 0
    )
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    for given, workers in ((None, "0,1"), ("4,5", "4,5"), ("GPU-a,GPU-b,GPU-c", "GPU-a,GPU-b"), ("", "")):
        if given is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert launch(config, hostfile=hostfile) == 0
        assert started.pop()["CUDA_VISIBLE_DEVICES"] == workers
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    (line,) = mistakes_of(config, hostfile=hostfile)
    assert "CUDA_VISIBLE_DEVICES=7" in line
    assert "slot 1" in line


@pytest.mark.parametrize(
    ("version", "option", "message"),
    [
        ("HYDRA build details:", "openmpi", "is not Open MPI's: use --mpi"),
        ("Vendor MPI 1.0", "mpi", "is not Open MPI's, MPICH's or Intel MPI's (Vendor MPI 1.0)"),
    ],
)
def test_an_mpirun_that_is_not_the_one_asked_for_is_refused(config, tmp_path, monkeypatch, version, option, message):
    (tmp_path / "mpirun").write_text(f"#!/bin/sh\necho '{version}'\n")
    (tmp_path / "mpirun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (line,) = mistakes_of(config, **{option: 2})
    assert line.startswith(f"--{option}: {tmp_path}/mpirun is not Open MPI's")
    assert message in line


def test_pdsh_has_to_be_installed(config, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "hostfile").write_text("a slots=1\nb slots=1\n")
    assert ["pdsh" in line for line in mistakes_of(config, hostfile=tmp_path / "hostfile")] == [True, False]


def test_settings_that_cannot_be_are_refused_all_at_once(config, tmp_path):
    (tmp_path / "hostfile").write_text("a slots=1\nb slots=1\n")
    options = LaunchOptions(max_restarts=-1, min_hosts=3, back_off=0, silence=-1, grace=0, master_port=2**16)
    lines = mistakes_of(config, hostfile=tmp_path / "hostfile", options=options)
    options = ("--max-restarts", "--min-hosts", "--back-off", "--silence", "--grace", "--master-port")
    assert [line.split()[0] for line in lines] == list(options)
    lines = mistakes_of(config, hostfile=tmp_path / "hostfile", options=LaunchOptions(exclude_stragglers=True))
    assert lines == ["--exclude-stragglers: goes with --max-restarts and --min-hosts"]


def test_options_for_hosts_are_refused_where_there_are_none(config):
    lines = mistakes_of(config, openmpi=2, options=LaunchOptions(max_restarts=3, grace=5, master_port=29501))
    assert lines == ["--max-restarts: goes with --hostfile", "--grace: goes with --hostfile"]
    lines = mistakes_of(config, local=2, options=LaunchOptions(max_restarts=3, silence=5))
    assert lines == ["--silence: goes with --hostfile"]


def test_events_of_a_launch_are_on_stdout_alone_and_nothing_is_compiled(config, tmp_path):
    extensions = tmp_path / "extensions"
    code, out, err = finish(start("launch", "--json", "--local", 2, config, TORCH_EXTENSIONS_DIR=str(extensions)))
    assert code == 0, err
    assert not extensions.exists()
    began, ended = map(json.loads, out.splitlines())
    assert (began["event"], began["ranks"], began["folder"]) == ("start", 2, str(run_dir(config)))
    assert (ended["event"], ended["code"]) == ("end", 0)
    assert "done: 2 steps" in err
    code, out, err = finish(start("launch", "--json", "--local", 2, config, "steps=-1"))
    assert code == 2
    assert [json.loads(line)["code"] for line in out.splitlines()] == [2]


# --- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_prints_the_machine_and_what_a_run_needs(config, capsys):
    assert doctor(config) == 0
    out = capsys.readouterr().out
    for expected in ("deepspeed", "accelerator", "parameters", "ZeRO 1", "<- this run", "disk"):
        assert expected in out


def test_doctor_tells_every_mistake_and_ends_with_2(config, tmp_path, capsys):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("a\n")
    assert doctor(config, ["noise_std=-1", "optim.lrr=1"], hostfile) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
