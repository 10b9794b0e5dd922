"""Where to run, from the flags: what can't be is said in one line, before anything starts."""

import json

import pytest
import torch

from arae.cli.options import where_of
from arae.errors import InputError
from arae.launch import Where, parse_workers
from cluster.connect import JOB, ROOT, address_of, worker_environment
from cluster.launch import wants_gpu


@pytest.mark.parametrize(("text", "workers"), [("1", (1, None)), ("16", (16, None)), ("2:8", (2, 8)), ("3:3", (3, 3))])
def test_workers_are_read(text: str, workers: tuple[int, int | None]) -> None:
    assert parse_workers(text) == workers
    where = where_of(text, "auto", None)
    assert (where.workers, where.most) == workers


@pytest.mark.parametrize("text", ["", "two", "-1", "2:", ":4", "2:4:8", "1.5", "2-4"])
def test_workers_that_are_no_numbers_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="MIN:MAX") as caught:
        parse_workers(text)
    assert f"--workers {text}" in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"workers": 0}, "--workers 0"),
        ({"workers": 4, "most": 2}, "--workers 4:2"),
        ({"address": "auto"}, "--address auto needs --workers"),
        ({"cpus": 2}, "--cpus 2 needs --workers"),
        ({"gpus": 1}, "--gpus 1 needs --workers"),
        ({"workers": 1, "cpus": 0}, "--cpus 0"),
        ({"workers": 1, "gpus": 2}, "--gpus 2"),
        ({"workers": 1, "gpus": 1, "device": "cpu"}, "--gpus 1 --device cpu"),
        ({"workers": 1, "device": "tpu"}, "--device tpu"),
        ({"workers": 1, "placement": "around"}, "write pack or spread"),
        ({"workers": 1, "restarts": -1}, "--restarts -1"),
        ({"workers": 1, "wait": 0.0}, "--wait 0"),
        ({"workers": 1, "wait": float("nan")}, "--wait nan"),
        ({"workers": 1, "timeout": -5}, "--timeout -5"),
    ],
)
def test_what_can_not_be_is_one_line(flags: dict, said: str) -> None:
    with pytest.raises(InputError) as caught:
        Where(**flags)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "gpus", "alone", "expected"),
    [
        ({}, 0, True, False),
        ({}, 1, True, False),  # two workers on one machine with one GPU: the CPU, as without Ray they'd have it
        ({}, 2, True, True),
        ({}, 1, False, True),  # a cluster whose other GPUs are not there yet: wait for them
        ({"gpus": 0}, 8, False, False),
        ({"device": "cpu"}, 8, False, False),
        ({"gpus": 1}, 0, False, True),
        ({"device": "cuda"}, 0, False, True),
        ({"gpus": 1}, 1, True, "a GPU each: this machine has 1"),
    ],
)
def test_who_gets_a_gpu(flags: dict, gpus: int, alone: bool, expected: bool | str) -> None:
    where = Where(workers=2, address=None if alone else "auto", **flags)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            wants_gpu(where, {"CPU": 8, "GPU": gpus}, alone=alone)
    else:
        assert wants_gpu(where, {"CPU": 8, "GPU": gpus}, alone=alone) == expected


def test_a_head_without_a_gpu_may_launch_what_needs_one() -> None:
    assert Where(workers=2, address="auto", device="cuda").worker_device() == torch.device("cuda")
    assert Where(workers=2, address="auto", gpus=0).worker_device().type == Where().torch_device().type
    assert Where(workers=2, address="auto", device="cpu").worker_device() == torch.device("cpu")


def test_workers_get_arae_s_own_settings_no_secrets_and_nothing_that_the_job_has_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ARAE_RUNS", "s3://bucket/runs")
    monkeypatch.setenv("ARAE_STAGE", "1")
    monkeypatch.setenv("ARAE_SCRATCH", "/local/of/this/node")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv(JOB, json.dumps({"runtime_env": {"env_vars": {"ARAE_STAGE": "0"}}}))
    given = worker_environment()
    assert given["ARAE_RUNS"] == "s3://bucket/runs"
    assert "secret" not in given.values()
    assert not {"ARAE_STAGE", "ARAE_SCRATCH"} & set(given)
    assert str(ROOT) in given["PYTHONPATH"].split(":")


@pytest.mark.parametrize(
    ("address", "environment", "joined"),
    [(None, None, None), (None, "10.0.0.1:6379", "auto"), ("auto", None, "auto"), ("ray://a:1", "b:2", "ray://a:1")],
)
def test_a_submitted_job_joins_the_cluster_that_runs_it(
    monkeypatch: pytest.MonkeyPatch, address: str | None, environment: str | None, joined: str | None
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    assert address_of(Where(workers=1, address=address)) == joined
