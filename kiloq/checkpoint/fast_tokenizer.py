"""A `.tiktoken` vocabulary in the files that transformers, vLLM and others read. Knows no weights."""

import json
from collections.abc import Mapping
from pathlib import Path

from kiloq.errors import CheckpointError
from kiloq.tokenizer import Tokenizer
from kiloq.tokenizer.formats_hf import byte_of_character
from kiloq.tokenizer.vocabulary import END_OF_TEXT, Vocabulary

from .files import write_json


def write_fast_tokenizer(
    folder: Path, tokenizer: Tokenizer, *, max_length: int, eos_token: str, chat_template: str
) -> None:
    """Write tokenizer.json and tokenizer_config.json, with which AutoTokenizer gives the same ids as ours."""
    vocabulary = tokenizer.vocabulary
    added = [
        {
            "id": token_id,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": name not in vocabulary.kept,
        }
        for name, token_id in sorted(vocabulary.special.items(), key=lambda item: item[1])
    ]
    write_json(folder / "tokenizer.json", _tokenizer_json(vocabulary, added))
    # Ids that are no plain text are named again here: transformers takes them from this file.
    by_id = {str(entry["id"]): {key: entry[key] for key in entry if key != "id"} for entry in added}
    config: dict[str, object] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": max_length,
        "eos_token": eos_token,
        "pad_token": END_OF_TEXT,
        "bos_token": None,
        "unk_token": None,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "errors": "replace",
        "added_tokens_decoder": by_id,
        "chat_template": chat_template,
    }
    write_json(folder / "tokenizer_config.json", config)


def chatml_template(default_system: str) -> str:
    """ChatML as a Jinja template; a conversation that brings no system message gets the default one, if any."""
    system = json.dumps(f"<|im_start|>system\n{default_system}<|im_end|>\n", ensure_ascii=False)
    opening = f"{{%- if messages[0].role != 'system' -%}}{{{{ {system} }}}}{{%- endif -%}}" if default_system else ""
    return (
        opening
        + "{%- for message in messages -%}"
        + "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
        + "{%- endfor -%}"
        + "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    )


def _tokenizer_json(vocabulary: Vocabulary, added: list[dict[str, object]]) -> dict[str, object]:
    character = {byte: text for text, byte in byte_of_character().items()}
    words = {piece: "".join(character[byte] for byte in piece) for piece in vocabulary.ranks}
    in_order = sorted(vocabulary.ranks.items(), key=lambda item: item[1])
    merges = [[words[half] for half in _halves(piece, vocabulary)] for piece, _ in in_order if len(piece) > 1]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": vocabulary.pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if vocabulary.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {words[piece]: rank for piece, rank in in_order},
            "merges": merges,
        },
    }


def _halves(piece: bytes, vocabulary: Vocabulary) -> tuple[bytes, bytes]:
    """The two pieces whose merge makes this one: what byte pair encoding leaves when only lower ranks may merge."""
    ranks: Mapping[bytes, int] = vocabulary.ranks
    limit = ranks[piece]
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        rank, at = min((ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1))
        if rank >= limit:
            raise CheckpointError(
                f"{vocabulary.name}: no merge of two pieces makes {piece!r} (id {limit}), so the vocabulary cannot be "
                "written for other programs."
            )
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]
