"""What a vocabulary is: pieces with their ids, added tokens, and the pattern that cuts text. Reads no files."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kiloq.errors import TokenizerError

# cl100k's pattern with single digits; every Qwen generation up to 3 uses it.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
NUM_SPECIALS = 208  # of Qwen v1: the three above and <|extra_0..204|>
_MAX_ID = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """One trained vocabulary; a rank is both the id of a piece and its priority in merging."""

    name: str  # of the file it came from, for messages
    ranks: Mapping[bytes, int]
    special: Mapping[str, int]  # every added token, control or not
    kept: frozenset[str] = frozenset()  # added tokens that are part of the answer's text, such as <think>
    pattern: str = QWEN_PATTERN
    nfc: bool = True
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)  # what save() writes

    def __post_init__(self) -> None:
        missing = [byte for byte in range(256) if bytes([byte]) not in self.ranks]
        if missing:
            raise TokenizerError(
                f"{self.name} has no token for {len(missing)} of the 256 bytes (first: 0x{missing[0]:02x}), "
                "so some text could not be encoded. Use a byte-level vocabulary."
            )
        seen: dict[int, bytes | str] = {}
        for token, token_id in _entries(self.ranks, self.special):
            if not 0 <= token_id <= _MAX_ID:
                raise TokenizerError(f"{self.name} gives {token!r} the id {token_id}; ids go from 0 to {_MAX_ID:,}.")
            if token_id in seen:
                raise TokenizerError(f"{self.name} gives id {token_id} to both {seen[token_id]!r} and {token!r}.")
            seen[token_id] = token


def qwen_specials(num_ranks: int) -> dict[str, int]:
    """The control tokens of Qwen v1, which follow directly on the ranks."""
    names = [END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(NUM_SPECIALS - 3))]
    return {name: num_ranks + i for i, name in enumerate(names)}


def _entries(ranks: Mapping[bytes, int], special: Mapping[str, int]) -> Iterable[tuple[bytes | str, int]]:
    yield from ranks.items()
    yield from special.items()
