"""Jobs before they are sent: what is packed, what is handed on, what is refused; and how a job's end is told."""

import json
import os
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath

import pytest
import ray
from training import tiny_recipe

from arae.cli import main
from arae.cli.clusters import parsed
from arae.config import dump_recipe
from arae.errors import AraeError, InputError, Stopped
from cluster import jobs
from cluster.jobs import Ended, Jobs, exit_code
from cluster.package import package
from cluster.submit import Job, environment, prepare
from cluster.tokens import read_token

KEPT = ("arae/data/load.py", "arae/cli.py", "README.md", "my recipes/a.yaml")
LEFT_OUT = (
    *(".git/config", ".venv/bin/python", "data/images.npz", "runs/demo/log.jsonl", "sub/tiny.beton", "mlruns/0/meta"),
    *("arae/__pycache__/cli.pyc", ".pytest_cache/README.md", "arae.egg-info/PKG-INFO", "node_modules/a.js"),
    *(".env", "sub/auth_token", "server.key", ".aws/credentials"),
)


def make(project: Path, names: tuple[str, ...], size: int = 10) -> None:
    for name in names:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(b"x" * size)


def git(project: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(project), *words], check=True, capture_output=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with what belongs to a project, and what does not."""
    folder = tmp_path / "project"
    make(folder, KEPT + LEFT_OUT)
    return folder


@pytest.mark.parametrize("tracked", [False, True])
def test_a_package_holds_the_project_and_no_more(project: Path, tracked: bool) -> None:
    ignored = ("notes/secret.txt", ".gitignore")
    if tracked:  # even where all of it was once added by force
        (project / ".git" / "config").unlink()
        git(project, "init", "-q")
        git(project, "add", "-f", ".")
        make(project, ignored)
        (project / ".gitignore").write_text("notes/\n")
    (project / "link.py").symlink_to("arae/cli.py")
    (project / "linked").symlink_to(project / "data")
    names = {str(name) for name in package(project).sizes}
    assert names == {*KEPT, "link.py", *((".gitignore",) if tracked else ())}


def test_runs_inside_the_project_stay_there(project: Path) -> None:
    make(project, ("here/tiny/log.jsonl",))
    assert package(project).holds(PurePosixPath("here/tiny"))
    left = package(project, without=[project / "here", project.parent])  # the runs' folder may hold the project
    assert not left.holds(PurePosixPath("here/tiny"))
    assert left.holds(PurePosixPath("arae/data"))


def test_the_zip_is_the_files_and_the_same_each_time(project: Path, tmp_path: Path) -> None:
    packed = package(project)
    first, second = tmp_path / "a.zip", tmp_path / "b.zip"
    packed.write(first)
    os.utime(project / KEPT[0], (1, 1))
    assert packed.write(second) == second.stat().st_size
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        archive.extractall(tmp_path / "there")
    for name in KEPT:
        assert (tmp_path / "there" / name).read_bytes() == (project / name).read_bytes()


@pytest.mark.parametrize(("limit", "fits"), [(3000 + 40, True), (3000 + 39, False)])
def test_a_package_too_large_is_refused_with_what_is_largest(project: Path, limit: int, fits: bool) -> None:
    make(project, ("weights/a.bin", "weights/b.bin", "big.tar"), 1000)
    if fits:
        assert package(project, limit=limit).size == limit
        return
    with pytest.raises(InputError, match=r"big\.tar.*\.gitignore") as refused:
        package(project, limit=limit)
    assert "weights/a.bin" in str(refused.value)
    assert "arae" not in str(refused.value).partition("largest")[2]


def test_no_project(tmp_path: Path) -> None:
    for folder, said in ((tmp_path / "none", "no such folder"), (tmp_path, "nothing to send")):
        with pytest.raises(InputError, match=said):
            package(folder)


@pytest.mark.parametrize(
    ("given", "names", "said"),
    [
        ({"ARAE_RUNS": None}, (), "ARAE_RUNS is not set"),
        ({"ARAE_RUNS": "runs"}, (), "ARAE_RUNS=runs"),
        ({"ARAE_SCRATCH": "scratch"}, (), "ARAE_SCRATCH=scratch"),
        ({"ARAE_RUNS": "s3://key:word@bucket/runs"}, (), "ARAE_RUNS looks like a secret"),
        ({"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}, (), "MLFLOW_TRACKING_URI"),
        ({"MLFLOW_TRACKING_URI": "mlruns"}, (), "MLFLOW_TRACKING_URI"),
        ({"MLFLOW_TRACKING_URI": "http://me:word@server"}, (), "MLFLOW_TRACKING_URI looks like a secret"),
        ({"AWS_REGION": "x"}, ("AWS_REGION",), "AWS_REGION looks like a secret"),
        ({"MY_PASSWORD": "x"}, ("MY_PASSWORD",), "before `ray start`"),
        ({"RAY_AUTH_TOKEN": "x"}, ("RAY_AUTH_TOKEN",), "RAY_AUTH_TOKEN looks like a secret"),
        ({"db": "postgres://me:word@db/x"}, ("db",), "db looks like a secret"),
        ({}, ("NOT_THERE",), "--env NOT_THERE"),
        ({"A": "b"}, ("A=b",), "--env A=b"),
    ],
)
def test_what_is_not_handed_on(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str | None], names: tuple[str, ...], said: str
) -> None:
    for name, value in given.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as refused:
        environment(names)
    assert said in str(refused.value)
    assert "word" not in str(refused.value).replace("MY_PASSWORD", "")


@pytest.mark.parametrize("store", [None, "http://server:5000", "sqlite:////shared/mlflow.db", "/shared/mlruns"])
def test_what_is_handed_on(monkeypatch: pytest.MonkeyPatch, store: str | None) -> None:
    monkeypatch.setenv("ARAE_RUNS", "s3://bucket/runs")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not for others")
    expected = {"ARAE_RUNS": "s3://bucket/runs", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if store is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
        expected["MLFLOW_TRACKING_URI"] = store
    assert environment(["CUBLAS_WORKSPACE_CONFIG"]) == expected


def words(project: Path, *typed: object) -> str:
    """What the job's shell runs, from the name of the command on."""
    job = Job(parsed(["arae", *map(str, typed)]), project=project)
    return prepare(job).entrypoint.partition(" -m ")[2]


def test_the_command_as_it_runs_in_the_job(
    project: Path, tmp_path: Path, tiny_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project / "my recipes")
    recipe = dump_recipe(tiny_recipe(tiny_npz))
    (project / "my recipes" / "a.yaml").write_text(recipe)
    (tmp_path / "shared.yaml").write_text(recipe)
    inside, shared = "'my recipes/a.yaml'", tmp_path / "shared.yaml"
    for typed, runs in (
        (("train", "a.yaml", "seed=4"), f"arae train {inside} seed=4"),
        (
            ("train", project / "my recipes" / "a.yaml", "--workers", 2),
            f"arae train --address auto {inside} --workers 2",
        ),
        (("train", "--workers", 2, "--address", "x", "a.yaml"), f"arae train --workers 2 --address x {inside}"),
        (("train", shared), f"arae train {shared}"),
        (("train", "/nowhere/here.yaml"), "arae train /nowhere/here.yaml"),
        (("demo",), "arae demo --address auto"),
        (("demo", "--workers", 0), "arae demo --workers 0"),
        (("encode", "mnist", "/shared/x.beton"), "arae encode mnist /shared/x.beton"),
    ):
        assert words(project, *typed) == runs


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("train", "../runs/a.yaml"), "is not sent with the job"),
        (("train", "no-such-recipe"), "no recipe 'no-such-recipe'"),
        (("train", "a.yaml", "data.train=tiny.npz"), "data.train: tiny.npz is relative"),
        (("demo", "data.source=photos"), "data.source: photos is relative"),
        (("train", "a.yaml", "encoder.weights=https://me:word@host/x"), "a password in a command"),
        (("encode", "a.yaml", "/shared/x.beton"), "encode: a.yaml is relative"),
        (("encode", "mnist", "x.beton"), "encode x.beton"),
        (("submit", "--", "arae", "train", "demo"), "runs here"),
        (("ui",), "runs here"),
        (("trane", "demo"), "write a command of arae's"),
    ],
)
def test_what_would_not_work_in_the_job_is_refused(
    project: Path, tiny_npz: Path, monkeypatch: pytest.MonkeyPatch, typed: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(project / "my recipes")
    for path in (project / "my recipes" / "a.yaml", project / "runs" / "a.yaml"):
        path.write_text(dump_recipe(tiny_recipe(tiny_npz)))
    with pytest.raises(InputError) as refused:
        words(project, *typed)
    assert said in str(refused.value)
    assert "word@" not in str(refused.value)


@pytest.mark.parametrize(
    ("ended", "code", "said"),
    [
        (Ended("SUCCEEDED", 0, ""), 0, ""),
        (Ended("FAILED", 2, ""), 2, ""),
        (Ended("FAILED", 75, ""), 75, ""),
        (Ended("FAILED", 1, ""), 1, ""),
        (Ended("STOPPED", None, ""), 75, "was stopped; the same command goes on"),
        (Ended("FAILED", -9, ""), 1, "killed by signal 9"),
        (Ended("FAILED", 127, ""), 1, "--python"),
        (Ended("FAILED", None, "Traceback\nno node left\n"), 1, "no node left"),
    ],
)
def test_exit_codes_are_the_commands_own(ended: Ended, code: int, said: str) -> None:
    if not said:
        assert exit_code("j", ended) == code
        return
    with pytest.raises(Stopped if code == 75 else AraeError, match=said) as raised:
        exit_code("j", ended)
    assert raised.value.exit_code == code


@pytest.fixture
def no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token; returns it."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_where_a_token_is_looked_for(no_token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    assert read_token(told.append) is None
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(InputError, match="there is no token here"):
        read_token(told.append)
    assert not list(no_token.iterdir())  # Ray would have made one
    default, own = no_token / ".ray" / "auth_token", no_token / "own"
    default.parent.mkdir()
    for path, value in ((default, "default"), (own, "own\n")):
        path.touch(mode=0o600)
        path.write_text(value)
    for name, value, expected in (
        ("RAY_AUTH_MODE", "token", "default"),
        ("RAY_AUTH_TOKEN_PATH", str(own), "own"),
        ("RAY_AUTH_TOKEN", "direct", "direct"),
    ):
        monkeypatch.setenv(name, value)
        token = read_token(told.append)
        assert token is not None
        assert token.value == expected
    assert told == []
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert read_token(told.append) is None


@pytest.mark.parametrize(("content", "said"), [(None, "No such file"), ("", "no token"), ("two words", "no token")])
def test_a_file_without_a_token(
    no_token: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, said: str
) -> None:
    path = no_token / "token"
    if content is not None:
        path.write_text(content)
        path.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    told: list[str] = []
    with pytest.raises(InputError, match=said):
        read_token(told.append)
    assert bool(told) == (content is not None)  # others can read it


@pytest.mark.usefixtures("no_token")
def test_an_address_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused, and nobody else's
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
        with pytest.raises(InputError, match=r"no job server answers \(Connection refused\)") as refused:
            Jobs()
    assert address in str(refused.value)
    for wrong in ("auto", "ray://head:10001", "head:8265", "http://"):
        with pytest.raises(InputError, match="the job server's URL"):
            Jobs(wrong)


@pytest.fixture
def silent() -> Iterator[tuple[str, threading.Event]]:
    """A job server that says its version, and from the event on accepts connections and says nothing."""
    version = b'{"ray_version": "' + ray.__version__.encode() + b'"}'
    answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(version), version)
    quiet, kept = threading.Event(), list[socket.socket]()

    def serve() -> None:
        with suppress(OSError):  # closed, in the end
            while True:
                kept.append(listening.accept()[0])
                if not quiet.is_set():
                    kept[-1].recv(65536)
                    kept[-1].sendall(answer)
                    kept.pop().close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", quiet
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()
    for each in kept:
        each.close()


@pytest.mark.usefixtures("no_token")
def test_a_server_that_accepts_and_never_answers(
    silent: tuple[str, threading.Event], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, quiet = silent
    for limit in ("ANSWER_S", "TAKES_S", "LOST_S", "STARTS_S", "AGAIN_S"):
        monkeypatch.setattr(jobs, limit, 0.2)
    server = Jobs(address)
    quiet.set()
    (tmp_path / "project.zip").write_bytes(b"PK")
    for env in ({}, {"working_dir": str(tmp_path / "project.zip")}):
        with pytest.raises(AraeError, match=r"did not answer when the job was sent \(ReadTimeout\)") as error:
            server.submit("true", env, None)
        assert "\n" not in str(error.value)
    with pytest.raises(AraeError, match=r"does not answer any more \(ReadTimeout\)"):
        server.stop("job")
    with pytest.raises(InputError, match="no job server answers"):
        Jobs(address)
    assert address in str(error.value)


@pytest.fixture
def forgetful() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A job server that takes a job and hangs up without an answer, the first time; the jobs that it took."""
    taken: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = [job for job in taken if self.path == f"/api/jobs/{job['submission_id']}"]
            job = {"type": "SUBMISSION", "status": "RUNNING", **known[0]} if known else {}
            self.answer(200, json.dumps({"ray_version": ray.__version__, "version": "4"} | job))

        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if any(job["submission_id"] == sent["submission_id"] for job in taken):
                self.answer(500, f"ValueError: Job with submission_id {sent['submission_id']} already exists.")
                return
            taken.append({name: sent[name] for name in ("submission_id", "entrypoint")})
            if len(taken) == 1:
                self.close_connection = True  # nothing was said
            else:
                self.answer(200, json.dumps({"job_id": None, "submission_id": sent["submission_id"]}))

        def answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", taken
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("no_token")
def test_what_got_no_answer_is_sent_again_and_starts_one_job(
    forgetful: tuple[str, list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, taken = forgetful
    monkeypatch.setattr(jobs, "AGAIN_S", 0.01)
    server = Jobs(address)
    job = server.submit("true", {}, None)
    assert [one["submission_id"] for one in taken] == [job]
    assert server.submit("true", {}, "named") == "named"
    with pytest.raises(InputError, match="--name named: the cluster has a job of that name"):
        server.submit("true", {}, "named")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ([], "arae submit: give a command"),
        (["--stop", "x", "--attach", "y"], "arae submit: give a command"),
        (["--stop", "x", "--", "arae", "doctor"], "arae submit: give a command"),
        (["--", "ls", "-l"], "write a command of arae's"),
        (["--", "arae", "train", "demo", "--workerz", "2"], "--workerz"),
        (["arae", "train"], "RECIPE"),
    ],
)
def test_what_is_wrong_with_the_words_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["arae", "submit", *typed])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
