"""Text to token ids and back. Knows nothing of chats, models or torch."""

from .tokenizer import RefusedTextError, StreamDecoder, Tokenizer

__all__ = ["RefusedTextError", "StreamDecoder", "Tokenizer"]
