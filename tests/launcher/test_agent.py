"""What one host gives its workers."""

import pytest

from lcm_ds.launcher.multihost.agent import HostAgent
from lcm_ds.launcher.multihost.launch_spec import Host, LaunchSpec


@pytest.fixture
def make_job(tmp_path):
    """A start of workers on two hosts; keyword arguments replace fields."""

    def make(**changes):
        hosts = [Host("worker-0", [0, 1], 0, "eth0"), Host("worker-1", [2, 3], 2, None)]
        fields = {
            "token": "t",
            "launcher_addresses": ["10.0.0.1"],
            "launcher_port": 1,
            "heartbeat_timeout": 15.0,
            "grace": 30.0,
            "module": "lcm_ds.train",
            "config": str(tmp_path / "config.yaml"),
            "environment": {},
            "master_addr": "10.0.0.2",
            "master_port": 29500,
            "hosts": hosts,
        }
        return LaunchSpec(**{**fields, **changes})

    return make


def test_what_the_launcher_writes_is_what_a_host_reads_and_nobody_else_may(make_job, tmp_path):
    job, path = make_job(environment={"HF_HOME": "/a b"}), tmp_path / "start.json"
    job.write(path)
    assert LaunchSpec.read(path) == job
    assert path.stat().st_mode & 0o777 == 0o600


def test_ranks_go_on_from_host_to_host(make_job):
    job = make_job()
    places = [job.dist_env(host, local_rank) for host in job.hosts for local_rank in (0, 1)]
    assert [(place.rank, place.local_rank, place.local_world_size, place.world_size) for place in places] == [
        (0, 0, 2, 4),
        (1, 1, 2, 4),
        (2, 0, 2, 4),
        (3, 1, 2, 4),
    ]
    assert {(place.master_addr, place.master_port) for place in places} == {("10.0.0.2", 29500)}


def test_workers_see_the_devices_of_the_hostfile_and_the_launchers_variables_before_the_hosts(make_job, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/there")
    monkeypatch.setenv("LANG", "C")
    environ = HostAgent(make_job(environment={"HF_HOME": "/here"}), 1).environment()
    assert (environ["CUDA_VISIBLE_DEVICES"], environ["HF_HOME"], environ["LANG"]) == ("2,3", "/here", "C")


def test_the_interface_that_leads_to_the_others_is_set_and_it_alone(make_job, monkeypatch):
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    environ = HostAgent(make_job(), 0).environment()
    assert (environ["NCCL_SOCKET_IFNAME"], environ["GLOO_SOCKET_IFNAME"]) == ("=eth0", "eth0")


@pytest.mark.parametrize("said_by", ["launcher", "host"])
def test_an_interface_that_the_user_has_said_stays(make_job, monkeypatch, said_by):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    given = {"NCCL_SOCKET_IFNAME": "ib0"}
    if said_by == "host":
        monkeypatch.setenv(*next(iter(given.items())))
        given = {}
    first, second = (HostAgent(make_job(environment=given), number).environment() for number in (0, 1))
    assert (first["NCCL_SOCKET_IFNAME"], first["GLOO_SOCKET_IFNAME"]) == ("ib0", "eth0")
    assert second["NCCL_SOCKET_IFNAME"] == "ib0"
    assert "GLOO_SOCKET_IFNAME" not in second  # the route to the others is unknown
