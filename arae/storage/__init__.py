"""Where runs lie: a path that counts itself, or a URL (`ARAE_RUNS=s3://bucket/runs`) with a working copy on this disk.

`shared` is what a command holds while it works on a run, `mirrored` what each worker does; `fetched` brings a run for
commands that only read it. On a path all of them do nothing.

Environment: `ARAE_RUNS` (path or URL), `ARAE_SCRATCH` (copies, default `~/.cache/arae`), `ARAE_STORAGE_WAIT` (seconds
that a command waits at its start and end for storage that does not answer, default 60).
"""

from arae.storage.contents import glance
from arae.storage.fetching import fetch_runs, fetched
from arae.storage.place import runs_place, runs_root, scratch
from arae.storage.remote import Away, Remote, is_url, redacted, without_secrets
from arae.storage.sharing import Shared, mirrored, need_tracking_server, patiently, shared

__all__ = [
    "Away",
    "Remote",
    "Shared",
    "fetch_runs",
    "fetched",
    "glance",
    "is_url",
    "mirrored",
    "need_tracking_server",
    "patiently",
    "redacted",
    "runs_place",
    "runs_root",
    "scratch",
    "shared",
    "without_secrets",
]
