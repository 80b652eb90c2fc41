"""The documents of a step are known without training to it."""

from runs import finish, start

from lcm_ds.train.trace import trace


def test_trace_names_each_segment_of_a_step(make_config):
    config = make_config()
    code, out, err = finish(start("trace", config, "--step", 25))
    assert code == 0, err
    lines = trace(config, [], 25)
    assert len(out.splitlines()) == len(lines)
    assert {line.lane for line in lines} == set(range(8))
    for lane in range(8):
        assert sum(line.stop - line.start for line in lines if line.lane == lane) == 32
    for line, printed in zip(lines, out.splitlines(), strict=True):
        assert line.id in printed
        assert line.shard in printed


def test_a_run_folder_and_its_config_trace_alike(trained):
    config = trained(2)
    from runs import run_dir

    assert trace(config, [], 3) == trace(run_dir(config), [], 3)
