"""The Hugging Face hub: a model directory fetched into its cache, or sent there in one commit.

Files that are in the cache whole are not fetched again; the hub's client moves a file into its
place when all of it has arrived, so that a download that was cut off goes on with the files that
are missing. An upload is one commit: readers see the old model or the new one. Files that the hub
has already, by their hash, are not sent again.

`HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HUB_CACHE` and `HF_TOKEN` count as everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from var_compressor.models.tensor_files import CheckpointError

README = "README.md"
PARTS = ("transformer", "vae", "text_encoder", "tokenizer")
# of a model directory; nothing that is unpickled
FILES = (
    "model_index.json",
    README,
    *(f"{part}/{kind}" for part in PARTS for kind in ("*.json", "*.safetensors")),
    "tokenizer/*.model",
)
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = re.compile(r"models--.+--.+")


def is_repo_id(name: str) -> bool:
    """Whether a name has the form of a hub id, "org/name"."""
    return _REPO_ID.fullmatch(name) is not None and ".." not in name


def is_ours(file: str) -> bool:
    """Whether a file of a repository belongs to a model directory."""
    return any(fnmatchcase(file, pattern) for pattern in FILES)


def how_to_get_again(path: Path, otherwise: str) -> str:
    """The way out for a file that is damaged or missing: in the hub's cache, to fetch it again."""
    if not any(_CACHED.fullmatch(part) for part in path.parts):
        return otherwise
    if not path.exists():
        return "open the model again, with a network, to download it"
    # a file there is a link to its content
    files = dict.fromkeys((path.resolve(), path))
    return f"delete {' and '.join(map(str, files))} and open the model again to download it"


def download(repo_id: str, *, revision: str | None) -> Path:
    """The folder of a model's files in the hub's cache, fetched as far as they are missing.

    Without a network the cache answers, if it has all of them.
    Raises: CheckpointError in one line.
    """
    from huggingface_hub import snapshot_download

    with _in_one_line(repo_id, revision):
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=list(FILES))
    return Path(folder)


def upload(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    *,
    token: str | None,
    private: bool,
    commit_message: str,
) -> str:
    """Make a repository hold exactly these files in its model's folders; the commit's address.

    The repository is created if it is not there; what else it holds stays.
    Raises: CheckpointError in one line.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    with _in_one_line(repo_id, None):
        api.create_repo(repo_id, private=private, exist_ok=True)
        there = api.list_repo_files(repo_id)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        operations += [CommitOperationDelete(name) for name in stale(there, files)]
        found = api.create_commit(repo_id, operations, commit_message=commit_message)
    return str(found.commit_url)


def stale(there: Sequence[str], files: Mapping[str, object]) -> list[str]:
    """What an earlier model has left in a repository, in the folders that are ours."""
    folders = tuple(f"{part}/" for part in PARTS)
    return sorted(name for name in there if name.startswith(folders) and name not in files)


@contextmanager
def _in_one_line(repo_id: str, revision: str | None) -> Iterator[None]:
    import huggingface_hub.errors as errors

    where = repo_id if revision is None else f"{repo_id} at {revision}"
    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{where}: its owner lets only those in who accepted its terms; accept them on the "
            "hub's page, then `hf auth login`, or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(
            f"{where}: the hub has no such revision; give a branch, tag or commit"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{where}: no such directory, and the hub gave no model of that id; check its "
            "spelling, or, for a private one, `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{where}: no such directory, the hub cannot be reached, and its cache has not all "
            f"of the model ({_reason(error)}); with a network, run it again: what is there stays"
        ) from None
    except errors.HfHubHTTPError as error:
        status = None if error.response is None else error.response.status_code
        login = "; `hf auth login`, or set HF_TOKEN" if status in (401, 403) else ""
        raise CheckpointError(f"{where}: the hub refused ({_reason(error)}){login}") from None
    # a connection's errors are of another library in each version of the hub's client
    except Exception as error:
        raise CheckpointError(
            f"{where}: the hub gave no answer ({_reason(error)}); run it again, what arrived stays"
        ) from error


def _reason(error: BaseException) -> str:
    # what went wrong at the bottom tells more than who passed it on
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
