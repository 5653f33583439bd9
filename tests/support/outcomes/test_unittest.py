import unittest


def setUpModule():
    print("setUpModule")


def tearDownModule():
    print("tearDownModule")


def test_before_the_classes(order):
    pass


class TestOne(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        print("setUpClass")
        cls.values = []

    @classmethod
    def tearDownClass(cls):
        print("tearDownClass")

    def setUp(self):
        self.values.append(1)
        self.addCleanup(print, "cleanup")

    def tearDown(self):
        print("tearDown")

    def test_a(self):
        self.assertEqual(self.values, [1])

    def test_b(self):
        self.assertEqual(self.values, [1])

    @unittest.skip("by decorator")
    def test_skip(self):
        raise AssertionError

    def test_skip_inside(self):
        self.skipTest("inside")

    @unittest.expectedFailure
    def test_expected(self):
        self.fail("expected")

    @unittest.expectedFailure
    def test_unexpected(self):
        pass

    def test_differs(self):
        self.assertEqual({"a": [1, 2]}, {"a": [1, 3]})


@unittest.skip("all of it")
class TestSkipped(unittest.TestCase):
    def test_a(self):
        raise AssertionError


class TestSetUpClassFails(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        raise RuntimeError("in setUpClass")

    def test_a(self):
        pass

    def test_b(self):
        pass


class TestTearDownFails(unittest.TestCase):
    def tearDown(self):
        raise RuntimeError("in tearDown")

    def test_a(self):
        pass


class TestAsync(unittest.IsolatedAsyncioTestCase):
    async def test_a(self):
        self.assertTrue(False)


def test_between_the_classes(order):
    pass
