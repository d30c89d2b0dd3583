"""The bundle's README.md: what it is, how it was made, how to run and check it."""

from __future__ import annotations

import jinja2

from edgeattn.runtime.bundle import Manifest

_TEMPLATE = """\
# {{ m.model }}, {{ m.recipe }}

Written by edgeattn {{ m.edgeattn_version }} on {{ m.created }}. {{ "{:,}".format(m.parameters) }} parameters.

| | name | shape | type |
| --- | --- | --- | --- |
{% for t in m.inputs %}
| input | `{{ t.name }}` | {{ t.shape | join(" x ") }} | {{ t.dtype }} |
{% endfor %}
{% for t in m.outputs %}
| output | `{{ t.name }}` | {{ t.shape | join(" x ") }} | {{ t.dtype }} |
{% endfor %}

| target | variant | model | compute nodes by precision | settings |
| --- | --- | --- | --- | --- |
{% for a in m.artifacts %}
| {{ a.target }} | {{ a.variant }} | `{{ a.model }}` \
| {% for k, v in a.precision.items() %}{{ v }} {{ k }}{{ ", " if not loop.last }}{% endfor %} \
| {% for k, v in a.settings.items() %}{{ k }}={{ v }} {% endfor %}|
{% endfor %}

{% for graph, counts in m.nodes.items() %}
- ONNX nodes, {{ graph }}: {{ counts.values() | sum }} (\
{%- for k, v in counts.items() %}{{ v }} {{ k }}{{ ", " if not loop.last }}{% endfor %})
{% endfor %}

{% if m.calibration %}
- Calibrated on {{ m.calibration["images"] }} pictures of `{{ m.calibration["source"] }}`
  (SHA-256 of their pixels {{ m.calibration["sha256"][:16] }}), observer {{ m.calibration["observer"]["method"] }}.
{% else %}
- Not calibrated{{ ": floating point throughout" if m.precision.keys() | list == ["float32"] }}.
{% endif %}

{% if m.steps %}
## What each step gave

| recipe so far | logits' SQNR (dB) | same class as float32 | seconds to build |
| --- | ---: | ---: | ---: |
{% for s in m.steps %}
| {{ s["label"] }} | {{ "equal" if s["sqnr_db"] is none else "%.1f" | format(s["sqnr_db"]) }} \
| {{ "%.1f %%" | format(100 * s["agreement"]) }} \
| {{ "" if s["seconds"] is none else "%.1f" | format(s["seconds"]) }} |
{% endfor %}

{% endif %}
## Run it

{% if m.task == "classification" %}
    import edgeattn
    session = edgeattn.load("PATH/TO/THIS/FOLDER")
    print(session("picture.jpg").label)
{% else %}
    from edgeattn.runtime.bundle import Bundle
    bundle = Bundle.open("PATH/TO/THIS/FOLDER")
    session = bundle.open_session("{{ m.artifacts[0].target }}", "{{ m.artifacts[0].variant }}")
    outputs = session.run(bundle.golden().inputs)
{% endif %}

## Check it

    edgeattn verify .                  # digests and golden outputs
{% if m.task == "classification" %}
    edgeattn check . --data VAL_DIR    # accuracy, latency and placement; one verdict; writes report.html
{% else %}
    edgeattn bench .                   # latency and placement
{% endif %}

Results are appended to `results.jsonl`.\
{% if m.class_names %} Classes: {{ m.class_names | join(", ") }}.{% endif %}


## Choices made for you

{% for note in m.notes %}
- {{ note }}
{% endfor %}
"""


def model_card(manifest: Manifest) -> str:
    """Markdown text for a manifest (its `files` are not used)."""
    return (
        jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(_TEMPLATE).render(m=manifest)
    )
