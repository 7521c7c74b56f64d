"""Conversations to ids and back: messages, the formats of each Qwen generation, and the reader of answers."""

from .chatml import (
    QWEN1,
    QWEN2,
    QWEN2_5,
    QWEN3,
    ChatFormat,
    Rendered,
    chat_format_for,
    qwen1_mask,
    render,
    trim_history,
)
from .grammar import CallDelta, Delta
from .messages import Message, Role, Tool, ToolCall, parse_messages, parse_tools
from .parse import Reply, ReplyParser, join, parse_reply
from .turns import Recall, Wording, wording

__all__ = [
    "QWEN1",
    "QWEN2",
    "QWEN2_5",
    "QWEN3",
    "CallDelta",
    "ChatFormat",
    "Delta",
    "Message",
    "Recall",
    "Rendered",
    "Reply",
    "ReplyParser",
    "Role",
    "Tool",
    "ToolCall",
    "Wording",
    "chat_format_for",
    "join",
    "parse_messages",
    "parse_reply",
    "parse_tools",
    "qwen1_mask",
    "render",
    "trim_history",
    "wording",
]
