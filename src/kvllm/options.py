"""Options declared once: types, bounds, defaults and help of a dataclass's fields, checked strictly when it is built.

    @strict_dataclass
    class StreamingLLM(Method):
        num_sink_tokens: int = Field(4, ge=0, description="Tokens at the start of the window that are always kept.")

pydantic does the checking. Command-line flags, `kvllm methods` and error messages come from the same declarations.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic.dataclasses
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticKnownError

from kvllm.errors import UsageError

# No conversions ("0.5" and true are not numbers), but an int is accepted as a float.
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

C = TypeVar("C")
N = TypeVar("N", int, float)


def _not_a_float(value: object) -> object:
    if isinstance(value, float):
        raise PydanticKnownError("int_type")
    return value


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("must be odd, so that the pooling is centred")
    return value


Count = Annotated[int, Field(ge=1)]
# For a Literal of integers, which pydantic compares by value: 4.0 would pass as 4, even in strict mode.
NotAFloat = BeforeValidator(_not_a_float)
Share = Annotated[float, Field(ge=0, le=1)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
KernelSize = Annotated[
    int, Field(ge=1, description="Width of the pooling, an odd number; 1 = none."), AfterValidator(_odd)
]
RopeTheta = Annotated[
    float | None,
    Field(gt=1, description="The model's rope_theta, as in its config.json (such as 10000.0); null = unknown."),
]
BaseOptions = Annotated[Mapping[str, Any], Field(description="Options of the base method.")]


@dataclass(frozen=True)
class Option:
    """One field of a strict dataclass.

    type:    its JSON type: integer, number, boolean, string, array or object; "" for a union
    accepts: the accepted values in words, such as "a number in (0, 1]"
    help:    its description; "" if it has none
    """

    name: str
    default: Any
    type: str
    accepts: str
    help: str


@dataclass_transform(frozen_default=True)
def strict_dataclass(cls: type[Any] | None = None, *, kw_only: bool = False) -> Any:
    """Class decorator: a frozen pydantic dataclass whose constructor raises UsageError for a wrong option.

    It rejects values of another type or out of bounds, nan, infinity and unknown names. Checks that involve several
    fields belong in `__post_init__`, and raise UsageError.
    """
    if cls is None:
        return functools.partial(strict_dataclass, kw_only=kw_only)
    made: Any = pydantic.dataclasses.dataclass(cls, frozen=True, kw_only=kw_only, config=STRICT)
    validate: Callable[..., None] = made.__init__

    @functools.wraps(validate)
    def __init__(self: Any, /, *args: Any, **kwargs: Any) -> None:
        try:
            validate(self, *args, **kwargs)
        except ValidationError as e:
            raise _refusal(made, e, kwargs) from None

    made.__init__ = __init__
    return made


@functools.cache
def options_of(cls: Any) -> Mapping[str, Option]:
    """The fields of a strict dataclass by name, in the order of declaration."""
    schemas = TypeAdapter(cls).json_schema()["properties"]
    return {
        name: Option(
            name,
            field.get_default(call_default_factory=True, validated_data={}),
            schemas[name].get("type", ""),
            accepted(schemas[name]),
            schemas[name].get("description", ""),
        )
        for name, field in cls.__pydantic_fields__.items()
    }


def check_value(adapter: TypeAdapter[C], name: str, value: object) -> C:
    """`value`, if the adapter's type accepts it; otherwise a UsageError that calls it `name`."""
    try:
        return adapter.validate_python(value)
    except ValidationError as e:
        schema = adapter.json_schema()
        raise UsageError(_wrong_value(name, value, e, accepted(schema), schema.get("description", ""))) from None


def parse_json(option: str, text: str) -> Any:
    """The value of a JSON text that the user gave as `option`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise UsageError(f"{option} {text[:80]}: not valid JSON ({e}).") from None


def parse_numbers(option: str, text: str, kind: type[N], example: str) -> list[N]:
    """The numbers of a comma-separated list that the user gave as `option`."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text}: expected numbers separated by commas, such as {example}.") from None


def no_such(what: str, name: str, known: Collection[str]) -> str:
    """Message for an unknown name: suggests the closest known one, or lists all."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"no such {what}; did you mean {close[0]!r}?"
    return f"no such {what}; {what}s are {', '.join(known) or 'none'}."


def accepted(schema: Mapping[str, Any]) -> str:
    """The values that a JSON schema accepts, in words."""
    if "anyOf" in schema:
        return " or ".join(map(accepted, schema["anyOf"]))
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if "items" in schema:
        return f"a list, each entry {accepted(schema['items'])}"
    return KINDS[schema["type"]] + _bounds(schema)


KINDS = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "a string",
    "array": "a list",
    "object": "a mapping of names to values",
    "null": "null",
}
TYPE_NAMES = {
    bool: "a boolean",
    int: "an integer",
    float: "a float",
    str: "a string",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


def _bounds(schema: Mapping[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    left = f"[{low:g}" if low is not None else f"({above:g}" if above is not None else ""
    right = f"{high:g}]" if high is not None else f"{below:g})" if below is not None else ""
    if left and right:
        return f" in {left}, {right}"
    if left:
        return f" >{'=' if low is not None else ''} {left[1:]}"
    return f" <{'=' if high is not None else ''} {right[:-1]}" if right else ""


def _refusal(cls: Any, refused: ValidationError, given: Mapping[str, Any]) -> Exception:
    """What to raise for pydantic's first error; given: the keyword arguments."""
    error = refused.errors(include_url=False)[0]
    location, value = error["loc"], error["input"]
    if not location:  # from __post_init__
        return error["ctx"]["error"]
    options = options_of(cls)
    name = location[0]
    if isinstance(name, int) and name < len(options):  # a positional argument
        name = list(options)[name]
    if error["type"] == "unexpected_keyword_argument":
        return UsageError(f"{name}={_shown(value)}: {no_such('option', str(name), options)}")
    if name not in options or error["type"] == "unexpected_positional_argument":
        return TypeError(f"{cls.__name__}: {error['msg']}: {_shown(value)}")
    option = options[str(name)]
    return UsageError(_wrong_value(option.name, given.get(option.name, value), refused, option.accepts, option.help))


def _wrong_value(name: str, value: object, refused: ValidationError, accepts: str, help: str) -> str:
    """One line: the option and its value, what it must be, and the first sentence of its help."""
    error = refused.errors(include_url=False)[0]
    if error["type"] == "value_error":  # from a validator of ours
        expected = str(error["ctx"]["error"])
    else:
        expected = f"must be {accepts}"
        if error["type"].endswith("_type") and error["input"] is value:  # not an entry of a list or mapping
            expected += f", not {TYPE_NAMES.get(type(value), type(value).__name__)}"
    hint = " " + re.split(r"(?<=\.)\s", help, maxsplit=1)[0] if help else ""
    return f"{name}={_shown(value)}: {expected}.{hint}"


def _shown(value: object) -> str:
    """A value's repr on one line of at most 100 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else text[:97] + "..."
