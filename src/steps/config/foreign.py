"""Settings that a user brings along in another program's words, laid among our own.

Whoever reads such words (`nemo_rl`, `bridge_target` below) says what it found as a Reading; `adopt` lays its claims on
the configuration: the stronger layer wins key by key, and one place that says two things is a fault.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from steps.config.base import Adopted, Section
from steps.config.peft import names
from steps.config.validate import keys, show, source_of
from steps.errors import Problem, suggest


@dataclass(frozen=True)
class Claim:
    """One setting said in another program's words.

    key:     our dotted key ("peft.dim").
    written: the dotted key that the user wrote ("policy.megatron_cfg.peft.dim").
    """

    key: str
    value: Any
    written: str


@dataclass
class Reading:
    """What was found. The fields are those of Adopted; taken: dotted keys that are not ours and go."""

    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)


def adopt(data: Mapping[str, Any], sources: Mapping[str, str], readings: Iterable[Reading]) -> Adopted:
    """The configuration with the claims in place, in the order of the readings, and without what was taken."""
    made: dict[str, Any] = {name: dict(value) if isinstance(value, Mapping) else value for name, value in data.items()}
    own, written = dict(sources), dict[str, str]()
    notes, problems, unread = list[str](), list[Problem](), list[str]()
    for reading in readings:
        notes += reading.notes
        problems += reading.problems
        unread += reading.unread
        for claim in reading.claims:
            section, _, name = claim.key.rpartition(".")
            if made.get(section) is None:
                made[section] = {}
            if not isinstance(made[section], dict):
                continue  # it is no section, which is said when it is typed
            if name in made[section] and not _gives_way(claim, made[section][name], sources, notes, problems):
                continue
            made[section][name] = claim.value
            own = {key: source for key, source in own.items() if not _below(key, claim.key)}
            own[claim.key] = source_of(claim.written, sources)
            written[claim.key] = claim.written
        for key in reading.taken:
            section, _, name = key.rpartition(".")
            place = made.get(section) if section else made
            if isinstance(place, dict):
                place.pop(name, None)
            own = {name: source for name, source in own.items() if not _below(name, key)}
    return Adopted(made, own, written, unread, notes, problems)


def outgrown(adopted: Adopted, key: str, section: type[Section]) -> Adopted:
    """Without the settings of another kind that a weaker layer gave to a section of several kinds.

    key: the section's ("peft"). Who chooses `peft.type=waveft` on top of a shipped file has not asked for that file's
    `dim`; each such key is left out with a note. Beside the choice itself, or stronger, it stays and is a fault.
    """
    values, order = adopted.data.get(key), list(adopted.sources)
    if not isinstance(values, Mapping) or values.get("type") not in section.kinds():
        return adopted
    mine, chosen = keys(section.variant(values)), _position(f"{key}.type", order)
    where = _layer(source_of(f"{key}.type", adopted.sources))
    gone = [
        name
        for name in values
        if name not in mine
        and _position(f"{key}.{name}", order) < chosen
        and _layer(source_of(f"{key}.{name}", adopted.sources)) != where  # one command line: in whatever order
        and any(name in keys(other) for other in section.classes().values())
    ]
    if not gone:
        return adopted
    notes = [
        f"{key}.{name}: {values['type']} has no such setting; {show(values[name], f'{key}.{name}')} "
        f"({source_of(f'{key}.{name}', adopted.sources)}) is left out"
        for name in gone
    ]
    kept = {name: value for name, value in values.items() if name not in gone}
    sources = {
        name: source
        for name, source in adopted.sources.items()
        if not any(_below(name, f"{key}.{other}") for other in gone)
    }
    return replace(adopted, data={**adopted.data, key: kept}, sources=sources, notes=[*adopted.notes, *notes])


def _below(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def _gives_way(claim: Claim, own: Any, sources: Mapping[str, str], notes: list[str], problems: list[Problem]) -> bool:
    """Whether our key's value, given beside a claim, gives way to it."""
    here, there = source_of(claim.written, sources), source_of(claim.key, sources)
    if _layer(here) == _layer(there) and own != claim.value:
        problems.append(
            Problem(
                where=claim.written,
                what=f"means {claim.key} {show(claim.value, claim.key)}, but "
                f"{claim.key}{f' ({there})' if there != here else ''} is {show(own, claim.key)}",
                source=here,
                hint="Leave one of the two out.",
            )
        )
        return False
    order = list(sources)
    if _position(claim.written, order) > _position(claim.key, order):
        return True
    if own != claim.value:
        notes.append(f"{claim.written}: {show(claim.value, claim.key)} gives way to {claim.key} ({there})")
    return False


def _layer(source: str) -> str:
    """A source without its line: the file, or "command line"."""
    name, colon, line = source.rpartition(":")
    return name if colon and line.isdecimal() else source


def _position(key: str, order: list[str]) -> int:
    """How late a key was laid: its own place, the first inside it, or that of the section it lies in."""
    if key in order:
        return order.index(key)
    inside = next((place for place, other in enumerate(order) if other.startswith(f"{key}.")), None)
    if inside is not None:
        return inside
    above = key.rpartition(".")[0]
    return _position(above, order) if above else -1


def bridge_target(data: Mapping[str, Any], sources: Mapping[str, str]) -> Reading:
    """`peft._target_`, as Megatron-Bridge writes an adapter's class into YAML, as our `peft.type`.

    megatron.bridge.peft.canonical_lora.CanonicalLoRA is canonical_lora: module and class have the method's name.
    """
    peft = data.get("peft")
    if not isinstance(peft, Mapping) or "_target_" not in peft:
        return Reading()
    key, target = "peft._target_", peft["_target_"]
    package, _, rest = str(target).partition(".peft.")
    method, _, cls = rest.partition(".")
    if package == "megatron.bridge" and method in names() and cls.lower() == method.replace("_", ""):
        return Reading([Claim("peft.type", method, key)], taken=[key])
    hint = suggest(method or str(target).rpartition(".")[2].lower(), names()) or "Choose a method with peft.type."
    what = f"{show(target, key)} is no adapter method that is known here"
    problem = Problem(key, what, source=source_of(key, sources), allowed=f"peft.type {', '.join(names())}", hint=hint)
    return Reading(problems=[problem], taken=[key])
