"""Use the Hugging Face Hub: offline mode, paths of adapters, uploads, and messages for its errors."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import unquote, urlsplit

import httpx2
from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not in an __all__

from philora.errors import ConfigError, RunError, fault
from philora.runtime.process_state import is_run


def reach() -> dict[str, Any]:
    """Return options of a download: without a network, only the hub's cache is used.

    The hub library's own retries would take a minute.
    """
    return {"local_files_only": True} if constants.HF_HUB_OFFLINE or _has_no_network(constants.ENDPOINT) else {}


@contextlib.contextmanager
def datasets_from_cache() -> Iterator[None]:
    """Read datasets from the hub's cache in this block if there is no network.

    `datasets` has no option for it, so it is set for the process, and only in a run.
    """
    import datasets

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not is_run():
        yield
        return
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = before[0] or _has_no_network(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _has_no_network(endpoint: str) -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return False
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, 443)
    except OSError:
        return True
    return False


_REVISION: Final = r"refs/pr/\d+|refs/convert/[^/@]+|[^/@]+"
_HUB_PATH: Final = re.compile(
    rf"(?:hf://)?(?P<repo_id>[\w.-]+/[\w.-]+)(?:@(?P<first>{_REVISION}))?(?P<subfolder>(?:/[^/@]+)*)/?"
    r"(?:@(?P<last>[^@]+))?"
)


class HubPath(NamedTuple):
    """A folder of a repository on the Hub.

    Attributes:
        repo_id: `OWNER/NAME`.
        subfolder: The folder in it; empty for the repository itself.
        revision: Branch, tag or commit; None for the main branch.
    """

    repo_id: str
    subfolder: str
    revision: str | None


def parse_hub_path(name: str) -> HubPath | None:
    """Parse `OWNER/NAME[@REVISION][/SUB/FOLDER]`; return None if a name has another form.

    The revision may also be at the end, and `hf://` in front, as in Hugging Face's own paths. A branch with a slash has
    to be at the end, or the slash is written %2F.

    Example:
        >>> parse_hub_path("me/adapters/support@v2")
        HubPath(repo_id='me/adapters', subfolder='support', revision='v2')
        >>> parse_hub_path("hf://me/adapters@v2/support") == parse_hub_path("me/adapters/support@v2")
        True
    """
    found = _HUB_PATH.fullmatch(name)
    if found is None or (found["first"] and found["last"]):
        return None
    subfolder = found["subfolder"].strip("/")
    if any(part in (".", "..") for part in (*subfolder.split("/"), *found["repo_id"].split("/"))):
        return None
    revision = found["first"] or found["last"]
    return HubPath(found["repo_id"], subfolder, None if revision is None else unquote(revision))


def download_adapter(place: HubPath) -> Path:
    """Download an adapter's files into the Hub's cache, and return their folder.

    Raises:
        HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError: The download failed.
    """
    inside = f"{place.subfolder}/" if place.subfolder else ""
    names = ("*.json", "*.jinja", "adapter_model.safetensors", "tokenizer*")
    snapshot = snapshot_download(
        place.repo_id,
        revision=place.revision,
        allow_patterns=[inside + name for name in names],
        ignore_patterns=[f"{inside}*/*"],
        **reach(),
    )
    return Path(snapshot, place.subfolder)


def adapter_subfolders(place: HubPath) -> list[str]:
    """Return the folders of a repository that have an adapter; empty if the files cannot be listed."""
    with contextlib.suppress(HfHubHTTPError, OSError):
        files = HfApi().list_repo_files(place.repo_id, revision=place.revision)
        return sorted(name.rpartition("/")[0] for name in files if name.endswith("/adapter_config.json"))
    return []


def check_repo_id(repo_id: str, where: str, name: str = "repo_id") -> None:
    """Refuse a name that no repository can have.

    Raises:
        ConfigError: The name has a space, two slashes, a dot at its end or the like.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        expected = "a repository such as OWNER/NAME: letters, digits and - _ . between them"
        raise ConfigError(fault(where, name, repo_id, expected, f"The hub says: {_first_line(error)}")) from error


def require_token(where: str, token: str | None = None) -> str:
    """Return the given token, else that of `HF_TOKEN` or of the login.

    Raises:
        ConfigError: There is none.
    """
    found = token or get_token()
    if found is None:
        todo = "Set HF_TOKEN, or log in: hf auth login"
        raise ConfigError(fault(where, "token", None, "a token with write access", todo))
    return found


def create_repository(repo_id: str, token: str, private: bool | None, where: str) -> str:
    """Create a repository if it does not exist, and return its full name.

    Raises:
        ConfigError: The token is invalid, or has no write access.
        RunError: The Hub cannot be reached, or refuses for another reason.
    """
    with _explained(where, repo_id, token):
        return str(HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id)


def files(repo_id: str, token: str, where: str) -> list[str]:
    """Return the paths of a repository's files. It raises what `create_repository` does."""
    with _explained(where, repo_id, token):
        return list(HfApi(token=token).list_repo_files(repo_id))


def upload(folder: Path, repo_id: str, token: str, message: str, where: str, *, remove: Sequence[str] = ()) -> str:
    """Upload a folder's files to a repository and remove others in one commit; return the URL of the commit.

    Raises:
        ConfigError, RunError: As `create_repository`.
    """
    with _explained(where, repo_id, token):
        api = HfApi(token=token)
        commit = api.upload_folder(
            folder_path=folder,
            repo_id=repo_id,
            commit_message=message,
            delete_patterns=[glob.escape(name) for name in remove] or None,
        )
        return str(commit.commit_url)


@contextlib.contextmanager
def _explained(where: str, repo_id: str, token: str) -> Iterator[None]:
    """Turn the Hub's errors into one message, without the token."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        said = f"The hub says: {_first_line(error)}".replace(token, "***")
        if status == 401:
            todo = f"Make one with write access at {constants.ENDPOINT}/settings/tokens. {said}"
            raise ConfigError(fault(where, "token", "***", "a token that the hub knows", todo)) from None
        if status in (403, 404):
            expected = "a repository that the token may write to"
            raise ConfigError(fault(where, "repo_id", repo_id, expected, said)) from None
        raise RunError(fault(where, "repo_id", repo_id, "the hub to take the files", said)) from None
    except (httpx2.HTTPError, OSError) as error:  # offline mode is an OSError too
        said = f"{type(error).__name__}: {_first_line(error)}".replace(token, "***")
        todo = f"Connect and try again; nothing is lost. {said}"
        raise RunError(fault(where, "repo_id", repo_id, f"a connection to {constants.ENDPOINT}", todo)) from None


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]
