"""What an answer must look like so that its readers find whole calls of known tools in it: grammars as text.

The text is llguidance's dialect of Lark; this file only writes it. A grammar accepts what `parse_reply` reads as calls
of the given tools with arguments that are valid for their schemas, laid out as the models were trained to write them,
and leaves other text free. Thoughts come first, then content, then calls; behind a call comes another call or nothing.
"""

import json
from collections.abc import Collection, Mapping, Sequence

from kiloq.errors import RequestError

from .chatml import ChatFormat
from .messages import Tool
from .tool_schema import arguments_schema

# Blanks between JSON tokens: any layout that people use, but no endless run, which small models fall into.
JSON_BLANKS = r"[ \t]{0,2}|\r?\n[ \t]{0,40}"
FREE_TEXT = "// free text: "  # the first line of a grammar that leaves text free, from where and up to which marks
_ANY = "/(?s:.*)/"
_INPUT = "\nAction Input:"
_LINE = r"((?s:.*)\n|\s*)"  # what comes before a marker of ReAct
_MOST_THOUGHT = 400  # characters in front of a call of ReAct that has to come

Grammar = tuple[list[str], list[str]]
"""Ways to answer, and the rules that they need."""


def answer_grammar(
    fmt: ChatFormat,
    *,
    tools: Sequence[Tool] = (),
    may_call: bool = True,
    required: bool = False,
    names: Collection[str] = (),
    parallel: bool = True,
    thinking: bool | None = None,
    content: str | None = None,
) -> str | None:
    """The grammar of an answer, or None if there is nothing to hold it to.

    `names` are the tools that may be called, if not all; `required`: one must be; `parallel`: there may be several
    calls. `content` is what an answer without a call must be: a Lark expression, such as `json_expression` writes.
    """
    callable_tools = [tool for tool in tools if may_call and (not names or tool.name in names)]
    if (required or names) and not callable_tools:
        asked = ", ".join(sorted(names)) or "any tool"
        raise RequestError(f"the answer must call {asked}, which is not among the {len(tools):,} tools given.")
    if not tools and content is None:
        return None
    if tools and fmt.tool_style == "react":
        free = {"after": "", "until": ["\nAction:", "\nFinal Answer:"], "marks": []}
        return _lark(_react(callable_tools, content, required=required), None if required else free)
    thinks = fmt.thinking == "hybrid" and thinking is not False
    ways, rules = _hermes(callable_tools, content, required=required, parallel=parallel, may_think=thinks)
    is_held = required or content is not None
    if not thinks and fmt.thinking != "always":
        return _lark((ways, rules), None if is_held else {"after": "", "until": ["<tool_call>"], "marks": []})
    # Free text takes the newlines behind a thought itself.
    gap = r"/\n{0,2}/ " if is_held else ""
    free = {"after": "<think>" if thinks else "", "until": ["</think>"], "marks": []}
    if not is_held:
        free = {"after": "", "until": ["<tool_call>"], "marks": ["<think>", "</think>"]}
    rules = [f"answer: {' | '.join(ways)}", *rules, r"to_thought_end[lazy]: /(?s:.*)<\/think>/"]
    thought = f"to_thought_end {gap}answer"
    return _lark(([f'"<think>" {thought}', "answer"] if thinks else [thought], rules), free)


def json_expression(schema: object, *, lenient: bool = False) -> str:
    """JSON that is valid for a schema; `lenient` lets go of keywords and formats that cannot be held."""
    whole = schema if isinstance(schema, Mapping) else {"allOf": [schema]}
    options = {"whitespace_pattern": JSON_BLANKS, "lenient": lenient}
    return f"%json {json.dumps({**whole, 'x-guidance': options})}"


def _hermes(tools: Sequence[Tool], content: str | None, *, required: bool, parallel: bool, may_think: bool) -> Grammar:
    """<tool_call>, a line of JSON with name and arguments, </tool_call>; text before the first call."""
    # Text that begins like a thought is one: a call inside it would be none.
    plain = r" & ~/\s*<think>(?s:.*)/" if may_think else ""
    text = [f"TEXT: {_ANY} & ~/(?s:.*)<tool_call>(?s:.*)/{plain}"]
    if not tools:
        return ([content], []) if content is not None else (["TEXT"], text)
    heads = [f'{json.dumps(_name(tool.name), ensure_ascii=False)}, "arguments": ' for tool in tools]
    rules = [
        rf"calls: call{' (NEXT_CALL call)*' if parallel else ''}",
        r'NEXT_CALL: "\n<tool_call>"',
        r'call: "\n{\"name\": " named "}\n</tool_call>"',
        f"named: {_alternatives(heads, tools)}",
    ]
    if required or content is not None:
        return ['"<tool_call>" calls', *([] if required or content is None else [content])], rules
    return ["TEXT", "to_call calls"], [*rules, *text, "to_call[lazy]: TO_CALL", f"TO_CALL: /(?s:.*)<tool_call>/{plain}"]


def _react(tools: Sequence[Tool], content: str | None, *, required: bool) -> Grammar:
    """A thought, then either Action and Action Input, where the answer ends, or Final Answer."""
    named = f"named: {_alternatives([f' {_name(tool.name)}{_INPUT} ' for tool in tools], tools)}"
    if required:
        return [rf"/[^\n]{{0,{_MOST_THOUGHT}}}\nAction:/ named"], [named]
    # What follows a marker is held from its first appearance on, so nothing else may hold one.
    ways = [f"to_final {_ANY if content is None else content}"]
    rules = ["to_final[lazy]: TO_FINAL", f"TO_FINAL: /{_LINE}Final Answer: / & ~/{_LINE}Action:(?s:.*)/"]
    if tools:
        ways.append("to_action named")
        rules += [named, "to_action[lazy]: TO_ACTION", f"TO_ACTION: /{_LINE}Action:/ & ~/{_LINE}Final Answer:(?s:.*)/"]
    if content is None:
        ways.append("TEXT")
        rules.append(rf"TEXT: {_ANY} & ~/{_LINE}(Action|Final Answer):(?s:.*)/")
    return ways, rules


def _alternatives(heads: Sequence[str], tools: Sequence[Tool]) -> str:
    """Each tool's name as its head writes it, and its arguments."""
    return " | ".join(
        # ASCII, because a Lark string may not hold every character as it is.
        f"{json.dumps(head)} {json_expression(arguments_schema(tool), lenient=True)}"
        for head, tool in zip(heads, tools, strict=True)
    )


def _name(name: str) -> str:
    """Half a surrogate pair is in no text that a model writes."""
    return name.encode("utf-8", "replace").decode()


def _lark(grammar: Grammar, free: Mapping[str, object] | None) -> str:
    ways, rules = grammar
    first = [] if free is None else [FREE_TEXT + json.dumps(free)]
    return "\n".join([*first, f"start: {' | '.join(ways)}", *rules, ""])
