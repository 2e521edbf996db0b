"""Function calls as bfcl-eval compares them with possible answers (Python, its `ast_checker`).

The first failure counts and is named as theirs. Strings are compared without spaces and some marks, so that "./a.mp4"
and "amp4" are equal; types of list members are checked one level deep, and against the answer's own types too; an
answer "" says that an argument may be absent, and lets every list pass the check of types.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from keye.scoring.official.registry import Document, Fields, register

_TYPES: Final[Mapping[str, type]] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
_SIMPLE: Final = "simple_function_checker"
_NO_ORDER: Final = "parallel_function_checker_no_order"

Failure = str | None


@register("bfcl_ast", "item", "bfcl-eval-2026.3.23")
def score_calls(document: Document, prediction: Any) -> Fields:
    """Compares calls `[{name: {argument: value}}]`; `valid`, and `error_type` of the first failure or None.

    Lists stand for tuples where the document says `tuple_args`, for JSON has none. `error` is the exception that the
    original raises over descriptions and answers of another form.
    """
    calls = [_with_tuples(call) for call in prediction] if document.get("tuple_args") else prediction
    try:
        failure = _check_calls(document["category"], document["functions"], calls, document["possible_answer"])
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:
        return {"error": type(error).__name__}
    return {"valid": failure is None, "error_type": failure}


def _with_tuples(call: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        name: {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
        for name, arguments in call.items()
    }


def _check_calls(category: str, functions: Any, calls: Sequence[Any], answers: Sequence[Any]) -> Failure:
    if "parallel" in category:
        if len(calls) != len(answers):
            return f"{_NO_ORDER}:wrong_count"
        return _check_in_any_order(functions, calls, answers)
    if "multiple" in category:
        if len(calls) != len(answers):
            return "multiple_function_checker:wrong_count"
        return _check_call(_find_function(functions, next(iter(answers[0].keys()))), calls[0], answers[0])
    if len(calls) != 1:
        return f"{_SIMPLE}:wrong_count"
    return _check_call(functions[0], calls[0], answers[0])


def _check_in_any_order(functions: Any, calls: Sequence[Any], answers: Sequence[Any]) -> Failure:
    """Each answer takes the first call that is left and fits it; a call is taken once."""
    left = list(range(len(calls)))
    for answer in answers:
        function = _find_function(functions, _first(answer.keys()))
        fitting = next((place for place in left if _check_call(function, calls[place], answer) is None), None)
        if fitting is None:
            return f"{_NO_ORDER}:cannot_find_match"
        left.remove(fitting)
    return None


def _first(values: Any) -> Any:
    return list(values)[0]  # noqa: RUF015 - an IndexError where there is none, as in the original


def _find_function(functions: Any, name: str) -> Any:
    if not isinstance(functions, list):
        return functions
    return next((function for function in functions if function["name"] == name), None)


def _check_call(function: Any, call: Any, answer: Any) -> Failure:
    """Names, then required arguments, then each argument in the call's order, then those that may not be absent."""
    allowed = _first(answer.values())
    name, parameters = function["name"], function["parameters"]
    properties, required = parameters["properties"], parameters["required"]
    if name not in call:
        return f"{_SIMPLE}:wrong_func_name"
    arguments = call[name]
    if any(parameter not in arguments for parameter in required):
        return f"{_SIMPLE}:missing_required"
    for parameter, value in arguments.items():
        if parameter not in properties or parameter not in allowed:
            return f"{_SIMPLE}:unexpected_param"
        if (failure := _check_argument(properties[parameter], value, allowed[parameter])) is not None:
            return failure
    if any(parameter not in arguments and "" not in values for parameter, values in allowed.items()):
        return f"{_SIMPLE}:missing_optional"
    return None


def _check_argument(schema: Mapping[str, Any], value: Any, answers: Sequence[Any]) -> Failure:
    described = schema["type"]
    expected = _TYPES[described]
    member = _TYPES[schema["items"]["type"]] if described in ("array", "tuple") else None
    if described == "tuple" and type(value) is tuple:
        value = list(value)
    if described == "float" and type(value) is int:
        value = float(value)
    is_variable, failure = _check_type(value, answers, expected, member)
    if failure is not None:
        return failure
    if not is_variable:
        if expected is dict:
            return _check_mapping(value, answers)
        if expected is list and member is dict:
            return _check_mappings(value, answers)
        if expected is str:
            strings = [_simplify(answer) for answer in _members(answers) if type(answer) is str]
            return None if _simplify(value) in strings else "value_error:string"
        if expected is list:
            lists = [[_simplify(part) for part in _members(answer)] for answer in _members(answers)]
            return None if [_simplify(part) for part in value] in lists else "value_error:list/tuple"
    return None if value in answers else "value_error:others"


def _check_type(value: Any, answers: Any, expected: type, member: type | None) -> tuple[bool, Failure]:
    """Whether the value is taken for a variable (the answers are of another type than described), and the failure."""
    answer_type = next((type(answer) for answer in answers if answer != ""), None)
    kind, failure = type(value), None
    if kind is expected:
        is_variable = answer_type is not None and answer_type is not expected
        if member is None or any(_fits_members(value, answer, member) for answer in answers):
            return is_variable, None
        failure = "type_error:nested"
    if answer_type is not None and kind is answer_type:
        return True, failure
    return False, "type_error:simple"


def _fits_members(value: Sequence[Any], answer: Any, member: type) -> bool:
    """Whether every member has the described type or that of the answer's first; any value fits an answer that is no
    list."""
    return type(answer) is not list or all(_check_type(part, answer, member, None)[1] is None for part in value)


def _check_mapping(value: Mapping[str, Any], answers: Sequence[Any]) -> Failure:
    """Fits one of the answers, or fails as it does with the last."""
    failure: Failure = "dict_checker:unclear"
    for answer in _members(answers):
        if answer == "":
            continue
        failure = _compare_mapping(value, answer)
        if failure is None:
            return None
    return failure


def _compare_mapping(value: Mapping[str, Any], answer: Mapping[str, Any]) -> Failure:
    failure = None
    for key, part in value.items():
        if key not in answer:
            failure = "value_error:dict_key"
            break
        if _simplify(part) not in [_simplify(choice) for choice in _members(answer[key])]:
            failure = "value_error:dict_value"
            break
    # A key that is missing hides what was wrong with another.
    if any(key not in value and "" not in choices for key, choices in answer.items()):
        failure = "value_error:dict_key"
    return failure


def _check_mappings(values: Sequence[Any], answers: Sequence[Any]) -> Failure:
    failure: Failure = "list_dict_checker:unclear"
    for answer in _members(answers):
        if len(values) != len(answer):
            failure = "value_error:list_dict_count"
            continue
        failures = (_check_mapping(value, [answer[place]]) for place, value in enumerate(values))
        failure = next((result for result in failures if result is not None), None)
        if failure is None:
            return None
    return failure


def _members(values: Any) -> list[Any]:
    return [values[place] for place in range(len(values))]  # by position: a mapping raises as in the original


def _simplify(value: Any) -> Any:
    """A string without spaces and the marks , . / - _ * ^ in lower case with double quotes; anything else as it is."""
    if type(value) is not str:
        return value
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"')
