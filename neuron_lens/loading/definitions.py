"""A family of checkpoints as data: one file of `model_defs/`, parsed and checked before anything is loaded.

    title = "GPT-2"
    architectures = ["GPT2LMHeadModel"]     # names in config.json that the file covers
    examples = ["gpt2", "distilgpt2"]
    based_on = "llama"                      # start from another file; what follows overrides it
    prefixes = ["transformer."]             # a tensor's name may begin with one of these, or not
    ignored = ["*pdrop*"]                   # fields of config.json that change nothing here

    [when]                                  # of several files for one architecture: fields that must agree
    [expect]                                # fields that must hold this value, or be absent
    [choices]                               # fields of TransformerConfig that are the same for all
    norm = "layer"
    [config]                                # field of TransformerConfig = field of config.json
    n_layers = "n_layer"                    # or a list: the first that is there
    tied = { from = "tie_word_embeddings", default = true }
    qk_norm = { from = "qk_layernorm", default = false, values = { true = "head", false = "none" } }
    activation = { from = "activation_function", convert = "activation" }
    [tensors]                               # name in the checkpoint = name in our model
    "wte.weight" = "embed.weight"
    "h.{layer}.attn.c_attn.weight" = ["transpose", "split(3)", "blocks.{layer}.attn.{q,k,v}.weight"]
    "h.{layer}.attn.bias" = ""              # dropped on purpose
    "h.{layer}.{ln_1|ln_attn}.weight" = "blocks.{layer}.ln_attn.weight"             # goes by either name
    "h.{layer}.experts.{expert}.up" = ["stack", "blocks.{layer}.mlp.up"]            # {expert} or {head}: one axis here

Where a value can be absent, "" stands for JSON's null. A row of `[tensors]` that ends in several names needs a transform that
makes as many tensors. Knows neither torch nor any model: the names of conversions and transforms are checked against closed
sets, and a wrong one is named with its line.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from neuron_lens.errors import ConfigError, did_you_mean

__all__ = [
    "CONVERSIONS",
    "TRANSFORMS",
    "Definition",
    "FieldRule",
    "TensorRule",
    "Transform",
    "read_definition",
]

# Closed sets. Conversion -> its options; transform -> (numbers it takes, least and most; tensors it makes: a count, or
# "n" for its first number).
CONVERSIONS: dict[str, frozenset[str]] = {
    "activation": frozenset(),
    "inverse": frozenset(),
    "inverse_sqrt": frozenset(),
    "or_four_d_model": frozenset(),
    "sqrt": frozenset(),
    "rotary": frozenset(
        {"base", "default_base", "fraction", "default_fraction", "dims", "pairing", "local_base"}
        | {"default_local_base", "original_context"}
    ),
    "windows": frozenset(
        {"size", "default", "types", "enabled", "from_layer", "full_every", "full_every_from"}
    ),
}
TRANSFORMS: dict[str, tuple[int, int, int | str]] = {
    "transpose": (0, 0, 1),
    "split": (1, 2, "n"),
    "split_qkv": (0, 0, 3),
    "split_qkv_by_head": (0, 0, 3),
    "alternate": (1, 2, "n"),
    "offset": (1, 1, 1),
    "stack": (0, 0, 1),
}
_COPYING = {"split_qkv_by_head", "offset", "stack"}

_TOP_LEVEL = {
    "title", "architectures", "examples", "based_on", "prefixes", "ignored",
    "when", "expect", "choices", "config", "tensors",
}  # fmt: skip
# what a file does not take over from the one it is based on
_OWN = {"title", "architectures", "examples", "when", "based_on"}
_TRANSFORM = re.compile(r"(\w+)(?:\(([^()]*)\))?")
_BRACES = re.compile(r"\{(\w+(?:,\w+)+)\}")  # {q,k,v}: several names
_EITHER = re.compile(r"\{(\w+(?:\|\w+)+)\}")  # {a|b}: one name or the other
_PLACEHOLDER = re.compile(r"\{(\w*)\}")
_STACKED = {"expert", "head"}  # numbers that a checkpoint counts in names and we along an axis
_MISSING = object()


@dataclass(frozen=True, kw_only=True)
class FieldRule:
    """Where one field of TransformerConfig comes from.

    names: fields of config.json, the first that is there; none for conversions that read what they need themselves.
    values: the value, as JSON writes it -> ours. options: of the conversion.
    """

    names: tuple[str, ...]
    default: Any = _MISSING
    values: dict[str, Any] | None = None
    convert: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def has_default(self) -> bool:
        """Whether the field may be absent."""
        return self.default is not _MISSING


@dataclass(frozen=True)
class Transform:
    """A named transform with its numbers: split(3) is Transform("split", (3,))."""

    name: str
    numbers: tuple[float, ...] = ()

    @property
    def makes(self) -> int:
        """How many tensors it makes of one."""
        count = TRANSFORMS[self.name][2]
        return int(self.numbers[0]) if isinstance(count, str) else count


@dataclass(frozen=True, kw_only=True)
class TensorRule:
    """One row of the table of tensors. targets is empty for a tensor dropped on purpose."""

    pattern: str
    transforms: tuple[Transform, ...]
    targets: tuple[str, ...]
    place: str  # file:line

    @cached_property
    def regex(self) -> re.Pattern[str]:
        """Matches the checkpoint's names, with the groups `layer` and `item`."""
        pattern = ""
        for part in re.split(r"(\{[^{}]*\})", self.pattern):
            if part == "{layer}":
                pattern += r"(?P<layer>\d+)"
            elif part[1:-1] in _STACKED:
                pattern += r"(?P<item>\d+)"
            else:
                pattern += f"(?:{part[1:-1]})" if _EITHER.fullmatch(part) else re.escape(part)
        return re.compile(pattern)

    @property
    def stacks(self) -> bool:
        """Whether several tensors, one for each expert or head, become one."""
        return any(transform.name == "stack" for transform in self.transforms)

    @property
    def copies(self) -> bool:
        """Whether what it makes cannot be a view of the checkpoint's tensor."""
        return any(transform.name in _COPYING for transform in self.transforms)


@dataclass(frozen=True, kw_only=True)
class Definition:
    """One file of `model_defs/`; the fields are described in this module's docstring."""

    path: Path
    title: str
    architectures: tuple[str, ...]
    examples: tuple[str, ...]
    prefixes: tuple[str, ...]
    ignored: tuple[str, ...]
    when: dict[str, Any]
    expect: dict[str, tuple[Any, ...]]
    choices: dict[str, Any]
    config: dict[str, FieldRule]  # "experts.n_used" for a field of a part
    tensors: tuple[TensorRule, ...]

    @property
    def name(self) -> str:
        """The file's name without .toml."""
        return self.path.stem

    def ignores(self, name: str) -> bool:
        """Whether a field of config.json changes nothing here."""
        return any(fnmatchcase(name, pattern) for pattern in self.ignored)


def read_definition(path: Path, *, common_ignored: tuple[str, ...] = ()) -> Definition:
    """Parse and check a definition file.

    common_ignored: fields of config.json that no family reads.

    Raises ConfigError with every problem of the file and its line: no TOML, unknown keys, conversions or
    transforms, a tensor of ours named by two rows, placeholders that do not agree.
    """
    tables, lines = _read_tables(path, ())
    problems = [f"{path.name}: unknown key {key!r}" for key in tables if key not in _TOP_LEVEL]
    problems += [
        f"{path.name}: {key!r} is missing"
        for key in ("title", "architectures", "tensors")
        if not tables.get(key)
    ]
    rules: list[TensorRule] = []
    for pattern, value in tables.get("tensors", {}).items():
        place = lines.get(pattern, path.name)
        try:
            rules.append(_tensor_rule(pattern, value, place))
        except ConfigError as error:
            problems.append(f"{place}: {error}")
    problems += _twice(rules)
    fields: dict[str, FieldRule] = {}
    for name, value in tables.get("config", {}).items():
        try:
            fields[name] = _field_rule(value)
        except ConfigError as error:
            problems.append(f"{lines.get(name.split('.')[-1], path.name)}: {name}: {error}")
    if problems:
        raise ConfigError(f"the model definition {path} is wrong: " + "; ".join(problems))
    return Definition(
        path=path,
        title=tables["title"],
        architectures=tuple(tables["architectures"]),
        examples=tuple(tables.get("examples", ())),
        prefixes=tuple(tables.get("prefixes", ())),
        ignored=(*tables.get("ignored", ()), *common_ignored),
        when=tables.get("when", {}),
        expect={
            k: tuple(map(_or_none, v if isinstance(v, list) else [v]))
            for k, v in tables.get("expect", {}).items()
        },
        choices={name: _or_none(value) for name, value in tables.get("choices", {}).items()},
        config=fields,
        tensors=tuple(rules),
    )


def _read_tables(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's tables over those it is based on, and file:line of each key."""
    if path in seen:
        raise ConfigError(f"the model definition {path} is based on itself")
    try:
        text = path.read_text(encoding="utf-8")
        own = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read the model definition {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        # tomllib names the line, also for a key that stands twice
        raise ConfigError(f"the model definition {path} is no TOML: {error}") from error
    own["config"] = _flat(own.get("config", {}))
    lines: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if found := re.match(r'\s*(?:"([^"]+)"|([\w.]+))\s*=', line):
            lines[found[1] or found[2]] = f"{path.name}:{number}"
    if "based_on" not in own:
        return own, lines
    base, base_lines = _read_tables(path.with_name(f"{own['based_on']}.toml"), (*seen, path))
    merged = {key: value for key, value in base.items() if key not in _OWN}
    # what a file chooses outright it no longer reads from a field, and the other way round
    for ours, other in (("config", "choices"), ("choices", "config")):
        merged[ours] = {k: v for k, v in base.get(ours, {}).items() if k not in own.get(other, {})}
    filled = {target for row in own.get("tensors", {}).values() for target in _named_targets(row)}
    merged["tensors"] = {
        k: row for k, row in base["tensors"].items() if not filled & set(_named_targets(row))
    }
    for key, value in own.items():
        if key in ("choices", "config", "expect", "tensors"):
            merged[key] = {**merged.get(key, {}), **value}
        else:
            merged[key] = [*base.get(key, ()), *value] if key in ("ignored", "prefixes") else value
    return merged, {**base_lines, **lines}


def _named_targets(row: Any) -> list[str]:
    """Ours that a row of [tensors] names: "attn.{q,k,v}" is three."""
    target = row[-1] if isinstance(row, list) and row else row
    if not isinstance(target, str) or not target:
        return []
    braces = _BRACES.search(target)
    return [target.replace(braces[0], choice) for choice in braces[1].split(",")] if braces else [target]


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"experts": {"n_used": "…"}} -> {"experts.n_used": "…"}; a table with `from` or `convert` is a rule."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict) and not value.keys() & {"from", "convert"}:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _field_rule(value: Any) -> FieldRule:
    if isinstance(value, str | list):
        value = {"from": value}
    if not isinstance(value, dict):
        raise ConfigError(f"{value!r} is no field of config.json; a fixed value belongs in [choices]")
    rest = {key: _or_none(given) for key, given in value.items()}
    convert, names = rest.pop("convert", None), rest.pop("from", ())
    # without a field of its own, a default is an option of the conversion
    default = rest.pop("default", _MISSING) if names else _MISSING
    values = {key: _or_none(ours) for key, ours in rest.pop("values", {}).items()} or None
    if convert is not None and convert not in CONVERSIONS:
        raise ConfigError(f"unknown conversion {convert!r}: {did_you_mean(convert, CONVERSIONS)}")
    allowed = CONVERSIONS[convert] if convert else frozenset()
    if unknown := sorted(rest.keys() - allowed):
        raise ConfigError(
            f"unknown options {unknown}: {convert or 'a field'} takes {sorted(allowed) or 'none'}"
        )
    names = (names,) if isinstance(names, str) else tuple(names)
    return FieldRule(names=names, default=default, values=values, convert=convert, options=rest)


def _or_none(value: Any) -> Any:
    """TOML has no null: an empty text stands for it."""
    return None if value == "" else value


def _tensor_rule(pattern: str, value: Any, place: str) -> TensorRule:
    row = [value] if isinstance(value, str) else value
    if not isinstance(row, list) or not row or not all(isinstance(part, str) for part in row):
        raise ConfigError(
            f"{pattern!r} = {value!r}: expected a name, or a list of transforms that ends in a name"
        )
    *steps, target = row
    if not target:
        return TensorRule(pattern=pattern, transforms=(), targets=(), place=place)
    transforms = tuple(_transform(step) for step in steps)
    targets = tuple(_named_targets(target))
    made = 1
    for transform in transforms:
        made *= transform.makes
    if made != len(targets):
        raise ConfigError(
            f"{pattern!r}: {', '.join(steps) or 'no transform'} makes {made} tensors, named are {len(targets)}"
        )
    placeholders = set(_PLACEHOLDER.findall(pattern))
    stacked = placeholders & _STACKED
    if unknown := sorted(placeholders - _STACKED - {"layer"}):
        raise ConfigError(
            f"{pattern!r}: unknown placeholder {unknown}; known: {{layer}}, {{expert}}, {{head}}"
        )
    for name in targets:
        if set(_PLACEHOLDER.findall(name)) != placeholders - stacked:
            raise ConfigError(f"{pattern!r} -> {name!r}: {{layer}} must stand on both sides or on neither")
    if len(stacked) != sum(transform.name == "stack" for transform in transforms):
        raise ConfigError(f"{pattern!r}: {{expert}} or {{head}} and the transform 'stack' belong together")
    return TensorRule(pattern=pattern, transforms=transforms, targets=targets, place=place)


def _transform(text: str) -> Transform:
    """ "split(3)" -> Transform("split", (3,))"""
    match = _TRANSFORM.fullmatch(text.strip())
    name = match[1] if match else text
    if match is None or name not in TRANSFORMS:
        raise ConfigError(f"unknown transform {text!r}: {did_you_mean(name, TRANSFORMS)}")
    least, most, _ = TRANSFORMS[name]
    try:
        numbers = tuple(float(n) if "." in n else int(n) for n in (match[2] or "").split(",") if n.strip())
    except ValueError:
        raise ConfigError(f"transform {text!r}: its arguments are numbers") from None
    if not least <= len(numbers) <= most:
        raise ConfigError(f"transform {text!r}: takes {least} to {most} numbers, given {len(numbers)}")
    return Transform(name, numbers)


def _twice(rules: list[TensorRule]) -> list[str]:
    """Tensors of ours that two rows fill."""
    first: dict[str, TensorRule] = {}
    problems = []
    for rule in rules:
        for target in rule.targets:
            if target in first:
                problems.append(
                    f"{rule.place}: {target!r} is already filled by {first[target].pattern!r} ({first[target].place})"
                )
            first.setdefault(target, rule)
    return problems
