"""A pipeline: steps, each a model, whose inputs and parameters may be what other steps have answered.

Written as TOML, see docs/pipelines.md. The server checks it when a request is sent, and stores it with the request, so
that a file that is changed later changes nothing for those that are on their way. The batcher reads values by its
references. Must not know how requests are stored.

A step may run once for each item of a list in the answer of another one. A step that refers to such a step runs for the
same items. Lists in lists, and pipelines in pipelines, are not possible.
"""

from __future__ import annotations

import json
import operator
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from provider_image.errors import InvalidParams, MlgError
from provider_image.models.artefact import Artefact
from provider_image.models.catalogue import ModelFacts
from provider_image.models.registry import find_row, list_rows
from provider_image.service import Input, Service
from provider_image.services import load_service
from store.collections.collections import is_collection_name

#: What the column `service` of a request to a pipeline has; no service has this name.
PIPELINE = "pipeline"
#: The value of a step's `models` that stands for all models of one's own that take faces.
FACES = "faces"
#: Most steps of a pipeline, and most items of a list for which a step runs: their product bounds a request's steps.
MAX_STEPS = 16
MAX_ITEMS = 64
#: Most bytes of a file.
MAX_FILE_BYTES = 32_768
#: Where references begin that do not name a step: the inputs of the request, and the item of the list.
REQUEST, EACH = "request", "each"

_STEP_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_REFERENCE = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_-]+)+")
_CONDITION = re.compile(rf"\s*({_REFERENCE.pattern})\s*(==|!=|<=|>=|<|>|\bnot\s+in\b|\bin\b)\s*(.+?)\s*", re.DOTALL)
_KEYS = ("model", "for_each", "when", "params", "collection")

_OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda value, values: value in values,
    "not in": lambda value, values: value not in values,
}


class InvalidPipeline(MlgError):
    """The pipeline cannot be used. Correct its file."""

    permanent = True


class MissingValue(MlgError):
    """An answer lacks what a later step needs."""

    permanent = True


@dataclass(frozen=True, kw_only=True)
class PipelineStep:
    """One step of a pipeline."""

    name: str
    #: Canonical name, and the service that runs it.
    model: str
    service: str
    #: Name of each input -> a reference.
    inputs: Mapping[str, str]
    #: Name of each parameter that is read from an answer -> a reference.
    references: Mapping[str, str] = field(default_factory=dict)
    #: Parameters that are written in the file.
    params: Mapping[str, Any] = field(default_factory=dict)
    #: The list for whose items it runs, also where another step says so; None if it runs once.
    for_each: str | None = None
    #: All must be true, or it is skipped.
    when: tuple[str, ...] = ()
    #: Name of the collection of which its image becomes a member.
    collection: str | None = None
    #: True if its model is for images of faces.
    takes_faces: bool = False

    def read(self) -> Iterator[str]:
        """List the references of the step."""
        yield from self.inputs.values()
        yield from self.references.values()
        yield from (parse_condition(one).reference for one in self.when)
        if self.for_each is not None:
            yield self.for_each

    def needed(self) -> set[str]:
        """Return the names of the steps that it needs."""
        return {source_of(one) for one in self.read()} - {REQUEST, EACH}


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A checked pipeline."""

    name: str
    title: str
    #: In an order in which each comes after those that it needs.
    steps: tuple[PipelineStep, ...]

    def to_text(self) -> str:
        """Format it as it is stored with requests."""
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Pipeline:
        """Parse what `to_text` formatted."""
        stored = json.loads(text)
        steps = tuple(PipelineStep(**{**step, "when": tuple(step["when"])}) for step in stored["steps"])
        return cls(name=stored["name"], title=stored["title"], steps=steps)

    def inputs(self) -> dict[str, Input]:
        """Return the inputs of a request, by name: those that steps take from it.

        :raises InvalidPipeline: there is none, or two steps take the same as different kinds.
        """
        found: dict[str, Input] = {}
        for step in self.steps:
            for name, reference in step.inputs.items():
                if source_of(reference) == REQUEST:
                    given, one = path_of(reference)[0], load_service(step.service).inputs[name]
                    first = found.setdefault(given, one)
                    if first.kind != one.kind:
                        raise InvalidPipeline(f"{reference} cannot be both: {first.kind} and {one.kind}.")
                    found[given] = first if first.max_bytes <= one.max_bytes else one
        if all(one.is_optional for one in found.values()):
            raise InvalidPipeline("No step takes an input of the request, for example: image = 'request.image'")
        # The first input of a service is not optional.
        return dict(sorted(found.items(), key=lambda item: item[1].is_optional))

    @property
    def takes_image(self) -> bool:
        """Tell whether a request may consist of one image."""
        return [one.kind for one in self.inputs().values() if not one.is_optional] == ["image"]

    @property
    def takes_faces(self) -> bool:
        """Tell whether a model of it is for images of faces."""
        return any(step.takes_faces for step in self.steps)


@dataclass(frozen=True, kw_only=True)
class PipelineService:
    """What intake needs to know of a pipeline: the part of a `Service` that is about requests."""

    inputs: Mapping[str, Input]
    name: str = PIPELINE
    params: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One comparison."""

    reference: str
    operator: str
    value: Any

    def is_true(self, found: Any) -> bool:
        """Compare a value. :raises MissingValue: it is of another kind."""
        try:
            return bool(_OPERATORS[self.operator](found, self.value))
        except TypeError as error:
            raise MissingValue(
                f"{self.reference} is {_short(found)}, which cannot be compared by {self.operator}."
            ) from error


# References


def source_of(reference: str) -> str:
    """Return the step that a reference names, REQUEST or EACH."""
    return reference.partition(".")[0]


def path_of(reference: str) -> tuple[str, ...]:
    """Return what follows the source, piece by piece."""
    return tuple(reference.split(".")[1:])


def file_of(reference: str, service: Service) -> str | None:
    """Return the output file of a step's service that a reference names; None if it names a value."""
    name = reference.partition(".")[2]
    return name if name in service.outputs else None


def look_up(value: Any, reference: str) -> Any:
    """Return the value that a reference names in an answer, or in an item. :raises MissingValue: there is none."""
    for key in path_of(reference):
        value = _labels(value)
        try:
            value = value[int(key) if isinstance(value, list) else key]
        except (LookupError, TypeError, ValueError) as error:
            raise MissingValue(f"The answer has no {reference}.") from error
    return value


def _labels(value: Any) -> Any:
    """Give an answer that is a list of labels a name for the first: `class` and `score`."""
    if isinstance(value, list) and value and isinstance(value[0], list) and len(value[0]) >= 2:
        return {**{str(place): one for place, one in enumerate(value)}, "class": value[0][-2], "score": value[0][-1]}
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


# Conditions


def parse_condition(text: str) -> Condition:
    """Parse a condition, for example `each.score >= 0.6`. :raises InvalidPipeline:"""
    found = _CONDITION.fullmatch(text)
    if found is None:
        raise InvalidPipeline(
            f"{text[:80]!r} is no condition. Write for example: each.score >= 0.6, or: classify.class in ['tabby']"
        )
    reference, comparison, literal = found[1], " ".join(found[2].split()), found[3]
    try:
        parsed = tomllib.loads(f"value = {literal}")
    except tomllib.TOMLDecodeError as error:
        raise InvalidPipeline(f"{literal[:80]} is no number, no text in quotes and no list of such.") from error
    value = parsed.get("value")
    values = value if isinstance(value, list) else [value]
    if parsed.keys() != {"value"} or not all(isinstance(one, str | int | float) for one in values):
        raise InvalidPipeline(f"{literal[:80]} is no number, no text in quotes and no list of such.")
    if comparison.endswith("in") != isinstance(value, list):
        what = "a list" if comparison.endswith("in") else "one value"
        raise InvalidPipeline(f"{comparison} needs {what}: {text[:80]}")
    return Condition(reference=reference, operator=comparison, value=value)


# Parsing


def parse_pipeline(name: str, text: str, models: Path) -> Pipeline:
    """Parse and check a pipeline.

    :param text: TOML.
    :param models: the models folder, for the operator's own models.
    :raises InvalidPipeline: names the step and what to correct.
    """
    if len(text.encode()) > MAX_FILE_BYTES:
        raise InvalidPipeline(f"The file has more than {MAX_FILE_BYTES} bytes.")
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidPipeline(f"The file is no TOML: {error}") from error
    _check_keys(document, ("title", "steps"), "The file")
    title, tables = document.get("title", name), document.get("steps")
    if not isinstance(title, str) or len(title) > 200:
        raise InvalidPipeline("title must be a text of at most 200 characters.")
    tables = _with_own_models(tables, models)
    if not isinstance(tables, dict) or not 1 <= len(tables) <= MAX_STEPS:
        raise InvalidPipeline(f"The file needs 1 to {MAX_STEPS} steps: [steps.NAME]")
    steps = {}
    for step_name, table in tables.items():
        try:
            steps[step_name] = _parse_step(step_name, table, tables.keys(), models)
        except MlgError as error:
            raise InvalidPipeline(f"Step {step_name[:32]}: {error.reason}") from error
    ordered = _in_order(steps)
    finished: dict[str, PipelineStep] = {}
    for one in ordered:
        try:
            finished[one.name] = _with_list(one, finished)
            _check_references(finished[one.name], finished)
        except MlgError as error:
            raise InvalidPipeline(f"Step {one.name}: {error.reason}") from error
    pipeline = Pipeline(name=name, title=title, steps=tuple(finished.values()))
    pipeline.inputs()
    return pipeline


def _with_own_models(tables: Any, models: Path) -> Any:
    """Put steps in the place of each that has `models = "faces"`: one for each installed model that takes faces.

    What is built in is named in steps of its own. Models that clients have trained are left out, and those for which
    there is no room.

    :raises InvalidPipeline: `models` has another value.
    """
    if not isinstance(tables, dict):
        return tables
    found: dict[str, Any] = {}
    for name, table in tables.items():
        if not isinstance(table, dict) or "models" not in table:
            found[name] = table
            continue
        if table["models"] != FACES or "model" in table:
            raise InvalidPipeline(f"Step {name[:32]}: models can only be {FACES!r}, without model.")
        rest = {key: value for key, value in table.items() if key != "models"}
        own = [row for row in list_rows(models) if _answers_about_faces(row)]
        for row in own[: MAX_STEPS - len(tables) + 1]:
            is_free = _STEP_NAME.fullmatch(row.name) and row.name not in (REQUEST, EACH, *tables, *found)
            found[row.name if is_free else f"{name}_{len(found)}"] = {**rest, "model": row.name}
    return found


def _answers_about_faces(row: ModelFacts) -> bool:
    is_trained = isinstance(row, Artefact) and row.provenance is not None
    return row.takes_faces and row.source == "own" and row.service != "face_detection" and not is_trained


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], what: str) -> None:
    for key in table:
        if key not in known:
            raise InvalidPipeline(f"{what} has the unknown field {key[:64]!r}. Known are: {', '.join(known)}.")


def _parse_step(name: str, table: Any, names: Any, models: Path) -> PipelineStep:
    if not _STEP_NAME.fullmatch(name) or name in (REQUEST, EACH):
        raise InvalidPipeline(
            f"A step's name has up to 32 lower-case letters, digits and underscores, and is not {REQUEST} or {EACH}."
        )
    if not isinstance(table, dict) or not isinstance(table.get("model"), str):
        raise InvalidPipeline("A step needs a model, for example: model = 'efficientnet_lite0'")
    row = find_row(models, table["model"])
    service = load_service(row.service)
    _check_keys(table, (*_KEYS, *service.inputs), "It")

    def check(reference: Any) -> str:
        return _check_reference(reference, names)

    inputs = {}
    for input_name, one in service.inputs.items():
        if input_name in table:
            inputs[input_name] = check(table[input_name])
        elif not one.is_optional:
            inputs[input_name] = f"{REQUEST}.{input_name}"
    when = table.get("when", [])
    conditions = [when] if isinstance(when, str) else when
    if not isinstance(conditions, list) or not all(isinstance(one, str) for one in conditions):
        raise InvalidPipeline("when must be a condition, or a list of conditions.")
    for one in conditions:
        check(parse_condition(one).reference)
    params, references = _parse_params(service, table.get("params", {}), check)
    collection = table.get("collection")
    if collection is not None:
        if row.service != "embedding":
            raise InvalidPipeline(f"collection needs a model that computes embeddings; {row.name} does not.")
        if not isinstance(collection, str) or not is_collection_name(collection):
            raise InvalidPipeline("collection must be the name of a collection.")
    return PipelineStep(
        name=name,
        model=row.name,
        service=row.service,
        inputs=inputs,
        references=references,
        params=params,
        for_each=check(table["for_each"]) if "for_each" in table else None,
        when=tuple(conditions),
        collection=collection,
        takes_faces=row.takes_faces,
    )


def _check_reference(reference: Any, names: Any) -> str:
    if not isinstance(reference, str) or not _REFERENCE.fullmatch(reference):
        raise InvalidPipeline(f"{reference!r:.80} is no reference. Write for example: request.image, or STEP.FIELD")
    if source_of(reference) not in (REQUEST, EACH, *names):
        raise InvalidPipeline(
            f"{reference[:80]} names no step. Steps are: {', '.join(names)}; others: {REQUEST}, {EACH}."
        )
    return reference


def _parse_params(service: Service, table: Any, check: Callable[[Any], str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Divide the parameters into those with a value and those with a reference."""
    if not isinstance(table, dict):
        raise InvalidPipeline("params must be a table: params = { left = 'each.box.left' }")
    known = {param.name: param for param in service.params if not param.is_read_time}
    values: dict[str, Any] = {}
    references: dict[str, str] = {}
    for name, raw in table.items():
        if name not in known:
            names = ", ".join(known) or "none"
            raise InvalidParams(f"There is no parameter {name[:64]!r}. Parameters: {names}.")
        if isinstance(raw, str) and raw not in known[name].choices:
            references[name] = check(raw)
        else:
            values[name] = known[name].check(raw)
    return values, references


def _in_order(steps: Mapping[str, PipelineStep]) -> list[PipelineStep]:
    """Sort steps so that each comes after those that it needs. :raises InvalidPipeline: there is a cycle."""
    ordered: dict[str, PipelineStep] = {}
    while len(ordered) < len(steps):
        ready = [one for name, one in steps.items() if name not in ordered and one.needed() <= ordered.keys()]
        if not ready:
            waiting = [name for name in steps if name not in ordered]
            raise InvalidPipeline(f"These steps need each other, so none can begin: {', '.join(waiting)}.")
        ordered.update((one.name, one) for one in ready)
    return list(ordered.values())


def _with_list(step: PipelineStep, earlier: Mapping[str, PipelineStep]) -> PipelineStep:
    """Let a step that refers to steps for the items of a list run for the same items."""
    lists = {earlier[name].for_each for name in step.needed()} - {None}
    if step.for_each is not None:
        if earlier.get(source_of(step.for_each)) is None:
            raise InvalidPipeline(f"for_each needs a list in the answer of a step, not {step.for_each}.")
        if earlier[source_of(step.for_each)].for_each is not None:
            raise InvalidPipeline("for_each in the answer of a step that itself runs for each item is not possible.")
        lists.add(step.for_each)
    if len(lists) > 1:
        raise InvalidPipeline(f"It refers to the items of different lists: {', '.join(sorted(map(str, lists)))}.")
    for_each = next(iter(lists), None)
    if for_each is None and any(source_of(one) == EACH for one in step.read()):
        raise InvalidPipeline(f"{EACH} needs for_each, or a reference to a step that has it.")
    return PipelineStep(**{**vars(step), "for_each": for_each})


def _check_references(step: PipelineStep, steps: Mapping[str, PipelineStep]) -> None:
    """Check that what a step refers to can be there, and is of the kind that it takes."""
    service = load_service(step.service)
    for name, reference in step.inputs.items():
        _check_input(name, service.inputs[name], reference, step, steps)
    values = [*step.references.values(), *(parse_condition(one).reference for one in step.when)]
    for reference in values:
        if source_of(reference) == REQUEST:
            raise InvalidPipeline(f"{reference} is an input. Parameters and conditions need a value of an answer.")
        _schema_of(reference, step, steps)
    if step.for_each is not None:
        schema = _schema_of(step.for_each, step, steps)
        if "array" not in _types(schema, "array"):
            raise InvalidPipeline(f"for_each needs a list; {step.for_each} is none.")


def _check_input(name: str, one: Input, reference: str, step: PipelineStep, steps: Mapping[str, PipelineStep]) -> None:
    source = source_of(reference)
    if source == REQUEST:
        if len(path_of(reference)) != 1:
            raise InvalidPipeline(f"{reference} is no input. Write: {REQUEST}.NAME")
        return
    if source in steps:
        made_by = load_service(steps[source].service)
        file = file_of(reference, made_by)
        if file is not None:
            if steps[source].takes_faces and not step.takes_faces:
                raise InvalidPipeline(f"{reference} is of faces, and the model {step.model} is not for them.")
            media_type = made_by.outputs[file].media_type
            if _kind_of(media_type) != one.kind and one.kind != "file":
                raise InvalidPipeline(f"The input {name} takes: {one.kind}. {reference} is {media_type}.")
            return
        if one.kind in ("image", "file"):
            names = ", ".join(f"{source}.{output}" for output in made_by.outputs) or "none"
            raise InvalidPipeline(f"{reference} is no file that step {source} returns. Files: {names}.")
    elif one.kind in ("image", "file"):
        raise InvalidPipeline(f"The input {name} takes a file; {reference} is none.")
    _schema_of(reference, step, steps)


def _kind_of(media_type: str) -> str:
    kinds = {"application/json": "row", "text/plain": "text"}
    return "image" if media_type.startswith("image/") else kinds.get(media_type, "file")


def _schema_of(reference: str, step: PipelineStep, steps: Mapping[str, PipelineStep]) -> Any:
    """Return the schema of a value, {} where that is not described. :raises InvalidPipeline: there is no such field."""
    source, schema = source_of(reference), None
    if source == EACH:
        schema = _schema_of(str(step.for_each), step, steps).get("items", {})
    else:
        schema = load_service(steps[source].service).output_schema
    for key in path_of(reference):
        if not isinstance(schema, Mapping):
            return {}
        properties, types = schema.get("properties", {}), _types(schema, "object", "array")
        if "array" in types and (key.isdecimal() or key in ("class", "score")):
            schema = schema.get("items", {}) if key.isdecimal() else {}
        elif "object" not in types or (properties and key not in properties):
            names = ", ".join(properties) or "none"
            raise InvalidPipeline(
                f"{reference} is not in the answer of {source}: there is no {key!r}. Fields: {names}."
            )
        else:
            schema = properties.get(key, {})
    return schema if isinstance(schema, Mapping) else {}


def _types(schema: Mapping[str, Any], *unknown: str) -> tuple[str, ...]:
    """Return the types that a schema allows. :param unknown: if it does not say."""
    found = schema.get("type", unknown)
    return (found,) if isinstance(found, str) else tuple(found)
