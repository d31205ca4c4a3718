"""Repositories on a hub: the only place that asks one, and what it answers in words that say what to do."""

from __future__ import annotations

import glob
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from llmq.errors import BadChoice, ModelUnavailable, UserError
from llmq.events import Progress
from llmq.models.checkpoint import require_model, weight_files
from llmq.models.shared_work import Abandoned, shared_work

SETTINGS = re.compile(r"[^/]+\.(json|jinja|model)|merges\.txt|vocab\.txt|additional_chat_templates/[^/]+\.jinja")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ADDRESS = re.compile(  # of a repository's page, of a revision of it, or of its git
    r"(?:\w+://)?(?:git@|www\.)?(?:huggingface\.co|hf\.co)[/:](?P<repo>(?!datasets/|spaces/)[^/?#]+/[^/?#]+?)(?:\.git)?"
    r"(?:/(?:tree|commit)/(?P<revision>[^/?#]+))?/?(?:[?#].*)?"
)
LARGE_BYTES = 1e9  # a download from here on says its size
_HERE = "choose one that is here, such as 'demo'"
_NOT_HERE = f"%s is not on this server, which fetches nothing for visitors; {_HERE}"
_UNREACHABLE = "%s is not in the local cache and the hub cannot be reached. The model 'demo' needs no hub."


@dataclass(frozen=True)
class Download:
    """`bytes` to fetch, `free_bytes` on the cache's disk; `cached`: the model opens without asking anybody."""

    bytes: int
    free_bytes: int
    cached: bool


@dataclass(frozen=True)
class Fetching:
    """What may be fetched: `most_bytes` of one model, None for any; `token` False: without this machine's."""

    most_bytes: int | None = None
    token: bool | None = None


ANYTHING = Fetching()


def address_of(name: str) -> tuple[str, str | None] | None:
    """Return the repository and the revision that `name` means: 'o/n', 'o/n@revision', the address of its page or of
    its git; None if it is no such name. Raises BadChoice for one that is understood and cannot be opened."""
    repo, at, revision = name.partition("@")
    if page := _ADDRESS.fullmatch(name):
        repo, at, revision = page["repo"], page["revision"], unquote(page["revision"] or "")
    elif "://" in name or name.startswith("git@"):
        raise BadChoice(f"{name!r} is no model on the hub: choose owner/name, or fetch it and name the folder it is in")
    if name.endswith(".gguf") or ":" in repo and HUB_ID.fullmatch(repo.partition(":")[0]):
        raise BadChoice(f"{name!r} is GGUF, rounded already: choose the repository or folder of its safetensors")
    return (repo, revision or None) if HUB_ID.fullmatch(repo) and bool(at) == bool(revision) else None


def plan(repo: str, revision: str | None = None) -> Download:
    """Find out what a download would take, and fetch nothing large. Raises ModelUnavailable."""
    cached = is_cached(repo, revision)
    return Download(0 if cached else sum(_missing(repo, revision).values()), _free_bytes(), cached)


def download(repo: str, revision: str | None = None, fetching: Fetching = ANYTHING) -> Iterator[Progress]:
    """Fetch what a repository's model needs in a thread, reporting how long that has been going on; whoever asks for
    the same meanwhile waits for the same, and once nobody waits it ends. A hub that does not answer is no failure where
    all is here already, and where nothing may be fetched none is asked. Raises UserError, where it is too much or the
    disk has no room before it fetches."""
    if fetching.most_bytes == 0:
        if is_cached(repo, revision):
            return
        raise ModelUnavailable(_NOT_HERE % repo)
    patiently, asked = shared_work().patiently, (repo, revision, fetching.token)
    try:
        missing = yield from patiently(("files", *asked), lambda _: _missing(*asked), f"asking the hub for {repo}")
    except ModelUnavailable:
        if is_cached(repo, revision):
            return
        raise
    needed, free = sum(missing.values()), _free_bytes()
    if fetching.most_bytes is not None and needed > fetching.most_bytes:
        most = f"this server fetches {fetching.most_bytes / 1e9:.1f} GB at most for visitors"
        raise ModelUnavailable(f"{repo} is {needed / 1e9:.1f} GB, and {most}; {_HERE}")
    if needed > free:
        sizes = f"{needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free in the hub's cache"
        raise UserError(f"{repo} needs {sizes}: make room, or set HF_HOME to a folder on another disk")
    size = f", {needed / 1e9:.1f} GB of {free / 1e9:.0f} GB that are free on the disk" if needed > LARGE_BYTES else ""
    work = f"fetching {repo} from the hub{size}"
    yield from patiently(asked, lambda stop: _fetch(*asked, list(missing), stop), work)


def is_cached(repo: str, revision: str | None = None) -> bool:
    """Tell whether the model is here as a whole."""
    try:
        return bool(require_model(snapshot(repo, revision), repo))
    except ModelUnavailable:
        return False


def snapshot(repo: str, revision: str | None = None) -> Path:
    """Return the folder a repository is fetched into, named by its commit. No fetch. Raises ModelUnavailable."""
    from huggingface_hub import try_to_load_from_cache

    with _explained(repo, revision):
        if isinstance(config := try_to_load_from_cache(repo, "config.json", revision=revision), str):
            return Path(config).parent
    raise ModelUnavailable(_UNREACHABLE % repo)


def settings(repo: str, revision: str | None = None, fetching: Fetching = ANYTHING) -> Path:
    """Return a folder with a repository's config.json, which is all that is fetched. Raises ModelUnavailable."""
    from huggingface_hub import HfApi, hf_hub_download

    with suppress(ModelUnavailable):
        return snapshot(repo, revision)
    if fetching.most_bytes == 0:
        raise ModelUnavailable(_NOT_HERE % repo)
    asked = {"revision": revision, "token": fetching.token}
    with _explained(repo, revision):
        HfApi().model_info(repo, timeout=5, **asked)  # fails at once where a download tries for long
        return Path(hf_hub_download(repo, "config.json", etag_timeout=5, **asked)).parent


def _missing(repo: str, revision: str | None, token: bool | None = None) -> dict[str, int]:
    """The files a model needs, and of each the bytes that are still to fetch."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    def read(name: str) -> str:
        return Path(hf_hub_download(repo, name, revision=revision, token=token)).read_text(encoding="utf-8")

    with _explained(repo, revision):
        found = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=5, token=token)
        sizes = {file.rfilename: file.size or 0 for file in found.siblings or ()}
        names = [*weight_files(sizes, read, repo), *filter(SETTINGS.fullmatch, sizes)]
        here = {name for name in names if isinstance(try_to_load_from_cache(repo, name, revision=found.sha), str)}
    return {name: 0 if name in here else sizes[name] for name in names}


def _fetch(repo: str, revision: str | None, token: bool | None, names: list[str], stop: threading.Event) -> None:
    from huggingface_hub import snapshot_download

    with _explained(repo, revision):
        patterns = [glob.escape(name) for name in names]
        snapshot_download(repo, revision=revision, allow_patterns=patterns, token=token, tqdm_class=_bar_until(stop))


def _bar_until(stop: threading.Event) -> type:
    """The hub client's progress bar, which hears of every piece and ends the download at the next one after `stop`."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            if stop.is_set():
                raise Abandoned
            return super().update(n)

    return Bar


def _free_bytes() -> int:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE).absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub's client raises inside into ModelUnavailable that says what to do."""
    try:
        yield
    except (UserError, Abandoned):
        raise
    except Exception as error:  # its transport's own errors too, and it changes transports
        raise ModelUnavailable(_explanation(error, repo, revision)) from error


def _explanation(error: Exception, repo: str, revision: str | None) -> str:
    from huggingface_hub import errors

    licence = "accept its licence on the hub, then set the HF_TOKEN environment variable"
    explanations = {
        errors.GatedRepoError: f"{repo} is gated: {licence}. The model 'demo' needs neither.",
        errors.RepositoryNotFoundError: f"the hub has no repository {repo!r}, or it is private and HF_TOKEN is not set",
        errors.RevisionNotFoundError: f"{repo} has no revision {revision!r} on the hub",
        errors.HFValidationError: f"{repo!r} is no name a hub knows: {error}",
    }
    if explanation := next((text for kind, text in explanations.items() if isinstance(error, kind)), ""):
        return explanation
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"{repo} holds no model: it has no config.json"
    if getattr(getattr(error, "response", None), "status_code", None) == 401:
        return f"the hub refused {repo}: the token in HF_TOKEN is wrong or has expired"
    if isinstance(error, OSError) and (error.errno or 0) > 0 and not isinstance(error, ConnectionError | TimeoutError):
        return f"cannot store {repo} in the hub's cache (HF_HOME moves it): {error}"
    return _UNREACHABLE % repo
