"""Repositories on a hub: the only place that asks one, and what it answers in words that say what to do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path

from llmq.errors import ModelUnavailable
from llmq.models.demo import Progress

FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]


def download(repo: str) -> Iterator[Progress]:
    """Fetch a repository in a thread, reporting how long that has been going on."""
    started = time.monotonic()
    fetched: Future = Future()

    def fetch() -> None:
        try:
            fetched.set_result(snapshot(repo, local_only=False))
        except BaseException as error:  # handed to whoever waits
            fetched.set_exception(error)

    # A daemon: neither a stop nor the end of the program waits for gigabytes; what has arrived serves the next try.
    threading.Thread(target=fetch, name="hub-download", daemon=True).start()
    while wait([fetched], timeout=0.5).not_done:
        yield Progress(0.0, f"fetching {repo} from the hub ({time.monotonic() - started:.0f} s)")
    fetched.result()


def snapshot(repo: str, *, local_only: bool) -> Path:
    """The folder a repository is in; with `local_only` nothing is fetched. Raises ModelUnavailable."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=FILES, local_files_only=local_only))
    except GatedRepoError as error:
        raise ModelUnavailable(
            f"{repo} is gated: accept its licence on the hub, then set the HF_TOKEN environment variable. "
            "The model 'demo' needs neither."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelUnavailable(
            f"the hub has no repository {repo!r}, or it is private and HF_TOKEN is not set"
        ) from error
    except HFValidationError as error:
        raise ModelUnavailable(f"{repo!r} is no name a hub knows: {error}") from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            raise ModelUnavailable(f"the hub refused {repo}: the token in HF_TOKEN is wrong or has expired") from error
        raise _unreachable(repo) from error
    except OSError as error:
        on_disk = (error.errno or 0) > 0 and not isinstance(error, ConnectionError | TimeoutError)
        if on_disk:
            raise ModelUnavailable(f"cannot store {repo} in the hub's cache (HF_HOME moves it): {error}") from error
        raise _unreachable(repo) from error
    except Exception as error:  # the hub's client raises its transport's own errors, and changes transports
        raise _unreachable(repo) from error


def _unreachable(repo: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"{repo} is not in the local cache and the hub cannot be reached. The model 'demo' needs no hub."
    )
