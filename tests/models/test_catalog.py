"""The catalogue: the models of the registry, with the numbers that are counted and published."""

import dataclasses
import re
import subprocess
import sys

import pytest

from edgeattn import list_models
from edgeattn.errors import UsageError
from edgeattn.models import catalog


def test_it_has_the_models_of_the_registry():
    assert sorted(catalog.CATALOG) == list_models()


def test_it_needs_no_torch():
    script = "import sys; import edgeattn.models.catalog, edgeattn.models.sources; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("entry", catalog.CATALOG.values(), ids=lambda entry: entry.name)
def test_entries_are_complete_and_consistent(entry):
    assert entry.name == entry.name.lower() and entry.parameters > 0 and entry.macs > 0
    assert re.fullmatch(r"\d{4}\.\d{5}", entry.paper) and entry.page.startswith("https://")
    assert (entry.top1 is None) or (60 < entry.top1 < 90 and entry.metric is None)
    assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)
    if entry.sha256_prefix:  # torch.hub's convention: the name of the file ends with it
        assert re.fullmatch("[0-9a-f]{8,}", entry.sha256_prefix) and f"-{entry.sha256_prefix}." in entry.url
    assert entry.obtain in catalog.OBTAIN and (entry.obtain == "none") == (entry.licence is None)
    assert entry.url is None or entry.url.startswith(("https://", "hf-hub:"))
    assert (entry.url is not None and entry.hub is not None) or entry.obtain != "hub"


def test_addresses_are_told_apart():
    """A variant of another name for the same weights aside, no two have one address."""
    by_address = {}
    for entry in catalog.CATALOG.values():
        if entry.url:
            by_address.setdefault(entry.url, []).append(dataclasses.replace(entry, name=""))
    assert all(len(set(entries)) == 1 for entries in by_address.values())
    assert catalog.find_address(catalog.find("deit_small").url).name == "deit_small"
    assert catalog.find_address("https://example.org/x") is None and catalog.find("nothing") is None


def test_patterns_and_suggestions():
    assert [entry.name for entry in catalog.matching("deit_base*384")] == ["deit_base_384", "deit_base_distilled_384"]
    assert len(catalog.matching()) == len(catalog.CATALOG)
    with pytest.raises(UsageError, match=r"no model matches 'shvitt_\*': did you mean shvit_s"):
        catalog.matching("shvitt_*")
    with pytest.raises(UsageError, match=r"no model matches 'zzz': the zoo has care_\*, deit_\*"):
        catalog.matching("zzz")


def test_what_is_shown_of_published_figures():
    assert catalog.find("deit_tiny").published == "72.2 %" and catalog.find("dit_xl_2").published.startswith("FID 2.27")
    assert catalog.find("dit_s_2").published == "" and catalog.find("dit_s_2").obtain == "none"
