"""The contract of services, tested with every model that can be built without a download.

Services and models come from the registries, so a new one is tested without a change here.
"""

import json

import pytest

from provider_image.compiler import can_build_now, ensure_installed
from provider_image.errors import BadInput, InvalidParams, MalformedChunk, MalformedResults
from provider_image.models.catalogue import CATALOGUE
from provider_image.service import ModelInput, check_params
from provider_image.services import REGISTRY, load_service

PAIRS = [(row.service, row.name) for row in CATALOGUE.values() if can_build_now(row)]


@pytest.fixture(scope="module", params=sorted(REGISTRY))
def service(request):
    return load_service(request.param)


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: "-".join(pair))
def answered(request, models_folder, photos):
    """A service, an artefact, and the output for a photo."""
    name, model = request.param
    service, artefact = load_service(name), ensure_installed(models_folder, model)
    net = service.load(artefact, 1, "f32")
    inputs = dict.fromkeys(service.inputs, photos["coffee"])
    return service, artefact, net, service.run(net, service.prepare(artefact, inputs))


def test_every_service_has_a_model_to_be_tested_with():
    assert {name for name, _ in PAIRS} == set(REGISTRY)


def test_every_model_belongs_to_a_service():
    assert {row.service for row in CATALOGUE.values()} <= set(REGISTRY)


def test_service_describes_itself(service):
    assert service.name in REGISTRY
    assert service.title
    assert service.help.endswith(".")
    assert service.inputs and all(help.endswith(".") for help in service.inputs.values())
    assert json.loads(json.dumps(service.output_schema))["type"]
    assert json.dumps(service.example)


def test_error_for_an_unknown_service_names_the_known_ones(service):
    with pytest.raises(MalformedChunk, match=service.name):
        load_service("no_such_service")


def test_params_have_help_and_defaults_within_their_range(service):
    for param in service.params:
        assert param.help.endswith(".")
        assert param.check(param.default) == param.default
        assert param.check(str(param.default)) == param.default
    assert service.check_params({}) == {param.name: param.default for param in service.params}


def test_error_for_an_unknown_param_names_the_known_ones(service):
    with pytest.raises(InvalidParams) as caught:
        service.check_params({"no_such_param": 1})

    assert all(param.name in caught.value.reason for param in service.params)


@pytest.mark.parametrize(
    "value", [None, True, [], {}, "", "x", "nan", float("nan"), 1e300, -1e300, 10**400, "9" * 5000]
)
def test_invalid_value_is_refused(service, value):
    for param in service.params:
        with pytest.raises(InvalidParams, match=param.name):
            service.check_params({param.name: value})


def test_service_without_params_takes_none():
    assert check_params((), {}) == {}
    with pytest.raises(InvalidParams, match="none"):
        check_params((), {"top": 1})


def test_output_is_json_and_passes_its_own_check(answered):
    service, artefact, _, output = answered

    assert json.loads(json.dumps(output, allow_nan=False)) == output
    service.check_output(artefact, json.loads(json.dumps(output)))


def test_output_fits_its_schema(answered):
    service, _, _, output = answered

    assert fits(output, service.output_schema)
    assert fits(json.loads(json.dumps(service.example)), service.output_schema)


def fits(value, schema) -> bool:
    """Check against the part of JSON Schema that services use."""
    kind = {"array": list, "object": dict, "string": str, "number": (int, float)}[schema["type"]]
    if not isinstance(value, kind):
        return False
    if schema["type"] == "number":
        return schema.get("minimum", value) <= value <= schema.get("maximum", value)
    if schema["type"] == "array":
        parts = schema.get("prefixItems", [])
        return (
            schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
            and all(fits(each, part) for each, part in zip(value, parts, strict=False))
            and ("items" not in schema or all(fits(each, schema["items"]) for each in value))
        )
    return True


def test_same_item_gives_the_same_output(answered, photos):
    service, artefact, net, output = answered
    inputs = dict.fromkeys(service.inputs, photos["coffee"])

    assert service.run(net, service.prepare(artefact, inputs)) == output


def test_resized_item_gives_the_same_output_and_is_smaller(answered, photos):
    service, artefact, net, output = answered
    originals = dict.fromkeys(service.inputs, photos["coffee"])
    model_input = ModelInput(height=artefact.height, width=artefact.width, crop=artefact.crop)

    resized = service.resize(model_input, originals)

    assert resized.keys() == service.inputs.keys()
    assert sum(map(len, resized.values())) < sum(map(len, originals.values()))
    assert service.run(net, service.prepare(artefact, resized, is_resized=True)) == output


@pytest.mark.parametrize("data", [b"", b"text", b"\xff\xd8\xff", b"GIF89a", b"\x89PNG\r\n\x1a\n"])
def test_input_that_is_not_an_image_is_refused_with_the_same_message_before_it_is_sent(answered, data):
    service, artefact, _, _ = answered
    inputs = dict.fromkeys(service.inputs, data)
    model_input = ModelInput(height=artefact.height, width=artefact.width, crop=artefact.crop)

    with pytest.raises(BadInput) as here:
        service.resize(model_input, inputs)
    with pytest.raises(BadInput) as there:
        service.prepare(artefact, inputs)

    assert (type(here.value), here.value.reason) == (type(there.value), there.value.reason)


def test_original_that_is_declared_as_resized_is_bad_input(answered, photos):
    service, artefact, _, _ = answered

    with pytest.raises(BadInput, match="must be a WebP"):
        service.prepare(artefact, dict.fromkeys(service.inputs, photos["coffee"]), is_resized=True)


def test_view_of_default_params_is_json_and_no_longer_than_the_output(answered):
    service, _, _, output = answered

    view = service.view(output, service.check_params({}))

    assert len(json.dumps(view)) <= len(json.dumps(output))
    assert fits(view, service.output_schema)


@pytest.mark.parametrize("data", [b"", b"text", b"\xff\xd8\xff", b"GIF89a", b"\x89PNG\r\n\x1a\n"])
def test_input_that_is_not_an_image_is_bad_input(answered, data):
    service, artefact, _, _ = answered

    with pytest.raises(BadInput):
        service.prepare(artefact, dict.fromkeys(service.inputs, data))


@pytest.mark.parametrize("output", [None, True, 0, "", "x", [], {}, [[]], [None] * 20, {"a": 1}, [[1, 2, 3]] * 20])
def test_output_of_another_kind_is_refused(answered, output):
    service, artefact, _, _ = answered

    with pytest.raises(MalformedResults):
        service.check_output(artefact, output)


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
def test_forged_classification_is_refused(answered, forge):
    service, artefact, _, output = answered
    if service.name != "classification":
        pytest.skip("this is how a classification can be forged")
    rows = json.loads(json.dumps(output))
    forge(rows)

    with pytest.raises(MalformedResults):
        service.check_output(artefact, rows)


@pytest.mark.parametrize(("top", "shown"), [(1, 1), (5, 5), ("20", 20), (7.0, 7)])
def test_top_cuts_the_view_of_a_classification(answered, top, shown):
    service, _, _, output = answered
    if service.name != "classification":
        pytest.skip("only a classification has a top")

    assert service.view(output, service.check_params({"top": top})) == output[:shown]


@pytest.mark.parametrize("top", [0, 21, -1, "0", 2.5, "1e1x"])
def test_top_out_of_range_is_refused_with_its_range(top):
    with pytest.raises(InvalidParams, match="top takes a whole number from 1 to 20"):
        load_service("classification").check_params({"top": top})


# Comparing two outputs


def copied(output):
    """A copy as it comes out of a results file."""
    return json.loads(json.dumps(output))


def test_equal_outputs_do_not_differ(answered):
    service, _, _, output = answered

    found = service.compare(output, copied(output), 0.0)

    assert (found.largest, found.is_same_order) == (0.0, True)


#: An output as a net of many classes may give it, with two near-ties among the five likeliest.
ROWS = [[f"n{i}", f"label {i}", p] for i, p in enumerate([0.4, 0.2, 0.10002, 0.1, 0.05, 0.04, *[0.001] * 14])]


def compare(one, other, tolerance=1e-4):
    """Compare two classifications; which of them is the expected one makes no difference to how far apart they are."""
    service = load_service("classification")
    found = service.compare(one, other, tolerance)

    assert service.compare(other, one, tolerance).largest == found.largest
    return found


def test_changed_probability_shows_and_leaves_the_order():
    other = copied(ROWS)
    other[0][2] -= 0.03

    found = compare(ROWS, other)

    assert found.largest == pytest.approx(0.03)
    assert found.is_same_order


def test_near_ties_may_swap_within_the_tolerance():
    other = copied(ROWS)
    other[2], other[3] = [*ROWS[3][:2], 0.10001], [*ROWS[2][:2], 0.10001]

    assert compare(ROWS, other).is_same_order
    assert compare(ROWS, other).largest == pytest.approx(1e-5)
    assert not compare(ROWS, other, tolerance=1e-6).is_same_order


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 2), (3, 4)])
def test_changed_order_of_the_five_likeliest_shows(first, second):
    other = copied(ROWS)
    other[first][:2], other[second][:2] = ROWS[second][:2], ROWS[first][:2]

    found = compare(ROWS, other)

    assert not found.is_same_order
    assert found.largest == pytest.approx(ROWS[first][2] - ROWS[second][2])


def test_order_after_the_fifth_is_not_looked_at():
    other = copied(ROWS)
    other[5][:2], other[6][:2] = ROWS[6][:2], ROWS[5][:2]

    assert compare(ROWS, other).is_same_order


def test_label_that_one_side_leaves_out_counts_as_far_as_it_is_likely():
    other = copied(ROWS)
    other[4][:2] = ["n99", "label 99"]

    found = compare(ROWS, other)

    # It is there at most as likely as the last that is named.
    assert found.largest == pytest.approx(0.05 - 0.001)
    assert not found.is_same_order


def test_label_at_the_end_may_be_another_one_as_unlikely():
    other = copied(ROWS)
    other[-1][:2] = ["n99", "label 99"]

    found = compare(ROWS, other)

    assert (found.largest, found.is_same_order) == (0.0, True)


def test_outputs_of_a_net_with_few_classes_are_compared():
    few = [["", "cat", 0.7], ["", "dog", 0.3]]

    assert compare(few, copied(few)).largest == 0.0
    assert compare(few, [["", "dog", 0.7], ["", "cat", 0.3]]).largest == pytest.approx(0.4)
    assert not compare(few, [["", "dog", 0.7], ["", "cat", 0.3]]).is_same_order
