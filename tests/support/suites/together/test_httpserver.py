import urllib.request


def test_answers(httpserver):
    httpserver.expect_request("/word").respond_with_json({"a": 1})
    with urllib.request.urlopen(httpserver.url_for("/word")) as answer:
        assert answer.status == 200


def test_is_not_expected(httpserver):
    try:
        urllib.request.urlopen(httpserver.url_for("/other"))
    except OSError:
        httpserver.check_assertions()
