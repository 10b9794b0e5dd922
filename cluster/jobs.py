"""The job server of a Ray cluster, over HTTP: who may use it, following a job's log, and how a job ended."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from arae.errors import AraeError, InputError, Stopped
from cluster.tokens import Say, Token, read_token

if TYPE_CHECKING:
    import requests
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CONNECT_S, ANSWER_S = 10, 30
TAKES_S = 120  # what a server may take to receive the project, or to begin or stop a job
QUIET_S = 30.0  # a log that says nothing for so long may be a connection that is gone: the server is asked
LOST_S = 300.0  # a server that does not answer for so long is given up
STARTS_S = 60.0  # how long a cluster may take to start
AGAIN_S = 2.0
LET_GO_S = 2.0  # for connections to end once nobody follows any more
NO_COMMAND = 127  # a shell's, where there is no such command


@dataclass(frozen=True)
class Ended:
    """How a job ended, as Ray has it."""

    status: str
    code: int | None
    """Exit code of the command; negative for a signal; None where it was stopped, or never began."""
    message: str


class Jobs:
    """The job server of one cluster."""

    def __init__(self, address: str | None = None, say: Say | None = None) -> None:
        """Connect; InputError where no job server answers, or it asks for a token that is missing or wrong."""
        self.address = _address(address)
        self.say: Say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        token = read_token(self.say)
        headers = {"Authorization": f"Bearer {token.value}"} if token else {}
        _admitted(self.address, headers, token)
        host = urlsplit(self.address).hostname
        if token and self.address.startswith("http:") and host not in ("localhost", "127.0.0.1", "::1"):
            self.say(f"arae: the token goes to {host} unencrypted; a tunnel (ssh -L 8265:localhost:8265) protects it")
        import requests

        # Ray prefers this variable, and RAY_ADDRESS, to the address it is given; ours has been chosen already.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        try:
            self.client = _client(self.address, headers)
        except (requests.exceptions.RequestException, OSError) as error:
            raise InputError(f"--address {self.address}: the job server does not answer ({_reason(error)})") from None

    def submit(self, entrypoint: str, runtime_env: dict[str, Any], name: str | None) -> str:
        """Start a job and return its id: `name`, or a new one. What got no answer is sent again.

        Raises InputError where there is a job of that name already, AraeError where the server refuses it or is silent.
        """
        import requests

        job = name or f"arae-{secrets.token_hex(6)}"
        deadline, unanswered = time.monotonic() + STARTS_S, False
        while True:
            try:
                return self.client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env, submission_id=job)
            except RuntimeError as error:
                if "already exists" in str(error):
                    if unanswered and self.client.get_job_info(job).entrypoint == entrypoint:
                        return job
                    raise InputError(f"--name {name}: the cluster has a job of that name; choose another") from None
                # A cluster that has just been started answers before it can take jobs.
                if "try again later" not in str(error) or time.monotonic() > deadline:
                    raise AraeError(f"{self.address} refused the job ({_last_line(str(error))})") from None
            except requests.exceptions.RequestException as error:
                unanswered = True
                if time.monotonic() > deadline:
                    raise AraeError(
                        f"{self.address} did not answer when the job was sent ({_reason(error)}); `ray job list "
                        f"--address {self.address}` shows whether {job} has begun"
                    ) from None
            time.sleep(AGAIN_S)

    def ended(self, job: str) -> Ended | None:
        """How the job ended; None while it has not. InputError where there is no such job."""
        from ray.exceptions import AuthenticationError

        try:
            info = self.client.get_job_info(job)
        except AuthenticationError:
            raise InputError(f"{self.address}: the token is no longer the cluster's") from None
        except RuntimeError as error:
            if "does not exist" in str(error):
                raise InputError(f"{job}: there is no such job at {self.address}") from None
            raise
        if not info.status.is_terminal():
            return None
        return Ended(str(info.status), info.driver_exit_code, info.message or "")

    def stop(self, job: str) -> Ended:
        """Ask the job to stop and wait until it has; how it ended. Stopping a job that has ended does nothing."""
        if not self._until(lambda: self.ended(job) or False, job):
            self._until(lambda: self.client.stop_job(job), job)
        return self._until(lambda: self.ended(job), job)

    def follow(self, job: str) -> Ended:
        """Print the job's log on stdout until it ends, through interruptions of the network.

        Raises AraeError on Ctrl-C, and where the server does not answer any more: the job itself goes on.
        """
        loop = asyncio.new_event_loop()
        try:
            return loop.run_until_complete(self._follow(job))
        except KeyboardInterrupt:
            raise AraeError(
                f"no longer following {job}, which goes on; `arae submit --attach {job}` follows it again, "
                f"`arae submit --stop {job}` stops it"
            ) from None
        finally:
            _let_go(loop)

    async def _follow(self, job: str) -> Ended:
        shown = 0
        while True:
            shown = await self._tail(job, shown)
            ended = self._until(lambda: self.ended(job) or False, job)
            if ended:
                _show(self._until(lambda: self.client.get_job_logs(job), job)[shown:])  # what was written since
                return ended
            await asyncio.sleep(AGAIN_S)

    async def _tail(self, job: str, shown: int) -> int:
        """Print what one connection tells beyond the first `shown` characters, until it ends; how many there are."""
        stream, seen = self.client.tail_job_logs(job), 0
        waiting = asyncio.ensure_future(anext(stream, None))
        try:
            while True:
                done, _ = await asyncio.wait({waiting}, timeout=QUIET_S)
                if done:
                    text = _read(waiting)
                    if text is None:
                        return shown
                    seen += len(text)
                    if seen > shown:
                        _show(text[shown - seen :])
                        shown = seen
                    waiting = asyncio.ensure_future(anext(stream, None))
                elif self._until(lambda: self.ended(job) or False, job):
                    return shown
        finally:
            waiting.cancel()

    def _until(self, ask: Callable[[], Any], job: str) -> Any:
        """The first answer that is not None, through times when the server does not answer."""
        import requests

        deadline = time.monotonic() + LOST_S
        while True:
            try:
                if (answer := ask()) is not None:
                    return answer
                deadline = time.monotonic() + LOST_S
            except (requests.exceptions.RequestException, RuntimeError, OSError) as error:
                if time.monotonic() > deadline:
                    raise AraeError(
                        f"{self.address} does not answer any more ({_reason(error)}); "
                        f"where {job} goes on, `arae submit --attach {job}` follows it again"
                    ) from None
            time.sleep(AGAIN_S / 4)


def _let_go(loop: asyncio.AbstractEventLoop) -> None:
    """End what still runs in the loop, within seconds; `asyncio.run` would wait as long as a server is silent."""
    loop.set_exception_handler(lambda *_: None)
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=LET_GO_S))
    with suppress(TimeoutError):
        loop.run_until_complete(asyncio.wait_for(loop.shutdown_asyncgens(), LET_GO_S))
    loop.close()


def exit_code(job: str, ended: Ended) -> int:
    """The command's own exit code, which is 0, 1, 2 or 75.

    Raises Stopped where the job was stopped, and AraeError where the command did not come to an end of its own.
    """
    if ended.status == "SUCCEEDED":
        return 0
    if ended.status == "STOPPED":
        raise Stopped(f"{job} was stopped; the same command goes on from the run's newest state")
    if ended.code is None:
        raise AraeError(f"{job} did not run to its end ({_last_line(ended.message)}); the same command goes on")
    if ended.code < 0:
        raise AraeError(
            f"{job}: its command was killed by signal {-ended.code}; the same command goes on from the newest state"
        )
    if ended.code == NO_COMMAND:
        raise AraeError(
            f"{job}: the cluster's head has no such Python; start Ray with the environment's bin folder on its PATH, "
            "or give --python"
        )
    return ended.code


def _client(address: str, headers: dict[str, str]) -> JobSubmissionClient:
    """Ray's client, which would wait for ever for a server that accepts a connection and says nothing."""
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(  # type: ignore[override]
            self, method: str, endpoint: str, *, data: bytes | None = None, json_data: dict[str, Any] | None = None
        ) -> requests.Response:
            # While a body is sent, the first of the two holds for each piece of it.
            limit = (CONNECT_S, ANSWER_S) if method == "GET" else (ANSWER_S, TAKES_S)
            return super()._do_request(method, endpoint, data=data, json_data=json_data, timeout=limit)

    for chatty in ("dashboard_sdk", "job.sdk"):  # as they are imported they set levels of their own
        logging.getLogger(f"ray.dashboard.modules.{chatty}").setLevel(logging.WARNING)
    return Client(address, headers=headers)


def _address(given: str | None) -> str:
    address = (given or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS).rstrip("/")
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
        raise InputError(f"--address {address}: write the job server's URL, such as {DEFAULT_ADDRESS}")
    return address


def _admitted(address: str, headers: dict[str, str], token: Token | None) -> None:
    """InputError unless a job server answers and takes the token."""
    try:
        import requests
    except ImportError:
        raise InputError("arae submit needs Ray: pip install 'arae[cluster]'") from None
    try:
        answer = requests.get(
            f"{address}/api/version", headers=headers, timeout=(CONNECT_S, ANSWER_S), allow_redirects=False
        )
    except requests.exceptions.RequestException as error:
        raise InputError(
            f"--address {address}: no job server answers ({_reason(error)}); is the cluster up, and its dashboard's "
            "port reached from here?"
        ) from None
    if answer.status_code == 401:
        raise InputError(
            f"--address {address}: this cluster asks for a token, and there is none here; set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH to a file with the cluster's"
        )
    if answer.status_code == 403:
        shown = f"the token from {token.source} is wrong" if token else "access without a token is forbidden"
        raise InputError(f"--address {address}: {shown}; it must be the one that the cluster was started with")
    if answer.status_code != 200 or "ray_version" not in answer.text:
        raise InputError(f"--address {address}: what answers is no Ray job server (HTTP {answer.status_code})")


def _read(waiting: asyncio.Future[str | None]) -> str | None:
    """What came, None where the connection has ended in whatever way: the server is asked then."""
    import aiohttp

    try:
        return waiting.result()
    except (aiohttp.ClientError, RuntimeError, OSError):
        return None


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _reason(error: BaseException) -> str:
    known = re.search(r"\[Errno -?\d+\] ([^)'\"\]]+)", str(error))
    return known[1].strip() if known else type(error).__name__


def _last_line(text: str) -> str:
    return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "no reason given")
