"""What would stop a run is found on all hosts at once, before a worker starts."""

import importlib.metadata

from host_runs import finish, launch
from small_run import run_dir

PORT = 29555


def lines_about(err, host):
    return [line.split(f": {host}: ", 1)[1] for line in err.splitlines() if f": {host}: " in line]


def test_everything_that_is_wrong_on_any_host_is_told_at_once_with_2(hosts, make_config, synthetic_dataset, tmp_path):
    config = make_config()
    # worker-0 has the port in use, worker-1 other versions and another dataset, worker-2 a run folder of its own,
    # worker-3 is not there.
    server = hosts.start(0, "-c", f"import socket, time; s = socket.create_server(('', {PORT})); time.sleep(100)")
    installed = importlib.metadata.distribution("webdataset").locate_file("")
    (metadata,) = installed.glob("webdataset-*.dist-info/METADATA")
    (tmp_path / "METADATA").write_text("Metadata-Version: 2.1\nName: webdataset\nVersion: 9.9.9\n")
    other = synthetic_dataset(documents=40, embed_dim=16, documents_per_shard=10, seed=2)
    dataset = synthetic_dataset(documents=300, embed_dim=16, documents_per_shard=10, seed=1)
    hosts.restore(1, f"mount --bind {tmp_path}/METADATA {metadata} && mount --bind {other} {dataset}")
    (run_dir(config) / "launch").mkdir(parents=True)
    hosts.restore(2, f"mount -t tmpfs none {run_dir(config)}")
    hosts.set_link(3, "down")
    try:
        code, out, err = finish(launch(hosts, 4, config, "--master-port", PORT))
    finally:
        server.kill()
        server.wait()
    assert code == 2, out + err
    begins, *table = out.splitlines()
    folder = run_dir(config)
    outputs = f"each rank's output: {folder}/launch/rank-*.log"
    assert begins == f"{folder}: starting 4 workers on 4 hosts; log: {folder}/log.txt; {outputs}"
    assert [line.split()[:2] for line in table] == [
        ["worker-0", "1"],
        ["worker-1", "2"],
        ["worker-2", "1"],
        ["worker-3", "1"],
    ]
    (port,) = lines_about(err, "worker-0")
    assert f"port {PORT}: is in use" in port
    version, data = lines_about(err, "worker-1")
    assert version.startswith("webdataset: 9.9.9 there")
    assert "fingerprint" in data
    (shared,) = lines_about(err, "worker-2")
    assert "all hosts need the same run folder" in shared
    (unreachable,) = lines_about(err, "worker-3")
    assert "ssh: connect to host worker-3" in unreachable
    assert list(run_dir(config).iterdir()) == [run_dir(config) / "launch"]  # no worker has been there
    assert "Traceback" not in err


def test_doctor_asks_all_hosts_and_measures_what_an_all_reduce_takes(hosts, make_config):
    doctor = hosts.start(0, "-m", "lcm_ds.cli", "doctor", "--hostfile", hosts.hostfile(2), "--bandwidth", make_config())
    code, out, err = finish(doctor)
    assert code == 0, out + err
    for number in (0, 1):
        assert any(line.startswith(f"worker-{number} ") and f"eth0 {hosts.addresses[number]}" in line
                   for line in out.splitlines())  # fmt: skip
    measured = [line for line in out.splitlines() if "all-reduce" in line]
    assert len(measured) == 2
    assert all("over 2 ranks (gloo)" in line and "GB/s, bus" in line for line in measured)
