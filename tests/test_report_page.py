"""The report stands alone, holds the numbers of the manifest, and escapes what it prints."""

from html.parser import HTMLParser

import pytest

from pocktvm.report import report


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.references = [], []

    def handle_starttag(self, tag, attrs):
        self.references += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.references += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def manifest():
    step = [
        {"call": "stem <conv>", "rule": "direct_conv", "bytes": {"trained": 640, "workspace": 64}},
        {"call": "fc", "rule": "matmul", "bytes": {"trained": 640, "gradients": 2_000_000}},
    ]
    return {
        "model": "toy & co",
        "target": "rpi4",
        "scheme": '{"fc.*": 1}',
        "batch": 8,
        "plan": {
            "arena_bytes": 2_100_640,
            "lower_bound_bytes": 2_000_640,
            "total_bytes": 9_000_000,
            "by_class": {"frozen": 6_000_000, "trained": 640, "gradients": 2_000_000},
        },
        "kernels": {"tuned": 0, "rule": 2, "fallback": 0},
        "updated": {"fc.weight": 1.0, "fc.bias": 0.25},
        "timeline": {"step": step, "predict": []},
        "notices": ["batch norm uses <stored> statistics"],
        "versions": {"tvm": "0.27"},
    }


def test_page_is_balanced_and_refers_to_nothing(manifest):
    parser = Balanced()
    parser.feed(report(manifest, 12.34))
    assert parser.open == [] and parser.references == []


def test_page_has_the_numbers_and_escapes(manifest):
    page = report(manifest, 12.34)
    for text in ("toy &amp; co", "2.10 MB", "9.00 MB", "packing adds 5.0%", "12.3 s", "fc.weight"):
        assert text in page
    assert "peak: fc" in page and "stem &lt;conv&gt;" in page and "<stored>" not in page
    assert "direct_conv" in page and "25%" in page


def test_a_manifest_without_timeline_still_has_a_page(manifest):
    del manifest["timeline"]
    assert "<svg" not in report(manifest)
