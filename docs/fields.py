"""Directives that describe a recipe, a placement or a record by its own JSON schema.

So a page cannot forget a field, and a new field needs no page.
"""

from collections.abc import Iterator
from typing import Any

from docutils.nodes import Node
from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

from samestep import Placement, Recipe
from samestep.output.schema import Epoch, Evaluation, Result, Step


MODELS: dict[str, type[BaseModel]] = {"recipe": Recipe, "placement": Placement}
RECORDS: dict[str, type[BaseModel]] = {
    "result": Result,
    "epoch": Epoch,
    "evaluation": Evaluation,
    "step": Step,
}
BOUNDS = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
}
LARGEST = 2**32
"""A bound beyond it is that of a type and not worth a word."""
Schema = dict[str, Any]


class Fields(SphinxDirective):
    """The fields of MODELS[argument]; headings begin at the second level."""

    required_arguments = 1

    def run(self) -> list[Node]:
        """Return the nodes of Markdown, parsed as part of the page."""
        lines = described(MODELS[self.arguments[0]].model_json_schema())
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


class Records(SphinxDirective):
    """A table of the fields of the record that its argument names in RECORDS."""

    required_arguments = 1

    def run(self) -> list[Node]:
        """Return the nodes of the table."""
        lines = record_table(RECORDS[self.arguments[0]])
        return self.parse_text_to_nodes("\n".join(lines))


def record_table(record: type[BaseModel]) -> Iterator[str]:
    """Yield lines of Markdown, one for each field; inherited fields come last."""
    fields = record.model_json_schema()["properties"]
    yield "| field | value | meaning |\n|---|---|---|"
    for name in sorted(fields, key=lambda name: name not in record.__annotations__):
        value = (
            _value(fields[name])
            .replace("a section", "records")
            .replace("table", "object")
        )
        meaning = " ".join(fields[name]["description"].split())
        yield f"| `{name}` | {value} | {meaning} |"


def described(schema: Schema) -> Iterator[str]:
    """Yield lines of Markdown: the plain fields, then each section by its kinds."""
    definitions = schema.get("$defs", {})
    fields = schema["properties"]
    sections = {name: _kinds(field, definitions) for name, field in fields.items()}
    plain = {name: fields[name] for name, kinds in sections.items() if not kinds}
    yield "## Fields\n"
    yield from _table(plain, schema.get("required", []))
    for name, kinds in sections.items():
        yield from _section(name, kinds, definitions)


def _section(
    name: str, kinds: list[Schema], definitions: dict[str, Schema]
) -> Iterator[str]:
    """Yield every kind of a section, then the sections inside it."""
    inside: dict[str, Schema] = {}
    for index, kind in enumerate(kinds):
        fields = dict(kind["properties"])
        tag = next((tag for tag in fields if "const" in fields[tag]), None)
        if index == 0:
            yield f"## `{name}`\n"
        if tag:
            yield f'### `{name}.{tag} = "{fields.pop(tag)["const"]}"`\n'
        yield f"{kind['description']}\n"
        yield from _table(fields, kind.get("required", []))
        for field, schema in fields.items():
            inside |= {f"{name}.{field}": k for k in _kinds(schema, definitions)}
    for path, kind in inside.items():
        yield f"### `{path}`\n\n{kind['description']}\n"
        yield from _table(kind["properties"], kind.get("required", []))


def _kinds(field: Schema, definitions: dict[str, Schema]) -> list[Schema]:
    """Return the kinds of section that a field can have; none for a plain value."""
    options = field.get("oneOf") or field.get("anyOf") or [field]
    references = [option.get("items", option).get("$ref") for option in options]
    names = [reference.rpartition("/")[2] for reference in references if reference]
    return [definitions[name] for name in names if "properties" in definitions[name]]


def _table(fields: dict[str, Schema], required: list[str]) -> Iterator[str]:
    if fields:
        yield "| field | value | default | meaning |\n|---|---|---|---|"
    for name in sorted(fields, key=lambda name: name not in required):
        field = fields[name]
        default = "*required*" if name in required else _literal(field.get("default"))
        meaning = " ".join(field.get("description", "").split())
        yield f"| `{name}` | {_value(field)} | {default} | {meaning} |"
    yield ""


def _literal(value: Any) -> str:
    """Return the default as in TOML; nothing if a field without a value is omitted."""
    if value is None:
        return ""
    if isinstance(value, dict) and value:
        return f"`{next(iter(value.values()))}`"
    words = {True: "true", False: "false"}
    return f"`{words[value] if isinstance(value, bool) else value}`".replace("'", '"')


def _value(schema: Schema) -> str:
    """Describe the values of a field in a few words."""
    options = schema.get("oneOf") or schema.get("anyOf")
    if options:
        given = [_value(option) for option in options if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(given))
    if "$ref" in schema:
        return "a section"
    if "const" in schema or "enum" in schema:
        known = schema.get("enum", [schema.get("const")])
        return ", ".join(map(_literal, known))
    if schema["type"] == "array":
        parts = schema.get("prefixItems")
        if parts:
            return f"list of {len(parts)}: {_value(parts[0])}"
        return f"list of {_value(schema['items'])}"
    kind = str(schema["type"]).replace("object", "table")
    bounds = [
        f" {sign} {schema[bound]:g}"
        for bound, sign in BOUNDS.items()
        if bound in schema and schema[bound] < LARGEST
    ]
    return kind + ",".join(bounds)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the directives; Sphinx calls this."""
    app.add_directive("fields", Fields)
    app.add_directive("records", Records)
    return {"parallel_read_safe": True}
