"""One-line explanations of config errors; jsonargparse's own report lists every type it tried."""

from __future__ import annotations

import inspect
import re
from difflib import get_close_matches
from importlib import import_module

from lightning.pytorch import Trainer

UNKNOWN = re.compile(r"Option '([\w.]+)' is not accepted(.*)")
BEFORE = re.compile(r"class_path '([\w.]+)'")
BEHIND = re.compile(r"class_path='([\w.]+)'")
STRAY = re.compile(r"does not accept option '([\w.]+)'")
NOWHERE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
REQUIRED = re.compile(r"the following arguments are required: (\w+(?:, \w+)*)(.*)")
KEY = re.compile(r"Parser key \"([\w.]+)\"")
CHOICES = re.compile(r"Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)")
WRONG_TYPE = re.compile(r"Parser key \"([\w.]+)\":\s+Expected an? <class '(\w+)'>\. Got value: (.*)")
OPTIONAL = re.compile(
    r"Parser key \"([\w.]+)\":\s+Does not validate .*\s+Subtypes: \[<class '(\w+)'>, <class 'NoneType'>\]"
)
MANY = re.compile(
    r"Parser key \"([\w.]+)\":\s+(?:- Expected a path .*\s+)?(?:- )?Does not validate .*\s+"
    r"Subtypes: \[(list|dict)\[(.*)\s+Errors:\s+- Expected an? <class '\2'>\s"
)
ELEMENT = re.compile(
    r"Parser key \"([\w.]+)\":\s+(?:- Expected a path .*\s+)?(?:- )?Does not validate .*\s+"
    r"Subtypes: \[(?:list|dict)\[.*\s+Errors:\s+- "
    r"(?:Expected an? <class '(\w+)'>|Not a valid subclass of (\w+))\. Got value: (.*)"
)
NO_FILE = re.compile(r"Parser key \"config\": (?:File does not exist|Path is not a file): '(.*)'")
NO_MODEL = re.compile(r"the following arguments are required: (?:\w+\.)?model$")
GIVEN = re.compile(r"Given value: (.*)")
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
SECTIONS = ("seed_everything", "trainer", "model", "data", "ckpt_path", "weights_only", "overlays")


def settings_of(class_path: str) -> list[str]:
    """Return the names of a class's settings; empty if the class cannot be imported."""
    module, _, name = class_path.rpartition(".")
    try:
        return _names(getattr(import_module(module), name))
    except (ImportError, AttributeError, ValueError):
        return []


def _names(kind: type) -> list[str]:
    names: dict[str, None] = {}
    for ancestor in kind.__mro__:  # a class with **kwargs passes them on to the next
        parameters = inspect.signature(vars(ancestor).get("__init__", object.__init__)).parameters
        names |= dict.fromkeys(name for name, p in parameters.items() if name != "self" and p.kind not in VARIABLE)
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            break
    return list(names)


def _is_collection(class_path: str, setting: str) -> bool:
    """Whether a class's setting is a list or a mapping."""
    module, _, name = class_path.rpartition(".")
    try:
        kinds = getattr(import_module(module), name).__mro__
    except (ImportError, AttributeError, ValueError):
        return False
    for kind in kinds:  # whoever takes **kwargs hands them to the next
        found = inspect.signature(vars(kind).get("__init__", object.__init__)).parameters.get(setting)
        if found is not None:
            return str(found.annotation).startswith(("list[", "dict["))
    return False


def unknown_setting(owner: str, name: str, known: list[str]) -> str:
    """Explain a setting that does not exist, with the closest one that does."""
    close = get_close_matches(name, known, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{owner} has no setting {name!r}: {guess}it has {', '.join(known)}"


def _stray(message: str) -> str | None:
    """Explain a setting that does not exist."""
    unknown = UNKNOWN.search(message)
    if unknown is not None:
        behind, before = BEHIND.search(unknown[2]), BEFORE.findall(message[: unknown.start()])
        owner = behind[1] if behind is not None else before[-1] if before else ""
        known = settings_of(owner)
        if known:
            return unknown_setting(owner, unknown[1], known)
    stray = STRAY.search(message)
    if stray is not None:
        section, _, rest = stray[1].partition(".")
        if section == "trainer":
            return unknown_setting("trainer", rest.split(".")[0], _names(Trainer))
        if section not in SECTIONS:
            return unknown_setting("a config", section, list(SECTIONS))
    return None


def _nowhere(message: str) -> str | None:
    """Explain a class that does not exist."""
    nowhere = NOWHERE.search(message)
    if nowhere is None:
        return None
    names = getattr(import_module(nowhere[1]), "__all__", [])
    close = get_close_matches(nowhere[2], names, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{nowhere[1]} has no {nowhere[2]!r}: {guess}" + (
        f"it has {', '.join(names)}" if names else "see its source"
    )


def _required(message: str) -> str | None:
    """Explain a missing setting that has no default."""
    required = REQUIRED.search(message)
    if required is None:
        return None
    behind, before = BEHIND.search(required[2]), BEFORE.findall(message[: required.start()])
    owner = behind[1] if behind is not None else before[-1] if before else ""
    return f"{owner} needs {required[1]}: give it in init_args" if owner else None


def _value(message: str) -> str | None:
    """Explain a value that a setting does not accept."""
    choices = CHOICES.search(message)
    if choices is not None:
        *_, key = KEY.findall(message[: choices.start()])
        return f"{key} must be one of {choices[1]}, got {_given(choices[2])}"
    wrong = WRONG_TYPE.search(message)
    if wrong is not None:
        owners = BEFORE.findall(message[: wrong.start()])
        of = "each element of " if owners and _is_collection(owners[-1], wrong[1]) else ""
        return f"{of}{wrong[1]} must be of type {wrong[2]}, got {_given(wrong[3])}"
    many = MANY.search(message)
    single = None if many is None else GIVEN.search(message, many.end())
    if many is not None and single is not None:
        value = single[1].strip()
        wanted = "a list" if many[2] == "list" else "a mapping of names to values"
        cure = f": write [{value}]" if many[2] == "list" and many[3].startswith(("str]", "typing.Literal")) else ""
        return f"{many[1]} must be {wanted}, or null, got {value}{cure}"
    element = ELEMENT.search(message)
    if element is not None:
        wanted = f"of type {element[2]}" if element[2] else f"a {element[3]}, with class_path or its settings"
        return f"each element of {element[1]} must be {wanted}, got {_given(element[4])}"
    optional = OPTIONAL.search(message)
    given = None if optional is None else GIVEN.search(message, optional.end())
    return None if given is None else f"{optional[1]} must be of type {optional[2]}, or null, got {given[1].strip()}"  # type: ignore[index]


def _given(text: str) -> str:
    """Return the value itself: the parser appends the object around it."""
    return text.partition(". Got value: ")[0].strip()


def _config(message: str) -> str | None:
    """Explain a missing config or config file."""
    if NO_MODEL.search(message) is not None:
        return "no model to run: give a config, such as --config experiments/image_text.yaml"
    missing = NO_FILE.search(message)
    return None if missing is None else f"no config file {missing[1]}: look in experiments for those that come with it"


def explain(message: str) -> str:
    """Return the parser's message as one sentence, or unchanged if it is of another kind."""
    return _config(message) or _stray(message) or _nowhere(message) or _required(message) or _value(message) or message
