"""From a checkpoint's config.json to a TransformerConfig, by a definition's rows.

Every field of the file is either read, ignored by name, or refused; all problems are reported at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from neuron_lens.errors import CheckpointError, ConfigError
from neuron_lens.loading.conversions import FUNCTIONS, Fields, MissingField
from neuron_lens.loading.definitions import Definition, FieldRule
from neuron_lens.transformer.config import TransformerConfig

__all__ = ["map_config"]


def map_config(
    raw: Mapping[str, Any], definition: Definition, *, source: str, name: str = ""
) -> TransformerConfig:
    """Our configuration of a checkpoint.

    raw: the contents of config.json. source: where they are from, for messages. name: of the model.

    Raises CheckpointError naming every field that is missing, unknown, or holds a value whose part does not exist here.
    """
    fields = Fields(raw)
    problems = _unexpected(fields, definition)
    for key in definition.when:
        fields.take(key, None)
    mapped: dict[str, Any] = dict(definition.choices)
    fields.known = mapped
    # conversions that look around come last: they read what the others have mapped
    for target, rule in sorted(definition.config.items(), key=lambda item: not item[1].names):
        try:
            _put(mapped, target, _value(rule, fields))
        except MissingField as error:
            problems.append(f"the field {error} is missing")
        except ValueError as error:
            problems.append(f"{'/'.join(rule.names) or target}: {error}")
        except (KeyError, TypeError, AttributeError) as error:
            problems.append(f"{'/'.join(rule.names) or target} is not as expected: {error!r}")
    unknown = [field for field in fields.unread() if not definition.ignores(field)]
    if unknown:
        listed = ", ".join(f"{field} = {json.dumps(raw[field])[:60]}" for field in unknown)
        problems.append(
            f"nothing reads {listed}; add each to [config] of model_defs/{definition.path.name}, or to its "
            f"'ignored' where it changes nothing"
        )
    if problems:
        raise CheckpointError(f"{source} cannot be loaded as {definition.title}: " + "; ".join(problems))
    try:
        return TransformerConfig(name=name, **mapped)
    except ConfigError as error:
        raise CheckpointError(f"{source} contradicts itself: {error}") from error


def _unexpected(fields: Fields, definition: Definition) -> list[str]:
    problems = []
    for name, allowed in definition.expect.items():
        given = fields.take(name, allowed[0])
        if given not in allowed:
            problems.append(
                f"{name} is {given!r}, and {definition.title} is only known here with {' or '.join(map(repr, allowed))} "
                f"(that part would have to be added to TransformerConfig and to model_defs/{definition.path.name})"
            )
    return problems


def _value(rule: FieldRule, fields: Fields) -> Any:
    if not rule.names:
        assert rule.convert is not None, "a rule without fields has a conversion"
        return FUNCTIONS[rule.convert](fields, None, **rule.options)
    value = fields.first(rule.names, rule.default) if rule.has_default else fields.first(rule.names)
    if rule.values is not None:
        key = value if isinstance(value, str) else json.dumps(value)
        if key not in rule.values:
            raise ValueError(f"{value!r} is unknown; known: {', '.join(rule.values)}")
        value = rule.values[key]
    return value if rule.convert is None else FUNCTIONS[rule.convert](fields, value, **rule.options)


def _put(mapped: dict[str, Any], target: str, value: Any) -> None:
    *parts, last = target.split(".")
    for part in parts:
        mapped[part] = mapped = dict(mapped.get(part, {}))  # a fresh one: the definition's own stays as it is
    mapped[last] = value
