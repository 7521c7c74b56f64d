"""Vocabulary files on disk: finds them in a folder, reads `.tiktoken`, writes any. formats_hf reads the JSON ones."""

import binascii
import json
import os
import tempfile
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path

from kiloq.errors import TokenizerError

from .formats_hf import CONFIG_NAME, parse_object, read_tokenizer_json, read_vocab_and_merges
from .vocabulary import NUM_SPECIALS, Vocabulary, qwen_specials

_MAX_BYTES = 256 * 2**20  # the largest real vocabulary is some 40 MB; more is damage or an attack
_BESIDE = (CONFIG_NAME, "added_tokens.json", "special_tokens_map.json", "chat_template.jinja")


def read_vocabulary(path: Path, extra_vocab: Path | None = None) -> Vocabulary:
    """The vocabulary in a folder or file: `.tiktoken` before tokenizer.json before vocab.json + merges.txt."""
    main = _find(path) if path.is_dir() else path
    beside = {name: main.parent / name for name in _BESIDE if (main.parent / name).is_file()}
    files = {name: _read(file) for name, file in beside.items()}
    if main.suffix == ".tiktoken":
        return _read_tiktoken(main, files, extra_vocab)
    if extra_vocab is not None:
        raise TokenizerError(f"{extra_vocab} adds to a .tiktoken vocabulary, but {main} is not one.")
    if main.name in ("vocab.json", "merges.txt"):
        for name in ("vocab.json", "merges.txt"):
            files[name] = _read(main.parent / name)
        return read_vocab_and_merges(str(main.parent), files)
    if main.suffix == ".json":
        files[main.name] = _read(main)
        return read_tokenizer_json(str(main), files[main.name], files)
    raise TokenizerError(f"{main} is no vocabulary; give a .tiktoken file, tokenizer.json, or vocab.json.")


def dump_ranks(ranks: Mapping[bytes, int]) -> bytes:
    """The text of a `.tiktoken` file: base64 of the piece, a space, its id."""
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b64encode(piece) + b" %d\n" % rank for piece, rank in in_order)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write each file under a temporary name and rename it, so that no reader meets half a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            _write(folder / name, data)
    except OSError as error:
        raise TokenizerError(f"the vocabulary cannot be written to {folder}: {error.strerror}.") from error


def _find(folder: Path) -> Path:
    config = folder / CONFIG_NAME
    extra = _extra_name(parse_object(_read(config), str(config))) if config.is_file() else None
    found = sorted(file for file in folder.glob("*.tiktoken") if file.name != extra)
    if len(found) > 1:
        found = [file for file in found if file.name == "qwen.tiktoken"] or found
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise TokenizerError(f"{folder} holds several vocabularies ({names}); give the path of the one you mean.")
    if found:
        return found[0]
    for name in ("tokenizer.json", "vocab.json"):
        if (folder / name).is_file():
            return folder / name
    raise TokenizerError(f"{folder} has no vocabulary: no *.tiktoken, tokenizer.json, or vocab.json with merges.txt.")


def _extra_name(config: Mapping[str, object]) -> str | None:
    """The file of learned pieces that a saved folder names; whatever path it once had, it lies in the folder."""
    name = config.get("extra_vocab_file")
    return Path(name).name if isinstance(name, str) else None


def _write(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        Path(temporary).chmod(0o644)  # mkstemp makes it private
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(path: Path) -> bytes:
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise TokenizerError(f"{path} has {size:,} bytes; a vocabulary file has at most {_MAX_BYTES:,}.")
        if not path.is_file():
            raise TokenizerError(f"{path} cannot be read: it is not a file.")
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}.") from error


def _read_tiktoken(path: Path, files: dict[str, bytes], extra_vocab: Path | None) -> Vocabulary:
    files[path.name] = _read(path)
    config = parse_object(files.get(CONFIG_NAME, b"{}"), str(path.parent / CONFIG_NAME))
    if extra_vocab is None and (named := _extra_name(config)):
        extra_vocab = path.parent / named
    ranks = parse_ranks(files[path.name], str(path))
    num_ranks = _length_of_first_run(ranks, str(path))
    if extra_vocab is not None:
        if extra_vocab.name == path.name:
            raise TokenizerError(f"{extra_vocab} has the name of the vocabulary itself; rename it to save both.")
        files[extra_vocab.name] = _read(extra_vocab)
        first_free = max(num_ranks + NUM_SPECIALS, max(ranks.values(), default=0) + 1)
        _add_extra(ranks, parse_ranks(files[extra_vocab.name], str(extra_vocab)), first_free, str(extra_vocab))
    config.pop("auto_map", None)  # names code that we neither run nor save
    config.setdefault("tokenizer_class", "QWenTokenizer")
    if extra_vocab is not None:
        config["extra_vocab_file"] = extra_vocab.name
    files[CONFIG_NAME] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    return Vocabulary(name=str(path), ranks=ranks, special=qwen_specials(num_ranks), files=files)


def parse_ranks(data: bytes, where: str) -> dict[bytes, int]:
    """Pieces and ids of a `.tiktoken` file, each checked to appear once."""
    ranks: dict[bytes, int] = {}
    taken: set[int] = set()
    for number, line in enumerate(data.splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2 or not fields[1].isdigit() or len(fields[1]) > 10:
            raise TokenizerError(f"{where}, line {number}: found {line[:60]!r}; a line is base64, a space and an id.")
        try:
            piece = binascii.a2b_base64(fields[0], strict_mode=True)
        except binascii.Error as error:
            raise TokenizerError(f"{where}, line {number}: {fields[0][:60]!r} is not base64 ({error}).") from error
        rank = int(fields[1])
        if not piece or piece in ranks or rank in taken:
            what = "an empty piece" if not piece else f"piece {piece!r}" if piece in ranks else f"id {rank}"
            raise TokenizerError(f"{where}, line {number}: {what} is given twice or is empty; the file is damaged.")
        ranks[piece] = rank
        taken.add(rank)
    return ranks


def _length_of_first_run(ranks: Mapping[bytes, int], where: str) -> int:
    """Ids 0..n-1, then nothing, or (expanded and saved as one file) the specials' gap and the learned pieces."""
    ids = sorted(ranks.values())
    run = next((i for i, rank in enumerate(ids) if rank != i), len(ids))
    rest = ids[run:]
    start = run + NUM_SPECIALS
    if rest and rest != list(range(start, start + len(rest))):
        raise TokenizerError(
            f"{where} has a hole: id {run} is missing and the next is {rest[0]}. "
            f"Ids must run without holes (only {NUM_SPECIALS} special tokens may lie between two runs)."
        )
    return run


def _add_extra(ranks: dict[bytes, int], extra: Mapping[bytes, int], first_free: int, where: str) -> None:
    for piece, rank in extra.items():
        if piece in ranks:
            continue  # as the first Qwen did: an old piece keeps its old id
        if rank < first_free:
            raise TokenizerError(f"{where} gives {piece!r} the id {rank}, but the first free id is {first_free}.")
        ranks[piece] = rank
