"""Files of a hub repository come to this machine, resumed and compared with their sha256. Knows no torch."""

import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from kiloq.errors import CheckpointError, MissingExtraError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

logger = logging.getLogger(__name__)

# In a downloaded folder: its large files were compared with the hub's sha256 once.
VERIFIED = ".kiloq-verified"

_SMALL = ("*.json", "*.tiktoken", "merges.txt", "chat_template.jinja", "LICENSE*", "NOTICE*")
_WEIGHTS = "*.safetensors"
_OLD_WEIGHTS = "pytorch_model*.bin"  # taken only where there is no safetensors

_PART = ".kiloq-part"  # a large file that is not complete yet
_SHA256 = re.compile(r"[0-9a-f]{64}")


class AbsentError(Exception):
    """The hub answered that it has no such model, or none for this person."""


class OfflineError(Exception):
    """The hub did not answer, or broke off; the message is its reason in one line."""


def from_huggingface(repo: str, revision: str | None, cache: Path | None) -> tuple[Path, set[str]]:
    """The folder, and the sha256 sums that were compared on the way. Without `cache`, the hub library's own."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # not in its __all__
        HTTPError,  # that of httpx or httpx2, whichever the library uses
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        wanted = _wanted(info.siblings or ())
        checked = _fetch_large(repo, str(info.sha), wanted, cache)
        names = [file.rfilename for file in wanted]
        folder = snapshot_download(repo, revision=revision, allow_patterns=names, cache_dir=cache)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise AbsentError(repo) from error
    except (HTTPError, OSError) as error:
        raise OfflineError(_first_line(error)) from error
    return Path(folder), checked


def cached_huggingface(repo: str, revision: str | None, cache: Path | None) -> Path | None:
    """The folder that an earlier download left, without asking the network; it may be incomplete."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, "config.json", revision=revision, cache_dir=cache)
    return Path(found).parent if isinstance(found, str) else None


def from_modelscope(repo: str, revision: str | None, cache: Path | None) -> tuple[Path, set[str]]:
    """As above; ModelScope's own library resumes files and compares their sha256."""
    fetch = _modelscope_library()
    from modelscope_hub.errors import HubError  # both come with it
    from requests import HTTPError  # type: ignore[import-untyped, import-not-found, unused-ignore]  # comes with modelscope alone

    try:
        for weights in (_WEIGHTS, _OLD_WEIGHTS):
            patterns = [*_SMALL, weights]
            folder = Path(
                fetch(repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"], cache_dir=cache)
            )
            if any(folder.glob(_WEIGHTS)):
                break
    except HTTPError as error:  # the hub answered, and its answer is no
        raise AbsentError(repo) from error
    except (HubError, OSError) as error:
        raise OfflineError(_first_line(error)) from error
    return folder, set()


def cached_modelscope(repo: str, revision: str | None, cache: Path | None) -> Path | None:
    """As for Hugging Face."""
    fetch = _modelscope_library()
    from modelscope_hub.errors import HubError

    try:
        return Path(fetch(repo, revision=revision, local_files_only=True, cache_dir=cache))
    except HubError:
        return None


def verify(folder: Path, checked: set[str]) -> None:
    """Compare large files with their sha256, once. The hub's cache names a large file's blob by it."""
    if (folder / VERIFIED).is_file():
        return
    for path in sorted(folder.iterdir()):
        blob = path.resolve()
        if not _SHA256.fullmatch(blob.name) or blob.name in checked or _sha256(blob) == blob.name:
            continue
        blob.unlink()
        path.unlink()
        raise CheckpointError(
            f"{path} is damaged: its sha256 is not the hub's. The copy was removed; run the same command again."
        )
    (folder / VERIFIED).write_text("The large files here were compared with the hub's sha256.\n", "utf-8")


def _wanted(files: Sequence["RepoSibling"]) -> list["RepoSibling"]:
    top = [file for file in files if "/" not in file.rfilename]
    weights = [file for file in top if fnmatchcase(file.rfilename, _WEIGHTS)]
    weights = weights or [file for file in top if fnmatchcase(file.rfilename, _OLD_WEIGHTS)]
    return weights + [file for file in top if any(fnmatchcase(file.rfilename, pattern) for pattern in _SMALL)]


def _fetch_large(repo: str, commit: str, files: Sequence["RepoSibling"], cache: Path | None) -> set[str]:
    """Put the large files of a commit into the hub library's cache under their sha256; return those checked.

    The library itself starts a file anew after an interruption; we keep the part and go on where it ended.
    """
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # not in its __all__

    name, cache = f"models--{repo.replace('/', '--')}", cache or Path(HF_HUB_CACHE)
    blobs, locks = cache / name / "blobs", cache / ".locks" / name
    # A sum becomes a file name, so it must be one. (Whatever has none is left to the library.)
    large = [file for file in files if file.lfs and _SHA256.fullmatch(file.lfs.sha256)]
    absent = [file for file in large if file.lfs and not (blobs / file.lfs.sha256).exists()]
    if not absent:
        return set()
    for folder in (blobs, locks):
        folder.mkdir(parents=True, exist_ok=True)
    need = sum(file.lfs.size for file in absent if file.lfs)
    need -= sum(part.stat().st_size for part in blobs.glob(f"*{_PART}"))
    free = shutil.disk_usage(blobs).free
    if need > free:
        raise CheckpointError(f"{repo} needs {need / 1e9:,.1f} GB, but {blobs} has {free / 1e9:,.1f} GB free.")
    logger.info("fetching %s: %d files, %.2f GB", repo, len(absent), need / 1e9)
    checked = set()
    for file in absent:
        assert file.lfs is not None, file
        # The library's own lock for this blob: it waits for us and we for it.
        with WeakFileLock(locks / f"{file.lfs.sha256}.lock"):
            _fetch_one(repo, commit, file, blobs / file.lfs.sha256)
        checked.add(file.lfs.sha256)
    return checked


def _fetch_one(repo: str, commit: str, file: "RepoSibling", blob: Path) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # not in its __all__

    if blob.exists():  # another process was faster
        return
    part = blob.with_name(blob.name + _PART)
    with part.open("ab") as out:
        if out.tell() > (file.size or 0):
            out.truncate(0)
        http_get(
            hf_hub_url(repo, file.rfilename, revision=commit),
            out,
            resume_size=part.stat().st_size,
            headers=build_hf_headers(),
            expected_size=file.size,
            displayed_filename=file.rfilename,
        )
    if _sha256(part) != blob.name:
        part.unlink()
        raise CheckpointError(
            f"{file.rfilename} of {repo} arrived damaged: its sha256 is not the hub's. The copy was removed; "
            "run the same command again."
        )
    part.replace(blob)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _modelscope_library() -> Callable[..., str]:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise MissingExtraError(
            "models on ModelScope need one more package: pip install 'kiloq[modelscope]'."
        ) from None
    fetch: Callable[..., str] = snapshot_download
    return fetch
