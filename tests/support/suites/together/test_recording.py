import urllib.request

import pytest


@pytest.mark.vcr
def test_is_recorded(httpserver):
    httpserver.expect_request("/word").respond_with_data("recorded")
    with urllib.request.urlopen(httpserver.url_for("/word")) as answer:
        assert answer.read() == b"recorded"
