"""Write a configuration: as YAML, as a table of origins, and the reference of all keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from philora.configuration import schema, yaml_text
from philora.configuration.fields import FIELDS, LIBRARY, Field, own_fields, rule_of
from philora.configuration.sections import REQUIRED, Config, SourceConfig

_SECRETS: Final = ("training_config.hub_token",)


def dump_yaml(config: Config) -> str:
    """Return the effective configuration as YAML that can be loaded again, without tokens of the hub."""
    return yaml_text.dump(without_secrets(config.to_dict()), sort_keys=False, allow_unicode=True, width=120)


def without_secrets(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return a configuration in the shape of the file, without tokens of the hub."""
    return {
        section: {name: value for name, value in values.items() if f"{section}.{name}" not in _SECRETS}
        for section, values in sections.items()
    }


def explain(config: Config) -> list[tuple[str, Any, str]]:
    """Return every key with its value and its origin, in the order of the file; tokens of the hub are hidden."""
    rows = []
    for section, values in config.to_dict().items():
        for name, value in values.items():
            key = f"{section}.{name}"
            shown = "***" if key in _SECRETS and value else value
            rows.append((key, shown, config.origins.get(key, "default")))
    return rows


def reference() -> str:
    """Return the keys that philora states a default or a bound for, as a Markdown table."""
    lines = ["| key | default | allowed | what it is |", "| --- | --- | --- | --- |"]
    rows = list(FIELDS.values())
    behind = next(place for place, row in enumerate(rows, 1) if row.key == "data.train")
    rows[behind:behind] = own_fields("data.train", SourceConfig)
    for row in rows:
        section, _, name = row.key.partition(".")
        rule = (rule_of(section, name) or row.rule) if section in ("training_config", "peft_config") else row.rule
        default = _shown_default(row, section, name)
        cells = (f"`{row.key}`", default, rule.text, row.doc)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += [
        "",
        "`training_config` takes every key of the installed `trl.SFTConfig` and `peft_config` every key of the "
        "installed `peft.LoraConfig`; those that are not in the table have the library's default and are checked "
        "against its annotations.",
    ]
    return "\n".join(lines) + "\n"


def _shown_default(field: Field, section: str, name: str) -> str:
    if field.default is REQUIRED:
        return "required"
    if field.default is not LIBRARY:
        return f"`{_one_line(field.default)}`"
    training = section == "training_config"
    value = (schema.training_fields() if training else schema.lora_fields())[name].default
    shown = "chosen at run time" if value is schema.UNKNOWN else f"`{_one_line(value)}`"
    return f"{'TRL' if training else 'PEFT'}'s: {shown}"


def _one_line(value: Any) -> str:
    return yaml_text.dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
