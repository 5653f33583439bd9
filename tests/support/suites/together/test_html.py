import pytest_html


def test_extras(extras):
    extras.append(pytest_html.extras.text("some text", name="note"))
    extras.append(pytest_html.extras.url("https://example.com"))


def test_fails(extras):
    extras.append(pytest_html.extras.json({"a": [1, 2]}))
    assert not extras
