def test_data(data_regression):
    data_regression.check({"a": [1, 2], "b": "text"})


def test_file(file_regression):
    file_regression.check("some text\n", extension=".txt")
