"""The JSON schema that a call's arguments must be valid for, from the ways in which people describe parameters.

Where a tool lists its parameters, the list is taken for whole: what it does not name is not an argument, although JSON
Schema would allow it. Knows no tokens and no grammar.
"""

import re
from collections.abc import Mapping

from kiloq.errors import RequestError

from .messages import Tool

Schema = dict[str, object]

# Names of types in Python, Gemini and BFCL.
_TYPES = {
    "dict": "object",
    "list": "array",
    "tuple": "array",
    "float": "number",
    "double": "number",
    "int": "integer",
    "long": "integer",
    "str": "string",
    "bool": "boolean",
    "none": "null",
    "nonetype": "null",
}
_KNOWN = {"object", "array", "number", "integer", "string", "boolean", "null"}
_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "not", "contains")
# What lets a schema draw properties from elsewhere, so that its own list is not the whole of them.
_OPEN = ("anyOf", "allOf", "oneOf", "$ref", "patternProperties", "additionalProperties", "unevaluatedProperties")

# Look-around and back references: no regular expression, so no grammar can hold a text to it.
_IRREGULAR = re.compile(r"\(\?<?[=!]|\\[1-9]")


def arguments_schema(tool: Tool) -> Schema:
    """A schema of objects; parameters of another kind, or none that can be read, leave the object free."""
    try:
        return _arguments_schema(tool.parameters)
    except RecursionError:
        raise RequestError(f"the parameters of tool {tool.name!r:.80} are nested too deeply.") from None


def _arguments_schema(raw: object) -> Schema:
    if isinstance(raw, list | tuple):
        return _of_list([one for one in raw if isinstance(one, Mapping)])
    if not isinstance(raw, Mapping):
        return {"type": "object"}
    if not raw:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    schema = _whole(_plain(raw))
    kind = schema.get("type", "object")
    if kind == "object" or (isinstance(kind, list) and "object" in kind):
        return {**schema, "type": "object"}
    return {"type": "object"}


def _of_list(parameters: list[Mapping[str, object]]) -> Schema:
    """v1's list of {name, description, required, schema}."""
    named = [(str(one["name"]), one) for one in parameters if one.get("name")]
    return {
        "type": "object",
        "properties": {name: _whole(_plain(_mapping(one.get("schema")))) for name, one in named},
        "required": [name for name, one in named if one.get("required")],
        "additionalProperties": False,
    }


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _plain(value: Mapping[str, object]) -> Schema:
    """The schema with its types named as JSON Schema names them; what cannot be held is left out."""
    schema = dict(value)
    if _IRREGULAR.search(str(schema.get("pattern", ""))):
        del schema["pattern"]
    if not isinstance(schema.get("required", []), list):  # some mark each parameter instead
        del schema["required"]
    if "type" in schema:
        schema |= _type(schema.pop("type"))
    for key in _OF_SCHEMAS:
        if isinstance(inner := schema.get(key), Mapping):
            schema[key] = {name: _plain(one) if isinstance(one, Mapping) else one for name, one in inner.items()}
    for key in _LISTS:
        if isinstance(listed := schema.get(key), list):
            schema[key] = [_plain(one) if isinstance(one, Mapping) else one for one in listed]
    for key in _SINGLE:
        if isinstance(inner := schema.get(key), Mapping):
            schema[key] = _plain(inner)
    return schema


def _type(value: object) -> Schema:
    listed = value if isinstance(value, list) else [value]
    found = [
        name for one in listed if isinstance(one, str) and (name := _TYPES.get(one.lower(), one.lower())) in _KNOWN
    ]
    if not found or len(found) < len(listed):
        return {}
    return {"type": found if isinstance(value, list) else found[0]}


def _whole(schema: Schema) -> Schema:
    """The same where lists of properties are whole, here and in what they hold."""
    schema = dict(schema)
    properties = schema.get("properties")
    if isinstance(properties, Mapping):
        schema["properties"] = {name: _whole(one) if isinstance(one, dict) else one for name, one in properties.items()}
        required = schema.get("required")
        needed = set(map(str, required)) if isinstance(required, list) else set()
        if needed <= set(properties) and not any(key in schema for key in _OPEN):
            schema["additionalProperties"] = False
    if isinstance(items := schema.get("items"), dict):
        schema["items"] = _whole(items)
    return schema
