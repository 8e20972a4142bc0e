"""The contract of services, tested with every registered one and with some that exist only for tests.

A service needs a model that can be built without a download, or one in `tests/extensions.py`; then it is tested without
a change here.
"""

import json
import math
import struct

import pytest

from provider_image.backends import Device
from provider_image.compiler import can_build_now, ensure_installed
from provider_image.errors import BadInput, InvalidParams, MalformedChunk, MalformedResults
from provider_image.images.resizing import resize
from provider_image.models.catalogue import CATALOGUE
from provider_image.precision import TOLERANCE
from provider_image.service import Output, are_inputs, check_files, check_params, describe_inputs, primary_input
from provider_image.services import REGISTRY, load_service
from tests.extensions import TEST_SERVICES, install_extension_models, sample_inputs
from tests.linear_models import LINEAR_PAIRS, RENT_ROW, install_linear_models
from tests.style_models import QUICK_PARAMS
from tests.trained_models import RATINGS

NAMES = sorted({*REGISTRY, *TEST_SERVICES})
PAIRS = [(row.service, row.name) for row in CATALOGUE.values() if can_build_now(row)]
PAIRS += [*TEST_SERVICES.items(), ("regression", RATINGS), *LINEAR_PAIRS]
#: Service -> parameters with which it is fast.
FAST_PARAMS = {"style_transfer": QUICK_PARAMS}
#: Parameters that change an answer only on a slow machine.
LIMITS = {("style_transfer", "seconds")}


@pytest.fixture(scope="module", autouse=True)
def registered(registered_extensions):
    """The services and backends of the tests, beside those of the project."""


@pytest.fixture(scope="module", params=NAMES)
def service(request):
    return load_service(request.param)


class Answered:
    """A service, an artefact, and the output for some inputs."""

    def __init__(self, name, model, models, photos):
        self.service = load_service(name)
        self.artefact = ensure_installed(models, model)
        self.net = self.service.load(self.artefact, Device(threads=1))
        self.inputs = sample_inputs(self.service, photos)
        if model == "rent":
            self.inputs = {"row": json.dumps(RENT_ROW).encode()}
        self.params = check_params(self.service.params, FAST_PARAMS.get(name, {}))
        self.output = self.run()

    def prepare(self, inputs=None, params=None, **more):
        return self.service.prepare(self.artefact, inputs or self.inputs, params or self.params, **more)

    def run(self, *, params=None, **more):
        params = params or self.params
        return self.service.run(self.net, [self.prepare(params=params, **more)], [params])[0]

    def check(self, output):
        """Check an output as a batcher does."""
        check_files(self.service.outputs, output.files)
        self.service.check_output(self.artefact, self.params, output)


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: "-".join(pair))
def answered(request, photos, tmp_path_factory):
    name, model = request.param
    if name in TEST_SERVICES:
        models = install_extension_models(tmp_path_factory.mktemp("models"))
    elif model in CATALOGUE and CATALOGUE[model].source == "method":
        models = tmp_path_factory.mktemp("models")
    elif (name, model) in LINEAR_PAIRS:
        models = install_linear_models(tmp_path_factory.mktemp("models"))
    else:
        is_trained = model not in CATALOGUE
        models = request.getfixturevalue("trained_models_folder" if is_trained else "embedding_models_folder")
    return Answered(name, model, models, photos)


def test_every_service_has_a_model_to_be_tested_with():
    assert {name for name, _ in PAIRS} == set(NAMES)


def test_every_model_belongs_to_a_service():
    assert {row.service for row in CATALOGUE.values()} <= set(REGISTRY)


def test_service_describes_itself(service):
    assert service.name in REGISTRY
    assert service.title
    assert service.help.endswith(".")
    assert json.loads(json.dumps(service.output_schema))["type"]
    assert json.dumps(service.example)


def test_inputs_and_outputs_are_described(service):
    assert not service.inputs[primary_input(service)].is_optional
    for one in service.inputs.values():
        assert one.kind in ("image", "row", "text", "file") and one.help.endswith(".")
        assert one.media_types and one.max_bytes > 0
    for one in service.outputs.values():
        assert one.help.endswith(".") and one.max_bytes > 0 and "/" in one.media_type
    assert primary_input(service) in describe_inputs(service.inputs)
    assert are_inputs(service, service.inputs)
    assert not are_inputs(service, []) and not are_inputs(service, [*service.inputs, "another"])


def test_error_for_an_unknown_service_names_the_known_ones(service):
    with pytest.raises(MalformedChunk, match=service.name):
        load_service("no_such_service")


def test_params_have_help_and_defaults_within_their_range(service):
    for param in service.params:
        assert param.help.endswith(".")
        assert param.check(param.default) == param.default
        assert param.check(str(param.default)) == param.default
    assert check_params(service.params, {}) == {param.name: param.default for param in service.params}


def test_a_service_that_ends_by_a_time_limit_says_whether_the_time_was_enough(service):
    if any(param.is_time_limit for param in service.params):
        assert "complete" in service.output_schema["required"]


def test_error_for_an_unknown_param_names_the_known_ones(service):
    with pytest.raises(InvalidParams) as caught:
        check_params(service.params, {"no_such_param": 1})

    assert all(param.name in caught.value.reason for param in service.params)


@pytest.mark.parametrize(
    "value", [None, True, [], {}, "", "x", "nan", float("nan"), 1e300, -1e300, 10**400, "9" * 5000]
)
def test_invalid_value_is_refused(service, value):
    for param in service.params:
        with pytest.raises(InvalidParams, match=param.name):
            check_params(service.params, {param.name: value})


def test_service_without_params_takes_none():
    assert check_params((), {}) == {}
    with pytest.raises(InvalidParams, match="none"):
        check_params((), {"top": 1})


def test_output_is_json_and_files_and_passes_its_own_check(answered):
    output = answered.output

    assert json.loads(json.dumps(output.data, allow_nan=False)) == output.data
    answered.check(copied(output))


def test_output_fits_its_schema(answered):
    assert fits(answered.output.data, answered.service.output_schema)
    assert fits(json.loads(json.dumps(answered.service.example)), answered.service.output_schema)


def fits(value, schema) -> bool:
    """Check against the part of JSON Schema that services use."""
    if isinstance(schema["type"], list):  # the words for lists and for objects do not touch each other
        return any(fits(value, {**schema, "type": one}) for one in schema["type"])
    kinds = {
        "array": list,
        "object": dict,
        "string": str,
        "number": (int, float),
        "integer": int,
        "boolean": bool,
        "null": type(None),
    }
    kind = kinds[schema["type"]]
    if not isinstance(value, kind):
        return False
    if schema["type"] in ("number", "integer"):
        return schema.get("minimum", value) <= value <= schema.get("maximum", value)
    if schema["type"] == "array":
        parts = schema.get("prefixItems", [])
        return (
            schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
            and all(fits(each, part) for each, part in zip(value, parts, strict=False))
            and ("items" not in schema or all(fits(each, schema["items"]) for each in value))
        )
    if schema["type"] == "object":
        required = schema.get("required", ())
        return all(name in value for name in required) and all(
            fits(value[name], part) for name, part in schema["properties"].items() if name in value
        )
    return True


def test_same_item_gives_the_same_output(answered):
    assert answered.run() == answered.output


def test_batch_gives_the_outputs_of_its_items_in_their_order(answered):
    count = answered.net.batch_items
    items = [answered.prepare() for _ in range(count)]

    outputs = answered.service.run(answered.net, items, [answered.params] * count)

    assert len(outputs) == count
    differences = [answered.service.compare(answered.output, output, TOLERANCE) for output in outputs]
    assert all(found.largest <= TOLERANCE and found.is_same_order for found in differences)


def test_params_that_are_not_read_time_may_change_the_output(answered):
    service = answered.service
    for param in (each for each in service.params if not each.is_read_time):
        if (service.name, param.name) in LIMITS:
            continue
        values = param.choices or (param.minimum, param.maximum)
        other = next(value for value in values if value != answered.params[param.name])
        try:
            changed = answered.run(params={**answered.params, param.name: param.check(other)})
        except BadInput:
            continue  # it does not fit this input

        assert changed != answered.output


def test_resized_image_gives_the_same_output_and_is_smaller(answered):
    artefact, inputs = answered.artefact, answered.inputs
    images = {name for name, one in answered.service.inputs.items() if one.kind == "image"}
    if not images or not artefact.height:
        pytest.skip("its images are not resized")
    size = (artefact.height, artefact.width, artefact.crop)

    resized = {name: resize(data, *size) if name in images else data for name, data in inputs.items()}

    assert sum(map(len, resized.values())) < sum(map(len, inputs.values()))
    assert answered.run(inputs=resized, is_resized=True) == answered.output
    with pytest.raises(BadInput, match="must be a WebP"):
        answered.prepare(is_resized=True)


UNUSABLE = [
    b"",
    b" \n",
    b"text",
    b"\xff\xd8\xff",
    b"GIF89a",
    b"\x89PNG\r\n\x1a\n",
    b"[]",
    b"{",
    b'{"another": 1}',
    b'{"a": []}',
]


@pytest.mark.parametrize("data", UNUSABLE)
def test_input_of_another_kind_is_bad_input(answered, data):
    for name, one in answered.service.inputs.items():
        if one.kind in ("image", "row") or (one.kind == "text" and not is_text(data)):
            with pytest.raises(BadInput):
                answered.prepare({**answered.inputs, name: data})


def is_text(data):
    try:
        return bool(data.decode().strip())
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("data", UNUSABLE)
def test_image_that_cannot_be_used_is_refused_with_the_same_message_before_it_is_sent(answered, data):
    artefact = answered.artefact
    for name, one in answered.service.inputs.items():
        if one.kind != "image" or not artefact.height:
            continue
        with pytest.raises(BadInput) as here:
            resize(data, artefact.height, artefact.width, artefact.crop)
        with pytest.raises(BadInput) as there:
            answered.prepare({**answered.inputs, name: data})

        assert (type(here.value), here.value.reason) == (type(there.value), there.value.reason)


def test_view_of_default_params_is_json_and_no_longer_than_the_output(answered):
    view = answered.service.view(answered.output.data, answered.params)

    assert len(json.dumps(view)) <= len(json.dumps(answered.output.data))
    assert fits(view, answered.service.output_schema)


@pytest.mark.parametrize("data", [None, True, 0, "", "x", [], {}, [[]], [None] * 20, {"a": 1}, [[1, 2, 3]] * 20])
def test_output_of_another_kind_is_refused(answered, data):
    with pytest.raises(MalformedResults):
        answered.check(Output(data=data, files=answered.output.files))


def test_output_with_other_files_is_refused(answered):
    output, outputs = answered.output, answered.service.outputs
    forged = [{**output.files, "another.bin": b"x"}]
    for name, data in output.files.items():
        forged.append({key: each for key, each in output.files.items() if key != name or outputs[name].is_optional})
        forged.append({**output.files, name: data + bytes(outputs[name].max_bytes)})
        if outputs[name].media_type != "application/octet-stream":
            forged.append({**output.files, name: b"\xffnot of this type"})

    for files in forged:
        if files != output.files:
            with pytest.raises(MalformedResults):
                answered.check(Output(data=output.data, files=files))


def test_equal_outputs_do_not_differ(answered):
    found = answered.service.compare(answered.output, copied(answered.output), 0.0)

    assert (found.largest, found.is_same_order) == (0.0, True)


def copied(output):
    """A copy as it comes out of a results file."""
    return Output(data=json.loads(json.dumps(output.data)), files=dict(output.files))


# Tables and texts


@pytest.fixture(scope="module")
def linear(tmp_path_factory, photos):
    models = install_linear_models(tmp_path_factory.mktemp("models"))
    return {model: Answered(service, model, models, photos) for service, model in LINEAR_PAIRS}


@pytest.mark.parametrize(
    ("row", "value"),
    [
        ({"area": 50, "city": "Bonn"}, 650),
        ({"area": "50.0", "city": " Bonn "}, 650),
        ({"area": 40, "city": None}, 400),
        ({"area": None, "city": "Köln"}, 550),
        ({"area": "", "city": "n/a"}, 350),
        ({"area": 42, "city": "Paris"}, 445),
    ],
)
def test_row_is_answered_with_the_number_that_its_columns_add_up_to(linear, row, value):
    found = linear["rent"].run(inputs={"row": json.dumps(row).encode()})

    assert found.data == {"value": value}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"area": "large", "city": "Bonn"}, "'area' takes a number or null, not 'large'"),
        ({"area": True, "city": "Bonn"}, "takes a number"),
        ({"area": "inf", "city": "Bonn"}, "takes a number"),
        ({"area": 10**400, "city": "Bonn"}, "takes a number"),
        ({"area": 1e300, "city": "Bonn"}, "too far"),
        ({"area": 50}, "Missing: city"),
        ({"area": 50, "city": "Bonn", "floor": 1}, "Unknown: floor"),
    ],
)
def test_row_that_does_not_fit_the_columns_is_bad_input(linear, row, words):
    with pytest.raises(BadInput, match=words):
        linear["rent"].prepare({"row": json.dumps(row).encode()})


def test_labels_of_a_row_are_those_of_the_nearest_species(linear):
    assert [label for label, _ in linear["iris_table"].output.data] == ["versicolor", "virginica", "setosa"]


@pytest.mark.parametrize(
    "forge",
    [
        lambda data: data.pop("words"),
        lambda data: data.update(more=1),
        lambda data: data.update(value=float("nan")),
        lambda data: data.update(value=True),
        lambda data: data.update(value="3"),
        lambda data: data.update(value=10**400),
        lambda data: data["words"].append(data["words"][0]),
        lambda data: data["words"].reverse(),
        lambda data: data["words"][0].__setitem__(0, "a word that the model does not know"),
        lambda data: data["words"][0].__setitem__(0, ["awful"]),
        lambda data: data["words"][0].__setitem__(1, float("inf")),
        lambda data: data["words"][0].append(1),
        lambda data: data["words"].extend([[word, 0.0] for word in "abcdefgh"]),
        lambda data: data.update(words={}),
    ],
)
def test_forged_answer_for_a_text_is_refused(linear, forge):
    forged = copied(linear["stars"].output)
    forge(forged.data)

    with pytest.raises(MalformedResults):
        linear["stars"].check(forged)


@pytest.mark.parametrize("model", ["mood", "stars"])
def test_words_add_up_to_the_answer_for_a_text(linear, model):
    data = linear[model].output.data

    added = sum(number for _, number in data["words"])
    # "not good" is in the text, and so is "good".
    assert {"wonderful", "not good", "good", "喜欢"} <= {word for word, _ in data["words"]}
    if model == "stars":
        assert data["value"] == pytest.approx(3 + added, abs=1e-6)
    else:
        (best, probability), _ = data["labels"]
        assert math.log(probability / (1 - probability)) == pytest.approx(added, abs=1e-4)
        assert best == "good"


def test_changed_words_of_an_answer_show(linear):
    answered = linear["mood"]
    other = copied(answered.output)
    other.data["words"][0][1] *= 1.01

    assert answered.service.compare(answered.output, other, TOLERANCE).largest == pytest.approx(0.01, rel=0.02)
    other.data["words"] = []
    assert answered.service.compare(answered.output, other, TOLERANCE).largest == 1.0


def test_text_without_a_known_word_is_answered_without_words(linear):
    assert linear["stars"].run(inputs={"text": b"Xyzzy!"}).data == {"value": 3.0, "words": []}


# Classification


@pytest.mark.parametrize(
    "forge",
    [
        lambda rows: rows.pop(),
        lambda rows: rows.append(rows[-1]),
        lambda rows: rows.reverse(),
        lambda rows: rows.__setitem__(1, rows[0]),
        lambda rows: rows[0].append(1),
        lambda rows: rows[0].__setitem__(0, "n00000000"),
        lambda rows: rows[0].__setitem__(1, "another label"),
        lambda rows: rows[0].__setitem__(2, 1.5),
        lambda rows: rows[-1].__setitem__(2, -0.1),
        lambda rows: rows[0].__setitem__(2, float("nan")),
        lambda rows: rows[0].__setitem__(2, True),
        lambda rows: rows[0].__setitem__(2, "0.5"),
        lambda rows: rows[0].__setitem__(0, ["n1"]),
        lambda rows: [row.__setitem__(2, 0.9) for row in rows],
    ],
)
def test_forged_classification_is_refused(classified, forge):
    forged = copied(classified.output)
    forge(forged.data)

    with pytest.raises(MalformedResults):
        classified.check(forged)


@pytest.fixture(scope="module")
def classified(models_folder, photos):
    return Answered("classification", "efficientnet_lite0", models_folder, photos)


@pytest.mark.parametrize(("top", "shown"), [(1, 1), (5, 5), ("20", 20), (7.0, 7)])
def test_top_cuts_the_view_of_a_classification(classified, top, shown):
    service, rows = classified.service, classified.output.data

    assert service.view(rows, check_params(service.params, {"top": top})) == rows[:shown]


@pytest.mark.parametrize("top", [0, 21, -1, "0", 2.5, "1e1x"])
def test_top_out_of_range_is_refused_with_its_range(top):
    with pytest.raises(InvalidParams, match="top takes a whole number from 1 to 20"):
        check_params(load_service("classification").params, {"top": top})


# Comparing two classifications


#: An output as a net of many classes may give it, with two near-ties among the five likeliest.
ROWS = [[f"n{i}", f"label {i}", p] for i, p in enumerate([0.4, 0.2, 0.10002, 0.1, 0.05, 0.04, *[0.001] * 14])]


def copied_rows(rows):
    return json.loads(json.dumps(rows))


def compare(one, other, tolerance=1e-4):
    """Compare two classifications; which of them is the expected one makes no difference to how far apart they are."""
    service = load_service("classification")
    found = service.compare(Output(data=one), Output(data=other), tolerance)

    assert service.compare(Output(data=other), Output(data=one), tolerance).largest == found.largest
    return found


def test_changed_probability_shows_and_leaves_the_order():
    other = copied_rows(ROWS)
    other[0][2] -= 0.03

    found = compare(ROWS, other)

    assert found.largest == pytest.approx(0.03)
    assert found.is_same_order


def test_near_ties_may_swap_within_the_tolerance():
    other = copied_rows(ROWS)
    other[2], other[3] = [*ROWS[3][:2], 0.10001], [*ROWS[2][:2], 0.10001]

    assert compare(ROWS, other).is_same_order
    assert compare(ROWS, other).largest == pytest.approx(1e-5)
    assert not compare(ROWS, other, tolerance=1e-6).is_same_order


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 2), (3, 4)])
def test_changed_order_of_the_five_likeliest_shows(first, second):
    other = copied_rows(ROWS)
    other[first][:2], other[second][:2] = ROWS[second][:2], ROWS[first][:2]

    found = compare(ROWS, other)

    assert not found.is_same_order
    assert found.largest == pytest.approx(ROWS[first][2] - ROWS[second][2])


def test_order_after_the_fifth_is_not_looked_at():
    other = copied_rows(ROWS)
    other[5][:2], other[6][:2] = ROWS[6][:2], ROWS[5][:2]

    assert compare(ROWS, other).is_same_order


def test_label_that_one_side_leaves_out_counts_as_far_as_it_is_likely():
    other = copied_rows(ROWS)
    other[4][:2] = ["n99", "label 99"]

    found = compare(ROWS, other)

    # It is there at most as likely as the last that is named.
    assert found.largest == pytest.approx(0.05 - 0.001)
    assert not found.is_same_order


def test_label_at_the_end_may_be_another_one_as_unlikely():
    other = copied_rows(ROWS)
    other[-1][:2] = ["n99", "label 99"]

    found = compare(ROWS, other)

    assert (found.largest, found.is_same_order) == (0.0, True)


def test_outputs_of_a_net_with_few_classes_are_compared():
    few = [["", "cat", 0.7], ["", "dog", 0.3]]

    assert compare(few, copied_rows(few)).largest == 0.0
    assert compare(few, [["", "dog", 0.7], ["", "cat", 0.3]]).largest == pytest.approx(0.4)
    assert not compare(few, [["", "dog", 0.7], ["", "cat", 0.3]]).is_same_order


# Embeddings


@pytest.fixture(scope="module")
def embedded(embedding_models_folder, photos):
    return Answered("embedding", "efficientnet_lite0_embedding", embedding_models_folder, photos)


def vector_of(output):
    return struct.unpack(f"<{output.data['dimensions']}f", output.files["vector"])


def with_vector(output, values):
    return Output(data=output.data, files={"vector": struct.pack(f"<{len(values)}f", *values)})


def test_embedding_is_a_vector_of_unit_length(embedded):
    assert embedded.output.data == {"dimensions": 1280}
    assert math.hypot(*vector_of(embedded.output)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: [float("nan"), *values[1:]],
        lambda values: [float("inf"), *values[1:]],
        lambda values: [-float("inf"), float("nan"), *values[2:]],
        lambda values: [0.0] * len(values),
        lambda values: [3e38] * len(values),
        lambda values: [1.01 * value for value in values],
        lambda values: values[:-1],
        lambda values: [*values, 0.0],
        lambda values: [],
    ],
    ids=["nan", "inf", "both", "zero", "huge", "too long", "a value less", "a value more", "empty"],
)
def test_forged_vector_is_refused(embedded, change):
    with pytest.raises(MalformedResults, match="vector"):
        embedded.check(with_vector(embedded.output, change(vector_of(embedded.output))))


def test_vector_that_is_cut_within_a_value_is_refused(embedded):
    with pytest.raises(MalformedResults, match="1280 values"):
        embedded.check(Output(data=embedded.output.data, files={"vector": embedded.output.files["vector"][:-1]}))


@pytest.mark.parametrize("data", [{"dimensions": 1279}, {"dimensions": 1280.0}, {"dimensions": 1280, "more": 1}])
def test_forged_dimensions_are_refused(embedded, data):
    with pytest.raises(MalformedResults):
        embedded.check(Output(data=data, files=embedded.output.files))


def test_difference_of_two_vectors_is_the_length_of_their_difference(embedded):
    values = vector_of(embedded.output)
    opposite = with_vector(embedded.output, [-value for value in values])
    moved = with_vector(embedded.output, [values[0] + 0.003, values[1] - 0.004, *values[2:]])
    shorter = with_vector(embedded.output, values[:-1])
    compare = embedded.service.compare

    assert compare(embedded.output, opposite, 0.1).largest == pytest.approx(2, abs=1e-6)
    assert compare(embedded.output, moved, 0.1).largest == pytest.approx(0.005, abs=1e-7)
    assert compare(embedded.output, shorter, 0.1) == compare(Output(data=embedded.output.data), moved, 0.1)
    assert compare(embedded.output, shorter, 0.1).largest > 1


def test_similar_images_have_closer_vectors_than_other_ones(embedded, photos):
    cat, cup, rocket = (
        vector_of(embedded.service.run(embedded.net, [embedded.prepare({"image": photos[name]})], [{}])[0])
        for name in ("chelsea", "coffee", "rocket")
    )
    smaller = resize(photos["chelsea"], 200, 200, None)
    (found,) = embedded.service.run(embedded.net, [embedded.prepare({"image": smaller})], [{}])

    def similarity(one, other):
        return sum(a * b for a, b in zip(one, other, strict=True))

    assert similarity(cat, vector_of(found)) > 0.8
    assert max(similarity(cat, cup), similarity(cat, rocket), similarity(cup, rocket)) < 0.6


# Regression


@pytest.fixture(scope="module")
def rated(trained_models_folder, photos):
    return Answered("regression", RATINGS, trained_models_folder, photos)


def test_regression_is_one_number(rated):
    assert rated.output.data.keys() == {"value"}
    assert 3 <= rated.output.data["value"] <= 13


@pytest.mark.parametrize("value", [None, True, "3", [3], float("nan"), float("inf"), -float("inf"), 10**400, 1e300])
def test_forged_value_is_refused(rated, value):
    with pytest.raises(MalformedResults, match="finite number"):
        rated.check(Output(data={"value": value}))


def test_value_with_more_beside_it_is_refused(rated):
    with pytest.raises(MalformedResults, match="must have a value"):
        rated.check(Output(data={**rated.output.data, "more": 1}))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [(0.5, 0.25, 0.25), (-0.5, 0.5, 1.0), (1000, 1001, 0.001), (-4e6, -2e6, 0.5), (3, 3, 0)],
)
def test_difference_of_values_beyond_one_is_a_share(one, other, expected):
    found = load_service("regression").compare(Output(data={"value": one}), Output(data={"value": other}), 0.1)

    assert found.largest == pytest.approx(expected)
