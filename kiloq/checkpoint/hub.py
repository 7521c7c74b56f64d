"""A model's name becomes a local folder: bundled, on disk, or fetched from a hub. Knows no torch and no protocol."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kiloq.errors import CheckpointError

from .fetch import (
    VERIFIED,
    AbsentError,
    OfflineError,
    cached_huggingface,
    cached_modelscope,
    from_huggingface,
    from_modelscope,
    verify,
)

Hub = Literal["huggingface", "modelscope"]

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
_CACHED = {"huggingface": cached_huggingface, "modelscope": cached_modelscope}
_FETCH = {"huggingface": from_huggingface, "modelscope": from_modelscope}

# As the hubs have it: at most 96 characters, no doubled dashes or dots, nothing but letters and digits at the ends.
_ID = re.compile(
    r"(?=.{3,96}$)(?!.*(--|\.\.|\.git$))[a-z0-9]([\w.-]*\w)?/[a-z0-9]([\w.-]*\w)?", re.ASCII | re.IGNORECASE
)


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
            f"'{model:.200}' is neither a folder on this machine nor a hub id, which has the form owner/name "
            f"(Qwen/Qwen3-0.6B; ms:Qwen/Qwen3-0.6B on ModelScope).{_near_folder(model)}"
        )
    owner, name = repo.split("/")
    return ModelId(place, f"{'Qwen' if owner.lower() == 'qwen' else owner}/{name}")


def resolve(
    model: str,
    *,
    revision: str | None = None,
    hub: Literal["auto", "huggingface", "modelscope"] = "auto",
    cache_dir: str | Path | None = None,
) -> Path:
    """The local folder of a model: a folder as it is, a bundled name, or a hub id.

    What was downloaded and verified before is used without asking the network; `download` asks for the newest.
    `cache_dir` takes the place of the hub's own cache.
    """
    try:
        folder = Path(model).expanduser()
        is_folder, is_file = folder.is_dir(), folder.is_file()
    except (RuntimeError, OSError) as error:  # no such user, too long a name, no right to look
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"'{model:.200}' cannot be looked up on this machine: {reason}.") from None
    if model and is_folder:
        return folder
    if is_file:
        raise CheckpointError(f"'{model}' is a file; give the folder that holds config.json and the weights.")
    if model in bundled_names():
        return bundled(model)
    model_id = parse_id(model, hub=hub)
    cached = _CACHED[model_id.hub](model_id.repo, revision, _folder(cache_dir))
    if cached is not None and (cached / VERIFIED).is_file():
        return cached
    return download(model, revision=revision, hub=hub, cache_dir=cache_dir)


def bundled(name: str = "kiloq-mini-chat") -> Path:
    """The folder of a model that ships with kiloq."""
    names = bundled_names()
    if name not in names:
        known = ", ".join(names) or "none in this installation"
        raise CheckpointError(f"there is no bundled model '{name}'; there is {known}.")
    return _bundled_folder() / name


def download(
    model: str,
    *,
    revision: str | None = None,
    hub: Literal["auto", "huggingface", "modelscope"] = "auto",
    cache_dir: str | Path | None = None,
) -> Path:
    """Fetch the newest files of a hub id, resuming what was interrupted; offline, what was fetched before."""
    model_id = parse_id(model, hub=hub)
    try:
        folder, checked = _FETCH[model_id.hub](model_id.repo, revision, _folder(cache_dir))
    except AbsentError as error:
        raise CheckpointError(
            f"there is no folder '{model}' here and no model {model_id.repo} on {_TITLES[model_id.hub]}"
            f"{f' with revision {revision}' if revision else ''}, or it is private and needs a login."
            f"{_near_folder(model)}"
        ) from error
    except OfflineError as error:
        cached = _CACHED[model_id.hub](model_id.repo, revision, _folder(cache_dir))
        if cached is None or not (cached / "config.json").exists():
            raise _unreachable(model, model_id, error) from error
        folder, checked = cached, set()
    verify(folder, checked)
    return folder


def _folder(cache_dir: str | Path | None) -> Path | None:
    return None if cache_dir is None else Path(cache_dir).expanduser().absolute()


def _unreachable(model: str, model_id: ModelId, error: Exception) -> CheckpointError:
    elsewhere = f"Without ms:, {model_id.repo} is looked for on Hugging Face."
    if model_id.hub == "huggingface":
        elsewhere = f"HF_ENDPOINT can name a mirror; ms:{model_id.repo} is the same model on ModelScope."
    return CheckpointError(
        f"'{model}' is not on this machine, and {_TITLES[model_id.hub]} cannot be reached ({error}). Connect and run "
        f"`kiloq download {model}`, or give a local folder. {elsewhere}{_near_folder(model)}"
    )


def _near_folder(model: str) -> str:
    """A folder that the person may have meant, for the end of an error message."""
    try:
        path = Path(model).expanduser()
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except (RuntimeError, OSError):
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean the folder '{path.parent / near[0]}'?" if near else ""


def _bundled_folder() -> Path:
    return Path(__file__).parents[1] / "assets" / "mini"


def bundled_names() -> list[str]:
    """What `bundled` takes."""
    folder = _bundled_folder()
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
