"""The plan of a load as a test plan of Apache JMeter 5.5 or later, which sends the same requests at the same times.

Beside the .jmx file is a list of the images. Weaknesses: it measures until a request is accepted, also for a plan that
waits for answers; JMeter counts a latency from when it sends a request, not from when it should have; it opens a
connection for each one; and it writes ? for letters of a file's name that are not in ASCII.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree

from cli.load.plan import LoadPlan

#: The property with the API key, which is not written to the file: jmeter -Jmlg_api_key=...
_KEY = "${__P(mlg_api_key,)}"


def jmeter_plan(plan: LoadPlan, images: Path, *, needs_key: bool) -> str:
    """Build the .jmx file. :param images: the file with the list of images. :param needs_key: a key is sent too."""
    root = ElementTree.Element("jmeterTestPlan", version="1.2", properties="5.0", jmeter="5.6.3")
    tests = ElementTree.SubElement(root, "hashTree")
    content = _element(tests, "TestPlan", "TestPlanGui", f"Load of {plan.url}")
    group = _element(
        content,
        "OpenModelThreadGroup",
        "OpenModelThreadGroupGui",
        "Uploads",
        {"ThreadGroup.on_sample_error": "continue", "OpenModelThreadGroup.schedule": _schedule(plan)},
        elements={"ThreadGroup.main_controller": "OpenModelThreadGroupController"},
    )
    if needs_key:
        _headers(group, {"Authorization": f"Bearer {_KEY}"})
    # In a controller of its own, because a group of this kind begins two iterations for each request, and each takes
    # the next line.
    upload = _element(group, "GenericController", "LogicControllerGui", "Upload")
    _element(
        upload,
        "CSVDataSet",
        "TestBeanGUI",
        "Images",
        {
            "filename": str(images.absolute()),
            "fileEncoding": "UTF-8",
            "variableNames": "image",
            "delimiter": ",",
            "shareMode": "shareMode.all",
        },
        {"ignoreFirstLine": False, "quotedData": True, "recycle": True, "stopThread": False},
    )
    parts = urlsplit(plan.url)
    path, _, query = plan.path.partition("?")
    sampler = {
        "HTTPSampler.domain": parts.hostname or "",
        "HTTPSampler.port": str(parts.port or ""),
        "HTTPSampler.protocol": parts.scheme,
        "HTTPSampler.path": f"{parts.path}{path}{'?' if query else ''}{query}",
        "HTTPSampler.method": "POST",
        "HTTPSampler.response_timeout": f"{plan.timeout_seconds * 1000:.0f}",
    }
    flags = {
        "HTTPSampler.DO_MULTIPART_POST": True,
        "HTTPSampler.use_keepalive": True,
        "HTTPSampler.follow_redirects": False,
    }
    before = len(upload)
    _element(upload, "HTTPSamplerProxy", "HttpTestSampleGui", f"POST {path}", sampler, flags)
    # JMeter wants it to be said that there are no further fields.
    arguments = {"name": "HTTPsampler.Arguments", "elementType": "Arguments", "guiclass": "HTTPArgumentsPanel"}
    fields = ElementTree.SubElement(upload[before], "elementProp", arguments)
    ElementTree.SubElement(fields, "collectionProp", name="Arguments.arguments")
    files = ElementTree.SubElement(upload[before], "elementProp", name="HTTPsampler.Files", elementType="HTTPFileArgs")
    listed = ElementTree.SubElement(files, "collectionProp", name="HTTPFileArgs.files")
    file = ElementTree.SubElement(listed, "elementProp", name="${image}", elementType="HTTPFileArg")
    _properties(
        file,
        {"File.path": "${image}", "File.paramname": "image", "File.mimetype": "application/octet-stream"},
        "stringProp",
    )
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def image_list(paths: Sequence[Path]) -> str:
    """Build the list of images."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([str(path.absolute())] for path in paths)
    return text.getvalue()


def _schedule(plan: LoadPlan) -> str:
    """Write the times as JMeter does: a rate, how long it takes to the next one, that rate."""
    rate, rest = f"rate({plan.rate:g}/sec)", plan.seconds - plan.ramp_seconds
    ramp = f"rate(0/sec) even_arrivals({plan.ramp_seconds:g} sec) " if plan.ramp_seconds else ""
    return f"{ramp}{rate}" + (f" even_arrivals({rest:g} sec) {rate}" if rest else "")


def _element(
    parent: ElementTree.Element,
    kind: str,
    gui: str,
    name: str,
    texts: Mapping[str, str] | None = None,
    flags: Mapping[str, bool] | None = None,
    *,
    elements: Mapping[str, str] | None = None,
) -> ElementTree.Element:
    """Add an element of a test. :return: the tree for the elements below it."""
    element = ElementTree.SubElement(parent, kind, guiclass=gui, testclass=kind, testname=name)
    for property_name, element_type in (elements or {}).items():
        ElementTree.SubElement(element, "elementProp", name=property_name, elementType=element_type)
    _properties(element, texts or {}, "stringProp")
    _properties(element, {name: str(value).lower() for name, value in (flags or {}).items()}, "boolProp")
    return ElementTree.SubElement(parent, "hashTree")


def _properties(element: ElementTree.Element, values: Mapping[str, str], kind: str) -> None:
    for name, value in values.items():
        ElementTree.SubElement(element, kind, name=name).text = value


def _headers(parent: ElementTree.Element, headers: Mapping[str, str]) -> None:
    before = len(parent)
    _element(parent, "HeaderManager", "HeaderPanel", "Headers")
    listed = ElementTree.SubElement(parent[before], "collectionProp", name="HeaderManager.headers")
    for name, value in headers.items():
        header = ElementTree.SubElement(listed, "elementProp", name="", elementType="Header")
        _properties(header, {"Header.name": name, "Header.value": value}, "stringProp")
