import pytest


def test_first(order):
    assert order[0] == "session up"


class TestOrder:
    def test_a(self, order):
        pass

    def test_b(self, order):
        raise AssertionError("in between")

    def test_c(self, order, of_package):
        pass


def test_after_the_class(order):
    pass


def test_per_session_1(order, per_session):
    assert per_session == "one"


@pytest.fixture(scope="module", params=[1, 2])
def per_module(request):
    yield request.param


@pytest.fixture(scope="class", params=["x", "y"])
def per_class(request):
    yield request.param


def test_per_module_1(order, per_module):
    pass


def test_per_module_2(order, per_module, per_session):
    pass


class TestPerClass:
    def test_a(self, order, per_class):
        pass

    def test_b(self, order, per_class):
        pass


@pytest.fixture
def breaks():
    print("before it breaks")
    raise RuntimeError("in setup")


@pytest.fixture
def breaks_late():
    yield
    print("while it goes")
    raise RuntimeError("in teardown")


@pytest.fixture(scope="class")
def breaks_with_class():
    yield
    raise RuntimeError("in the class's teardown")


@pytest.fixture(scope="module")
def breaks_module():
    raise RuntimeError("in the module's setup")


@pytest.fixture(scope="session")
def breaks_session():
    raise RuntimeError("in the session's setup")


def test_setup_breaks(breaks):
    pass


def test_teardown_breaks(breaks_late):
    print("called")


def test_fails_and_teardown_breaks(breaks_late):
    assert 0, "in call"


class TestClassBreaks:
    def test_a(self, breaks_with_class):
        pass

    def test_b(self, breaks_with_class):
        pass


def test_module_setup_breaks(breaks_module):
    pass


def test_module_setup_breaks_again(breaks_module):
    pass


def test_session_setup_breaks(breaks_session):
    pass


def test_unknown_fixture(there_is_no_such_fixture):
    pass


def test_finalizers(request, record_property):
    request.addfinalizer(lambda: print("the first finalizer goes last"))
    request.addfinalizer(lambda: record_property("finalized", True))


def test_two_finalizers_break(request):
    def fail(text):
        raise ValueError(text)

    request.addfinalizer(lambda: fail("one"))
    request.addfinalizer(lambda: fail("two"))


class TestXunit:
    @classmethod
    def setup_class(cls):
        print("setup_class")
        cls.seen = []

    def setup_method(self):
        self.seen.append("method")

    def teardown_method(self):
        print("teardown_method", self.seen)

    @classmethod
    def teardown_class(cls):
        print("teardown_class")

    def test_a(self):
        assert self.seen == ["method"]

    def test_b(self):
        assert self.seen == ["method", "method"]


def test_tmp_path(tmp_path, tmp_path_factory, record_property):
    (tmp_path / "file").write_text("x")
    record_property("name", tmp_path.name)
    assert tmp_path.parent == tmp_path_factory.getbasetemp()
    assert [it.name for it in tmp_path.iterdir()] == ["other"]


def test_names(request, record_property, where):
    record_property("nodeid", request.node.nodeid)
    record_property("name", request.node.name)
    record_property("location", request.node.location)
    record_property("path", str(request.path))
    record_property("keywords", sorted(request.node.keywords))
    record_property("fixtures", request.fixturenames)
    assert where == "the root"


def test_monkeypatch(monkeypatch, record_property):
    monkeypatch.setenv("OUTCOMES", "1")
    monkeypatch.chdir("/")


@pytest.mark.usefixtures("of_module")
def test_properties(record_property, record_xml_attribute, request):
    record_property("number", 3)
    record_property("object", object)
    record_property("none", None)
    record_property("set", {1})
    record_property("nested", {"a": (1, 2.5, float("nan"))})
    record_property("bytes", b"\xff")
    record_property("control", "a\x00b\x1b[31m\ud800")
    request.node.user_properties.append((1, "a name that is no text"))


def test_suite_property(record_testsuite_property):
    record_testsuite_property("of-the-suite", 1)
