"""A model's folder to a repository of the hub, in one commit: half of a model is never visible there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, errors, get_token
from huggingface_hub.utils._validators import validate_repo_id

from rcpo.config.fields import key
from rcpo.errors import ConfigError, RunError
from rcpo.system.text import first_line

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


@dataclass(kw_only=True)
class PushConfig:
    """How `rcpo push` uploads `final/`."""

    private: bool = key(True, "make the repository private; a public one that exists is then refused")
    revision: str = key("main", "branch to commit to, made from main where it does not exist")
    message: str | None = key(None, "message of the commit; null: one that names the run")
    dry_run: bool = key(False, "list what would be sent, and send nothing")


def files_of(folder: Path) -> list[Path]:
    """The files that are sent, by name; hidden ones stay here."""
    found = [(path.relative_to(folder).parts, path) for path in folder.rglob("*") if path.is_file()]
    return sorted(path for parts, path in found if not any(part.startswith(".") for part in parts))


def check_repo(repo: str) -> None:
    """Raise ConfigError for what cannot be a repository's name with its owner."""
    try:
        validate_repo_id(repo)
    except errors.HFValidationError as error:
        raise ConfigError(f"repo={repo} cannot be a name on the hub: {first_line(error)}") from error
    if "/" not in repo:
        raise ConfigError(f"repo={repo} lacks its owner: give repo=OWNER/{repo}")


def upload(folder: Path, repo: str, settings: PushConfig, message: str) -> str:
    """Send the files of a folder and return the address of the commit.

    Raises ConfigError for a repository that may not be written, RunError for an upload that failed.
    """
    if get_token() is None:
        raise ConfigError(f"repo={repo}: this machine has no token of the hub; {LOG_IN}")
    api = HfApi(library_name="rcpo")
    operations = [
        CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files_of(folder)
    ]
    try:
        _have_repo(api, repo, settings)
        commit = api.create_commit(repo, operations, commit_message=message, revision=settings.revision)
    except errors.HfHubHTTPError as error:
        raise _explained(repo, error) from error
    except ConfigError:
        raise
    except Exception as error:  # the network's, of whichever library speaks HTTP for the hub's
        raise RunError(
            f"repo={repo}: the upload failed ({type(error).__name__}: {first_line(error)}); nothing was "
            "committed, and the same command sends what is missing"
        ) from error
    return str(commit.commit_url)


def _have_repo(api: HfApi, repo: str, settings: PushConfig) -> None:
    """Make the repository and the branch where they do not exist.

    Raises ConfigError for a public repository where a private one is asked for.
    """
    try:
        private = api.repo_info(repo).private
    except errors.RepositoryNotFoundError:
        api.create_repo(repo, private=settings.private, exist_ok=True)
        private = settings.private
    if settings.private and not private:
        raise ConfigError(
            f"repo={repo} is public: what is sent there everybody can read; add push.private=false if you "
            "mean that, or choose another repository"
        )
    if settings.revision != "main":
        api.create_branch(repo, branch=settings.revision, exist_ok=True)


def _explained(repo: str, error: errors.HfHubHTTPError) -> Exception:
    """The error with its remedy."""
    status = error.response.status_code
    if status == 401:
        return ConfigError(f"repo={repo}: the hub does not accept this machine's token; {LOG_IN}")
    if status == 403:
        return ConfigError(
            f"repo={repo}: the hub refuses ({first_line(error)}): your token may not write there; choose a "
            "repository of your own, or a token that may write"
        )
    reason = error.server_message or first_line(error)
    return RunError(f"repo={repo}: the hub answered with status {status}: {reason}; nothing was committed")
