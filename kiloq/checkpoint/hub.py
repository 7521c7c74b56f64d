"""A model's name becomes a local folder: bundled, on disk, or from a hub, resumed and hash-checked. Knows no torch."""

import difflib
import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kiloq.errors import CheckpointError, KiloqError, MissingExtraError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

Hub = Literal["huggingface", "modelscope"]

logger = logging.getLogger(__name__)

# In a downloaded folder: its large files were compared with the hub's sha256 once.
VERIFIED = ".kiloq-verified"

_SMALL = ("*.json", "*.tiktoken", "merges.txt", "LICENSE*", "NOTICE*")
_WEIGHTS = "*.safetensors"
_OLD_WEIGHTS = "pytorch_model*.bin"  # taken only where there is no safetensors

_PREFIXES: dict[str, Hub] = {
    "ms:": "modelscope",
    "modelscope:": "modelscope",
    "https://modelscope.cn/models/": "modelscope",
    "https://www.modelscope.cn/models/": "modelscope",
    "hf:": "huggingface",
    "huggingface:": "huggingface",
    "https://huggingface.co/": "huggingface",
}
_TITLES: dict[Hub, str] = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ModelId:
    """Where a model lives: `repo` is owner/name in the spelling that both hubs use today."""

    hub: Hub
    repo: str


def parse_id(model: str, *, hub: Literal["auto", "huggingface", "modelscope"] = "auto") -> ModelId:
    """Read `Qwen/Qwen-7B-Chat`, `qwen/Qwen-7B-Chat`, `ms:Qwen/...`, `hf:...` or a hub's web address."""
    place: Hub = "huggingface" if hub == "auto" else hub
    repo = model.strip()
    for prefix, prefix_hub in _PREFIXES.items():
        if repo.lower().startswith(prefix):
            place, repo = prefix_hub, repo[len(prefix) :].rstrip("/")
    if not _ID.fullmatch(repo):
        raise CheckpointError(
            f"'{model}' is neither a folder on this machine nor a hub id, which has the form owner/name "
            f"(Qwen/Qwen3-0.6B; ms:Qwen/Qwen3-0.6B on ModelScope).{_near_folder(model)}"
        )
    owner, name = repo.split("/")
    return ModelId(place, f"{'Qwen' if owner.lower() == 'qwen' else owner}/{name}")


def resolve(
    model: str, *, revision: str | None = None, hub: Literal["auto", "huggingface", "modelscope"] = "auto"
) -> Path:
    """The local folder of a model: a folder as it is, a bundled name, or a hub id.

    What was downloaded and verified before is used without asking the network; `download` asks for the newest.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"'{model}' is a file; give the folder that holds config.json and the weights.")
    if model in _bundled_names():
        return bundled(model)
    model_id = parse_id(model, hub=hub)
    cached = _cached(model_id, revision)
    if cached is not None and (cached / VERIFIED).is_file():
        return cached
    return download(model, revision=revision, hub=hub)


def bundled(name: str = "kiloq-mini-chat") -> Path:
    """The folder of a model that ships with kiloq."""
    names = _bundled_names()
    if name not in names:
        known = ", ".join(names) or "none in this installation"
        raise CheckpointError(f"there is no bundled model '{name}'; there is {known}.")
    return _bundled_folder() / name


def download(
    model: str, *, revision: str | None = None, hub: Literal["auto", "huggingface", "modelscope"] = "auto"
) -> Path:
    """Fetch the newest files of a hub id, resuming what was interrupted; offline, what was fetched before."""
    model_id = parse_id(model, hub=hub)
    fetch = _from_modelscope if model_id.hub == "modelscope" else _from_huggingface
    try:
        folder, checked = fetch(model_id.repo, revision)
    except LookupError as error:
        raise CheckpointError(
            f"there is no folder '{model}' here and no model {model_id.repo} on {_TITLES[model_id.hub]}"
            f"{f' with revision {revision}' if revision else ''}, or it is private and needs a login."
            f"{_near_folder(model)}"
        ) from error
    except KiloqError:
        raise
    except Exception as error:  # whatever the hub's library and the HTTP library below it raise: no connection
        cached = _cached(model_id, revision)
        if cached is None or not (cached / "config.json").exists():
            raise _unreachable(model, model_id, error) from error
        folder, checked = cached, set()
    _verify(folder, checked)
    return folder


def _from_huggingface(repo: str, revision: str | None) -> tuple[Path, set[str]]:
    """The folder, and the sha256 sums that were compared on the way; LookupError when the hub has no such model."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise LookupError(repo) from error
    wanted = _wanted(info.siblings or ())
    checked = _fetch_large(repo, str(info.sha), wanted)
    folder = snapshot_download(repo, revision=revision, allow_patterns=[file.rfilename for file in wanted])
    return Path(folder), checked


def _wanted(files: Sequence["RepoSibling"]) -> list["RepoSibling"]:
    top = [file for file in files if "/" not in file.rfilename]
    weights = [file for file in top if fnmatchcase(file.rfilename, _WEIGHTS)]
    weights = weights or [file for file in top if fnmatchcase(file.rfilename, _OLD_WEIGHTS)]
    return weights + [file for file in top if any(fnmatchcase(file.rfilename, pattern) for pattern in _SMALL)]


def _fetch_large(repo: str, commit: str, files: Sequence["RepoSibling"]) -> set[str]:
    """Put the large files of a commit into the hub library's cache under their sha256; return those checked.

    The library itself starts a file anew after an interruption; we keep the part and go on where it ended.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    blobs = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "blobs"
    absent = [file for file in files if file.lfs and not (blobs / file.lfs.sha256).exists()]
    if not absent:
        return set()
    blobs.mkdir(parents=True, exist_ok=True)
    parts = {file.rfilename: blobs / f"{file.lfs.sha256}.kiloq-part" for file in absent if file.lfs}
    have = sum(part.stat().st_size for part in parts.values() if part.exists())
    need = sum(file.lfs.size for file in absent if file.lfs) - have
    free = shutil.disk_usage(blobs).free
    if need > free:
        raise CheckpointError(f"{repo} needs {need / 1e9:,.1f} GB, but {blobs} has {free / 1e9:,.1f} GB free.")
    logger.info("fetching %s: %d files, %.2f GB", repo, len(absent), need / 1e9)
    for file in absent:
        _fetch_one(repo, commit, file, parts[file.rfilename])
    return {file.lfs.sha256 for file in absent if file.lfs}


def _fetch_one(repo: str, commit: str, file: "RepoSibling", part: Path) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

    assert file.lfs is not None, file
    blob = part.parent / file.lfs.sha256
    with WeakFileLock(part.with_suffix(".lock")):
        if blob.exists():  # another process was faster
            return
        with part.open("ab") as out:
            http_get(
                hf_hub_url(repo, file.rfilename, revision=commit),
                out,
                resume_size=out.tell(),
                headers=build_hf_headers(),
                expected_size=file.lfs.size,
                displayed_filename=file.rfilename,
            )
        if _sha256(part) != file.lfs.sha256:
            part.unlink()
            raise CheckpointError(
                f"{file.rfilename} of {repo} arrived damaged: its sha256 is not the hub's. The copy was removed; "
                "run the same command again."
            )
        part.replace(blob)


def _verify(folder: Path, checked: set[str]) -> None:
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_modelscope(repo: str, revision: str | None) -> tuple[Path, set[str]]:
    """As above; ModelScope's own library resumes files and compares their sha256."""
    fetch = _modelscope_library()
    folder = Path(fetch(repo, revision=revision, allow_patterns=[*_SMALL, _WEIGHTS]))
    if not any(folder.glob(_WEIGHTS)):
        folder = Path(fetch(repo, revision=revision, allow_patterns=[*_SMALL, _OLD_WEIGHTS]))
    return folder, set()


def _cached(model_id: ModelId, revision: str | None) -> Path | None:
    """The folder that an earlier download left, without asking the network; it may be incomplete."""
    if model_id.hub == "modelscope":
        try:
            return Path(_modelscope_library()(model_id.repo, revision=revision, local_files_only=True))
        except Exception:  # the library has no one kind for "not here"
            return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model_id.repo, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _modelscope_library() -> Callable[..., str]:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise MissingExtraError(
            "models on ModelScope need one more package: pip install 'kiloq[modelscope]'."
        ) from None
    fetch: Callable[..., str] = snapshot_download
    return fetch


def _unreachable(model: str, model_id: ModelId, error: Exception) -> CheckpointError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return CheckpointError(
        f"'{model}' is not on this machine, and {_TITLES[model_id.hub]} cannot be reached ({reason}). Connect and run "
        f"`kiloq download {model}` (HF_ENDPOINT names a mirror, ms:{model_id.repo} is ModelScope), or give a local "
        f"folder.{_near_folder(model)}"
    )


def _near_folder(model: str) -> str:
    """A folder that the person may have meant, for the end of an error message."""
    path = Path(model).expanduser()
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean the folder '{path.parent / near[0]}'?" if near else ""


def _bundled_folder() -> Path:
    return Path(__file__).parents[1] / "assets" / "mini"


def _bundled_names() -> list[str]:
    folder = _bundled_folder()
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
