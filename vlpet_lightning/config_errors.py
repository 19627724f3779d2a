"""What is wrong in a config, in a line: the parser's own report lists every type that it has tried."""

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
WRONG_TYPE = re.compile(r"Parser key \"([\w.]+)\":\s+Expected an? <class '(\w+)'>\. Got value: (.*)")
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
SECTIONS = ("seed_everything", "trainer", "model", "data", "ckpt_path", "weights_only")


def settings_of(class_path: str) -> list[str]:
    """Names of a class's settings; none where it cannot be imported."""
    module, _, name = class_path.rpartition(".")
    try:
        return _names(getattr(import_module(module), name))
    except (ImportError, AttributeError, ValueError):
        return []


def _names(kind: type) -> list[str]:
    names: dict[str, None] = {}
    for ancestor in kind.__mro__:  # whoever takes **kwargs hands them to the next
        parameters = inspect.signature(vars(ancestor).get("__init__", object.__init__)).parameters
        names |= dict.fromkeys(name for name, p in parameters.items() if name != "self" and p.kind not in VARIABLE)
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            break
    return list(names)


def _unknown(owner: str, name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{owner} has no setting {name!r}: {guess}it has {', '.join(known)}"


def explain(message: str) -> str:
    """The parser's message as one sentence, or the message itself where it is of another kind."""
    unknown = UNKNOWN.search(message)
    if unknown is not None:
        behind, before = BEHIND.search(unknown[2]), BEFORE.findall(message[: unknown.start()])
        owner = behind[1] if behind is not None else before[-1] if before else ""
        known = settings_of(owner)
        if known:
            return _unknown(owner, unknown[1], known)
    stray = STRAY.search(message)
    if stray is not None:
        section, _, rest = stray[1].partition(".")
        if section == "trainer":
            return _unknown("trainer", rest.split(".")[0], _names(Trainer))
        if section not in SECTIONS:
            return _unknown("a config", section, list(SECTIONS))
    wrong = WRONG_TYPE.search(message)
    return f"{wrong[1]} must be of type {wrong[2]}, got {wrong[3].strip()}" if wrong is not None else message
