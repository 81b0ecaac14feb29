"""Function calls as text: parsed by Python's grammar, and compared with the possible answers of BFCL.

A possible answer is {function: {parameter: [allowed values]}}. A call matches it if the name is the same, each
parameter that the function requires is there, there is no other than the function and the answer have, each value is
among the allowed ones, and each parameter that is left out has "" among them. Nothing is executed.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_LEFT_OUT = str.maketrans("'", '"', " ,./-_*^")


class Call(NamedTuple):
    """One call: the dotted name of the function, and its arguments by name."""

    function: str
    arguments: dict[str, Any]


def parse_calls(text: str) -> list[Call] | None:
    """The calls of an answer `[f(a=1), g.h(b="x")]`, with or without the brackets or a fence; None if it is not one.

    An argument that is no literal, such as a name or another call, becomes its text.
    """
    fenced = re.search(r"```[a-zA-Z]*\s*\n?(.*?)```", text, re.DOTALL)
    code = (fenced[1] if fenced else text).strip().strip("`").strip()
    if not code.startswith("["):
        code = f"[{code}]"
    try:
        tree = ast.parse(code, mode="eval").body
        return [_call(node) for node in tree.elts] if isinstance(tree, ast.List) else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deeply
        return None


def answers_match(
    calls: Sequence[Call], answers: Sequence[Mapping[str, Any]], functions: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether there are as many calls as answers and each answer has a call of its own, in any order.

    Args:
        calls: of a model.
        answers: each {function: {parameter: [allowed values]}}.
        functions: those on offer, each {"name", "parameters": {"properties", "required"}}.
    """
    if len(calls) != len(answers):
        return False
    schemas = {function["name"]: function["parameters"] for function in functions}

    def assign(position: int, left: list[Call]) -> bool:
        if position == len(answers):
            return True
        return any(
            call_matches(call, answers[position], schemas) and assign(position + 1, left[:index] + left[index + 1 :])
            for index, call in enumerate(left)
        )

    return assign(0, list(calls))


def call_matches(call: Call, answer: Mapping[str, Any], schemas: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a call is the one of an answer with one function."""
    ((function, allowed),) = answer.items()
    if call.function != function:
        return False
    properties, required = schemas[function].get("properties", {}), schemas[function].get("required", [])
    if any(parameter not in call.arguments for parameter in required):
        return False
    for parameter, value in call.arguments.items():
        if parameter not in properties or parameter not in allowed:
            return False
        if not any(_same_argument(value, one, properties[parameter]) for one in allowed[parameter]):
            return False
    return all(parameter in call.arguments or "" in values for parameter, values in allowed.items())


def _call(node: ast.expr) -> Call:
    """Raises ValueError if it is no call by keywords."""
    if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("not a call by keywords")
    name = ast.unparse(node.func)
    if not re.fullmatch(r"\w+(\.\w+)*", name):
        raise ValueError("not the name of a function")
    arguments = {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
    if len(arguments) < len(node.keywords):
        raise ValueError("a keyword twice")
    return Call(name, arguments)


def _value(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        pass
    if isinstance(node, ast.List | ast.Tuple):
        items = [_value(item) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    if isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values) if key is not None}
    return ast.unparse(node)


def _same_argument(value: Any, allowed: Any, schema: Mapping[str, Any]) -> bool:
    """Whether an argument is one allowed value, by the type that the function says it has."""
    kind = schema.get("type")
    if kind == "tuple" and isinstance(value, tuple):
        value = list(value)  # the answers were JSON, which has no tuples
    if allowed == "" and kind not in ("string", "any"):  # it may be left out; as a list, also be empty
        return kind in ("array", "tuple") and value == []
    if isinstance(allowed, dict):
        return _same_dict(value, allowed)
    if isinstance(allowed, list) and isinstance(value, list):
        items = schema.get("items", {})
        return len(value) == len(allowed) and all(_same_argument(*pair, items) for pair in zip(value, allowed))
    if kind == "integer" and isinstance(value, float):
        return False
    return _same(value, allowed)


def _same_dict(value: Any, allowed: Mapping[str, Any]) -> bool:
    """A dictionary against {key: [allowed values]}; "" among the values: the key may be left out."""
    if not isinstance(value, dict) or any(key not in allowed for key in value):
        return False
    if any(key not in value and "" not in values for key, values in allowed.items()):
        return False
    return all(any(_same(one, other) for other in allowed[key]) for key, one in value.items())


def _same(value: Any, allowed: Any) -> bool:
    """Equality, with texts compared without case, spaces and the punctuation of dates and units."""
    if isinstance(value, str) and isinstance(allowed, str):
        return _plain(value) == _plain(allowed)
    if isinstance(value, list) and isinstance(allowed, list):
        return len(value) == len(allowed) and all(map(_same, value, allowed))
    if isinstance(value, dict) and isinstance(allowed, dict):
        return value.keys() == allowed.keys() and all(_same(value[key], allowed[key]) for key in value)
    if isinstance(value, bool) or isinstance(allowed, bool):
        return value is allowed  # True is not 1 here
    return type(value) is not str and type(allowed) is not str and bool(value == allowed)


def _plain(text: str) -> str:
    return text.translate(_LEFT_OUT).lower()
