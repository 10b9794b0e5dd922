"""The project as the package of a job: which files it holds, how large they are, and the zip that is sent."""

from __future__ import annotations

import os
import subprocess
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from arae.errors import InputError

LIMIT_BYTES = 100 * 2**20  # as much as Ray's job server takes in one request
AT_THE_TOP = frozenset({"data", "runs", "mlruns", "build", "dist"})  # `arae/data` is code
ANYWHERE = (
    *(".git", ".hg", ".venv", "venv", "__pycache__", "node_modules", ".tmp", ".*_cache", ".cache", "*.egg-info"),
    *("*.beton", "*.pyc"),
    # A package is kept in the cluster's memory, where everybody on it can read it.
    *(".env", ".env.*", ".netrc", ".aws", ".ssh", ".ray", "auth_token", "*.pem", "*.key"),
)
GIT_SECONDS = 60
EPOCH = (1980, 1, 1, 0, 0, 0)  # the least time that a zip can tell


@dataclass(frozen=True)
class Package:
    """The files of a project that a job gets."""

    project: Path
    """The folder, absolute."""
    sizes: dict[PurePosixPath, int]
    """Bytes of each file, by its path in the project, in the order of the names."""

    @property
    def size(self) -> int:
        """Bytes of all files, not compressed."""
        return sum(self.sizes.values())

    def holds(self, path: PurePosixPath) -> bool:
        """Whether the path, as in the project, is one of the files or a folder with some of them."""
        return path in self.sizes or any(path in file.parents for file in self.sizes)

    def write(self, dest: Path) -> int:
        """Write the zip and return its bytes; the same files always give the same zip, so that none is sent twice."""
        with zipfile.ZipFile(dest, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in self.sizes:
                file = self.project / name
                entry = zipfile.ZipInfo(str(name), EPOCH)
                entry.external_attr = (file.stat().st_mode & 0o755 | 0o600) << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, file.read_bytes())
        return dest.stat().st_size


def package(project: Path, without: Iterable[Path] = (), limit: int = LIMIT_BYTES) -> Package:
    """Choose a project's files: what git does not ignore, where git knows the folder; else all but the usual leavings.

    Left out in either case are data, runs, environments, caches, `.beton` files, what looks like a secret, and
    whatever lies in the folders `without`. Links to files count as files; links to folders are left out.

    Raises InputError: no such folder, nothing in it, or more than `limit` bytes, with the largest entries named.
    """
    project = project.absolute()
    if not project.is_dir():
        raise InputError(f"--project {project}: no such folder")
    apart = [path for path in map(Path.absolute, without) if project in path.parents]
    sizes = {
        name: (project / name).stat().st_size
        for name in sorted(set(_of_git(project) or _walked(project)))
        if _wanted(name) and (project / name).is_file() and not any((project / name).is_relative_to(a) for a in apart)
    }
    found = Package(project, sizes)
    if not sizes:
        raise InputError(f"--project {project}: there is nothing to send in it but what is left out")
    if found.size > limit:
        entries = Counter[str]()
        for name, size in sizes.items():
            entries["/".join(name.parts[:2])] += size
        largest = ", ".join(f"{name} {mebibytes(size)}" for name, size in entries.most_common(3))
        raise InputError(
            f"{project}: {mebibytes(found.size)} is more than the {mebibytes(limit)} that a job may bring; the largest "
            f"are {largest}: put data on storage that all nodes see, or name these in .gitignore"
        )
    return found


def mebibytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**20:.1f} MiB"


def _wanted(name: PurePosixPath) -> bool:
    if name.parts[0] in AT_THE_TOP:
        return False
    return not any(fnmatch(part, pattern) for part in name.parts for pattern in ANYWHERE)


def _of_git(project: Path) -> list[PurePosixPath]:
    """What git tracks or would track; nothing where there is no git, no repository, or all of it is ignored."""
    command = ["git", "-C", str(project), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return []
    return [PurePosixPath(os.fsdecode(name)) for name in done.stdout.split(b"\0") if name]


def _walked(project: Path) -> Iterator[PurePosixPath]:
    for folder, folders, files in os.walk(project):
        here = PurePosixPath(Path(folder).relative_to(project).as_posix())
        folders[:] = [name for name in folders if _wanted(here / name)]
        yield from (here / name for name in files)
