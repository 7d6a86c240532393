"""Weights in the Hugging Face cache of this machine: found by name and revision, never fetched.

The cache's layout is documented ("Understand caching" in the huggingface_hub documentation) and read
as it is, so that package need not be installed: ``models--ORGANISATION--NAME/refs/REVISION`` holds the
commit that a branch or tag stood for when it was fetched, and ``snapshots/COMMIT`` that commit's files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from servebench.errors import LaunchError

#: Files that hold a whole network, the one to prefer first.
_FILES = ("model.safetensors", "pytorch_model.bin")
_PART = r"\w[\w.-]*"
_NAME = re.compile(rf"(?P<repository>{_PART}(?:/{_PART})?)(?:@(?P<revision>{_PART}(?:/{_PART})*))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubWeights:
    """A file of weights in the cache, and what it is."""

    repository: str
    revision: str  #: as asked for
    commit: str
    path: Path

    @property
    def origin(self) -> str:
        """For people."""
        return f"hub cache, {self.repository}@{self.revision}, commit {self.commit}, {self.path.name}"


def check_hub_name(name: str) -> str:
    """``name`` itself, if it can be one of a repository; `ValueError` says how they look."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"found {name!r}, expected ORGANISATION/NAME or ORGANISATION/NAME@REVISION, as on huggingface.co")
    return name


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where the cache is, by the variables that huggingface_hub reads, in its order."""
    home = environment.get("HF_HOME") or f"{environment.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    folder = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(folder)).expanduser()


def find_weights(name: str, environment: Mapping[str, str]) -> HubWeights:
    """The weights of ``ORGANISATION/NAME[@REVISION]`` (``main`` when omitted); a branch, a tag or a whole commit hash.

    `LaunchError` for what is not in the cache: it names the folder and the command that fetches it.
    """
    match = _NAME.fullmatch(name)
    assert match is not None, name
    repository, revision = match["repository"], match["revision"] or "main"
    folder = cache_folder(environment) / f"models--{repository.replace('/', '--')}"
    reference = folder / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    for file in _FILES:
        if (snapshot / file).is_file():
            return HubWeights(repository, revision, commit, snapshot / file)
    split = [file for file in _FILES if (snapshot / f"{file}.index.json").is_file()]
    if split:
        raise LaunchError(f"weights_hub: {repository} keeps {split[0]} in several files ({snapshot}); one file is needed")
    fetch = f"hf download {repository} {_FILES[0]}" + (f" --revision {revision}" if match["revision"] else "")
    raise LaunchError(
        f"weights_hub: neither {' nor '.join(_FILES)} of {repository}@{revision} is in {folder}; "
        f"fetch it first, servebench downloads nothing: {fetch}"
    )
