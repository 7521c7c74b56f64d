"""Learns further pieces for a trained vocabulary, so that given words become one token each."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import regex

from kiloq.errors import TokenizerError

from .normalise import nfc
from .tokenizer import Tokenizer
from .vocabulary import NUM_SPECIALS, qwen_specials

Pair = tuple[bytes, bytes]


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """Pieces for an extra `.tiktoken` file, and the words that could not or need not be added."""

    ranks: Mapping[bytes, int]  # with those of an earlier expansion, so that one extra file holds all
    num_new: int
    cut: tuple[str, ...]  # the pattern cuts these before merging, so they can never be one token
    known: tuple[str, ...]  # one token already


def read_words(path: Path) -> dict[str, int]:
    """Words with their counts, `word<TAB>count` a line; a word alone counts once, a repeated word adds up."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise TokenizerError(f"{path} cannot be read as UTF-8 text: {reason}.") from error
    words: Counter[str] = Counter()
    for number, line in enumerate(lines, start=1):
        word, _, count = line.strip().partition("\t")
        if not word:
            continue
        if count and not (count.isdecimal() and len(count) <= 18 and int(count)):
            raise TokenizerError(
                f"{path}, line {number}: {count!r:.40} is no count; write the word, a tab and a number from 1 on."
            )
        words[nfc(word)] += int(count or 1)
    return dict(words)


def expand_vocabulary(tokenizer: Tokenizer, words: Mapping[str, int], *, start_id: int | None = None) -> Expansion:
    """Merge until every word is one token: most frequent pair first, then the shortest, then in text order."""
    vocabulary = tokenizer.vocabulary
    first_special = tokenizer.end_of_text_id
    if vocabulary.special != qwen_specials(first_special):
        raise TokenizerError(f"{vocabulary.name} cannot be expanded; only a .tiktoken vocabulary can.")
    if start_id is None:
        start_id = tokenizer.size
    if start_id < tokenizer.size:
        raise TokenizerError(f"start_id is {start_id}, but ids below {tokenizer.size} are in use.")
    cut = tuple(word for word in words if len(regex.findall(vocabulary.pattern, word)) > 1)
    known = tuple(word for word in words if word.encode() in vocabulary.ranks)
    left_out = {*cut, *known}
    counts = {word: count for word, count in words.items() if word not in left_out}
    split = {word: [tokenizer.token_bytes(i) for i in tokenizer.encode(word)] for word in counts}
    ranks = {piece: rank for piece, rank in vocabulary.ranks.items() if rank >= first_special + NUM_SPECIALS}
    num_old = len(ranks)
    next_id = start_id
    for piece in _learn(split, counts):
        if piece not in vocabulary.ranks and piece not in ranks:
            ranks[piece] = next_id
            next_id += 1
    return Expansion(ranks=ranks, num_new=len(ranks) - num_old, cut=cut, known=known)


def _learn(split: Mapping[str, list[bytes]], counts: Mapping[str, int]) -> Iterator[bytes]:
    """Merged pieces in order. Counts are kept per pair and mended where a merge changed a word."""
    pieces_of = dict(split)
    total: Counter[Pair] = Counter()
    words_of: defaultdict[Pair, set[str]] = defaultdict(set)
    for word, pieces in pieces_of.items():
        for pair in pairwise(pieces):
            total[pair] += counts[word]
            words_of[pair].add(word)
    heap = [_order(pair, count) for pair, count in total.items()]
    heapq.heapify(heap)
    while heap:
        order = heapq.heappop(heap)
        pair = order[-1]
        if not total[pair] or -order[0] != total[pair]:
            continue  # merged already, or its count has changed and it stands elsewhere in the heap
        yield pair[0] + pair[1]
        changed: set[Pair] = set()
        for word in words_of.pop(pair):
            old, new = pieces_of[word], _merge(pieces_of[word], pair)
            pieces_of[word] = new
            for sign, pieces in ((-1, old), (1, new)):
                for other in pairwise(pieces):
                    total[other] += sign * counts[word]
                    changed.add(other)
            for other in pairwise(new):
                words_of[other].add(word)
        for other in changed:
            if total[other] > 0:
                heapq.heappush(heap, _order(other, total[other]))


def _merge(pieces: list[bytes], pair: Pair) -> list[bytes]:
    merged: list[bytes] = []
    i = 0
    while i < len(pieces):
        if i + 1 < len(pieces) and (pieces[i], pieces[i + 1]) == pair:
            merged.append(pair[0] + pair[1])
            i += 2
        else:
            merged.append(pieces[i])
            i += 1
    return merged


def _order(pair: Pair, count: int) -> tuple[int, int, int, str, bytes, Pair]:
    """Smallest first: the order of the first Qwen's tool, and of the extra vocabularies made with it."""
    piece = pair[0] + pair[1]
    text = piece.decode("utf-8", "replace")
    return -count, len(text), len(piece), text, piece, pair
