"""The JSON vocabularies of Qwen 1.5 to 3: vocab.json + merges.txt, and tokenizer.json. Works on bytes already read."""

import json
from collections.abc import Iterable, Mapping
from typing import cast

from kiloq.errors import TokenizerError

from .vocabulary import END_OF_TEXT, IM_END, IM_START, Vocabulary

CONFIG_NAME = "tokenizer_config.json"
JsonObject = dict[str, object]
Pair = tuple[str, str]


def read_vocab_and_merges(where: str, files: Mapping[str, bytes]) -> Vocabulary:
    """`vocab.json` holds ids and `merges.txt` one pair a line; added tokens stand in the files beside them."""
    ids = _ids(parse_object(files["vocab.json"], f"{where}/vocab.json"), f"{where}/vocab.json")
    lines = _text(files["merges.txt"], f"{where}/merges.txt").split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    merges = [_pair(line.rstrip("\r"), f"{where}/merges.txt") for line in lines if line.strip()]
    special, kept = _added_beside(where, files)
    if not special:
        start = max(ids.values(), default=-1) + 1
        special = {name: ids.get(name, start + i) for i, name in enumerate((END_OF_TEXT, IM_START, IM_END))}
    ranks = ranks_of_merges(ids, merges, special, where)
    return Vocabulary(name=where, ranks=ranks, special=special, kept=kept, files=files)


def read_tokenizer_json(where: str, data: bytes, files: Mapping[str, bytes]) -> Vocabulary:
    """One file with everything; parts that this package would not reproduce exactly are refused."""
    top = parse_object(data, where)
    model = _object(top.get("model"), f"{where}: model")
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or model.get("continuing_subword_prefix"):
        raise TokenizerError(f"{where} holds a {model.get('type')!r} model; only byte-level BPE is understood.")
    ids = _ids(_object(model.get("vocab"), f"{where}: model.vocab"), where)
    merges = [_pair(pair, where) for pair in _array(model.get("merges"), f"{where}: model.merges")]
    special, kept = _added(where, _array(top.get("added_tokens") or [], f"{where}: added_tokens"))
    more_special, more_kept = _added_beside(where, files)
    kept |= more_kept - special.keys()
    for name, token_id in more_special.items():
        if special.setdefault(name, token_id) != token_id:
            raise TokenizerError(f"{where} gives {name} the id {special[name]}, but {CONFIG_NAME} says {token_id}.")
    return Vocabulary(
        name=where,
        ranks=ranks_of_merges(ids, merges, special, where),
        special=special,
        kept=kept,
        pattern=_pattern(top.get("pre_tokenizer"), where),
        nfc=_nfc(top.get("normalizer"), where),
        files=files,
    )


def parse_object(data: bytes, where: str) -> JsonObject:
    """A JSON object, or one error that names the file."""
    try:
        return _object(json.loads(_text(data, where)), where)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{where} is not JSON: {error}.") from error


def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


def ranks_of_merges(
    ids: Mapping[str, int], merges: Iterable[Pair], special: Mapping[str, int], where: str
) -> dict[bytes, int]:
    """Ranks that make tiktoken merge as the list says: single bytes, then each merge with a larger id."""
    alphabet = byte_of_character()
    ranks = {bytes([byte]): ids[character] for character, byte in alphabet.items() if character in ids}
    made = set(alphabet)
    last = -1
    for left, right in merges:
        token = left + right
        if token in made:
            continue
        if token not in ids or left not in made or right not in made:
            lost = next((part for part in (left, right) if part not in made), token)
            raise TokenizerError(f"{where} merges {left!r} and {right!r}, but {lost!r} is not a known token by then.")
        if ids[token] <= last:
            raise TokenizerError(
                f"{where} gives {token!r} the id {ids[token]} although an earlier merge has {last}. "
                "Ids must follow the order of the merges, as in every Qwen vocabulary."
            )
        last = ids[token]
        made.add(token)
        ranks[bytes(map(alphabet.__getitem__, token))] = last
    orphans = [token for token in ids if token not in made and token not in special]
    if orphans:
        raise TokenizerError(f"{where} lists {len(orphans)} tokens that no merge makes (first: {orphans[0]!r}).")
    return ranks


def _added_beside(where: str, files: Mapping[str, bytes]) -> tuple[dict[str, int], frozenset[str]]:
    """Added tokens of tokenizer_config.json, or of the older added_tokens.json."""
    config = parse_object(files.get(CONFIG_NAME, b"{}"), f"{where}: {CONFIG_NAME}")
    by_id = _object(config.get("added_tokens_decoder") or {}, f"{where}: added_tokens_decoder")
    if by_id:
        entries = [{**_object(entry, where), "id": _integer(token_id, where)} for token_id, entry in by_id.items()]
        return _added(where, entries)
    names = parse_object(files.get("added_tokens.json", b"{}"), f"{where}: added_tokens.json")
    return _added(where, [{"content": name, "id": token_id, "special": True} for name, token_id in names.items()])


def _added(where: str, entries: Iterable[object]) -> tuple[dict[str, int], frozenset[str]]:
    special: dict[str, int] = {}
    kept: set[str] = set()
    for raw in entries:
        entry = _object(raw, f"{where}: added token")
        name, token_id = entry.get("content"), entry.get("id")
        if not isinstance(name, str) or not name or type(token_id) is not int:
            raise TokenizerError(f"{where} has an added token without content or id: {raw!r:.80}.")
        if special.setdefault(name, token_id) != token_id:
            raise TokenizerError(f"{where} gives {name} two ids, {special[name]} and {token_id}.")
        if not entry.get("special"):
            kept.add(name)
    return special, frozenset(kept)


def _pattern(pre_tokenizer: object, where: str) -> str:
    """The pattern of a Split step followed by a plain byte-level step."""
    match pre_tokenizer:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    raise TokenizerError(f"{where} cuts text in an unknown way: pre_tokenizer is {pre_tokenizer!r:.120}.")


def _nfc(normalizer: object, where: str) -> bool:
    match normalizer:
        case None | {"type": "Sequence", "normalizers": []}:
            return False
        case {"type": "NFC"} | {"type": "Sequence", "normalizers": [{"type": "NFC"}]}:
            return True
    raise TokenizerError(f"{where} normalises text in an unknown way: {normalizer!r:.80}; only NFC is understood.")


def _ids(vocab: JsonObject, where: str) -> dict[str, int]:
    for token, token_id in vocab.items():
        if type(token_id) is not int:
            raise TokenizerError(f"{where} gives {token!r} the id {token_id!r}; an id is a whole number.")
    return cast(dict[str, int], vocab)


def _pair(raw: object, where: str) -> Pair:
    parts = raw.split(" ") if isinstance(raw, str) else raw
    match parts:
        case [str(left), str(right)] if left and right:
            return left, right
    raise TokenizerError(f"{where} has the merge {raw!r:.80}; a merge is two pieces with a space between.")


def _integer(text: str, where: str) -> int:
    if not text.isdecimal() or len(text) > 10:
        raise TokenizerError(f"{where} has an added token with the id {text!r:.40}; an id is a whole number.")
    return int(text)


def _object(value: object, where: str) -> JsonObject:
    if not isinstance(value, dict):
        raise TokenizerError(f"{where} is {type(value).__name__} where an object was expected.")
    return value


def _array(value: object, where: str) -> list[object]:
    if not isinstance(value, list):
        raise TokenizerError(f"{where} is {type(value).__name__} where a list was expected.")
    return value


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{where} is not UTF-8 text (byte {error.start}).") from error
