"""Who started this process, and what srun says in torch's words."""

from __future__ import annotations

import pytest

from rcpo.config.schema import LaunchConfig, RunConfig
from rcpo.errors import ConfigError
from rcpo.launch import ranks
from rcpo.launch.ranks import Ranks, external_ranks, first_node
from rcpo.system.distributed import device_index


def test_a_process_alone_has_no_outer_launcher() -> None:
    assert external_ranks({}) is None
    # a batch script of SLURM is a process alone, whatever the job's number of tasks
    assert external_ranks({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None
    assert external_ranks({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_torchrun_and_srun_are_recognised() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}
    assert external_ranks(torchrun) == Ranks(3, 4, 1, "torchrun")
    srun = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
    assert external_ranks(srun) == Ranks(3, 4, 1, "srun")
    # torchrun inside a job step: the inner launcher's ranks count
    assert external_ranks({**srun, **torchrun}) == Ranks(3, 4, 1, "torchrun")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 and no RANK: start all processes by torchrun"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 and no RANK"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x, which is not a whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1, which is not a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2: ranks count from 0"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "a"}, "LOCAL_RANK=a, which is not"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2,3"}, "SLURM_STEP_NUM_TASKS=2,3, which is not"),
    ],
)
def test_ranks_that_are_none_are_refused_by_variable(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        external_ranks(environment)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "", "WORLD_SIZE": ""},
        {"WORLD_SIZE": "1"},
        {"RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1"},  # and nowhere to meet: there is nobody to meet
        {"LOCAL_RANK": ""},
        {"SLURM_STEP_NUM_TASKS": "", "SLURM_PROCID": ""},
    ],
)
def test_left_over_variables_of_one_process_are_no_launcher(environment: dict[str, str]) -> None:
    assert external_ranks(environment) is None


def test_ranks_that_cannot_meet_are_refused_by_variable() -> None:
    found = external_ranks({"RANK": "0", "WORLD_SIZE": "2"})
    assert found is not None
    with pytest.raises(ConfigError, match="RANK=0 and WORLD_SIZE=2 and no MASTER_ADDR: set it"):
        ranks.export_ranks(found, {"MASTER_PORT": "1"})
    with pytest.raises(ConfigError, match="MASTER_PORT=http, which is not a whole number"):
        ranks.export_ranks(found, {"MASTER_ADDR": "x", "MASTER_PORT": "http"})


@pytest.mark.parametrize(("local", "visible", "index"), [(0, 1, 0), (3, 1, 0), (3, 4, 3), (0, 8, 0)])
def test_a_rank_that_sees_one_gpu_takes_it(local: int, visible: int, index: int) -> None:
    # srun --gpus-per-task=1 shows each task its own GPU alone, as number 0
    assert device_index(local, visible) == index


def test_srun_s_ranks_become_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "node_address", lambda node: f"address of {node}")
    environment = {
        "SLURM_PROCID": "3",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "100",
        "SLURM_STEP_ID": "2",
        "SLURM_STEP_NODELIST": "gpu[07-09]",
    }
    found = external_ranks(environment)
    assert found is not None
    ranks.export_ranks(found, environment)
    assert [environment[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["3", "4", "1"]
    assert environment["MASTER_ADDR"] == "address of gpu07"
    assert environment["MASTER_PORT"] == "23702"  # 20000 + (100 · 37 + 2)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu007", "gpu007"),
        ("gpu[007-012,020],cpu1", "gpu007"),
        ("r[1-2]n[07-12],x", "r1n07"),
        ("r[1,3]n[4]-ib,x[1-2]", "r1n4-ib"),
        ("a1,b2", "a1"),
        ("rack[1-2].example.org", "rack1.example.org"),
        ("node-3-[12,14]", "node-3-12"),
        ("", "127.0.0.1"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_a_node_without_a_name_in_the_network_has_slurm_s_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.node_address("localhost") == "localhost"
    answer = "NodeName=no_such.invalid NodeAddr=10.0.0.7 NodeHostName=x"
    monkeypatch.setattr(ranks, "_scontrol", lambda *_: answer)
    assert ranks.node_address("no_such.invalid") == "10.0.0.7"
    monkeypatch.setattr(ranks, "_scontrol", lambda *_: "")
    with pytest.raises(ConfigError, match="set MASTER_ADDR"):
        ranks.node_address("no_such.invalid")


def test_an_outer_launcher_s_count_goes_before_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    two = RunConfig(launch=LaunchConfig(processes=2))
    assert ranks.world_size(two) == 2
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ranks.world_size(RunConfig()) == 4
    with pytest.raises(ConfigError, match=r"leave launch\.processes out"):
        ranks.world_size(two)
