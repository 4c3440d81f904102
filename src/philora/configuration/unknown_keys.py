"""Report keys that no section has, with the key that was probably meant."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from philora.configuration import schema
from philora.configuration.fields import OWN_TRAINING_KEYS
from philora.configuration.reader import Reader
from philora.configuration.sections import SECTIONS
from philora.errors import nearest


def likely_section(key: str, sections: Iterable[str]) -> str:
    """Return where an unknown key may belong: the section that has it, or the nearest name."""
    for section, names in section_keys().items():
        if key in names and section in sections:
            return f"It belongs in {section}: write {section}.{key}"
    return nearest(key, sections)


def section_keys() -> dict[str, set[str]]:
    """Return the keys of every section."""
    own = {section: {field.name for field in dataclasses.fields(kind)} for section, kind in SECTIONS.items()}
    return own | {
        "training_config": {*schema.training_fields(), *OWN_TRAINING_KEYS},
        "peft_config": set(schema.lora_fields()),
    }


def refuse_unknown(section: str, key: Any, value: Any, names: Iterable[str], reader: Reader) -> None:
    """Record the fault of an unknown key, with the nearest known one."""
    names = list(names)
    todo = nearest(str(key), names)
    if not todo:
        others = [word for word in section_keys() if word != section]
        todo = likely_section(str(key), others) if any(key in section_keys()[other] for other in others) else ""
    library = {"training_config": "trl.SFTConfig", "peft_config": "peft.LoraConfig"}.get(section)
    expected = f"a key of {library}" if library else "one of " + ", ".join(names)
    reader.fault((*section.split("."), str(key)), value, expected, todo)
