import allure


@allure.feature("sums")
@allure.severity("minor")
def test_steps():
    with allure.step("adding"):
        allure.attach("1 + 1", name="sum", attachment_type=allure.attachment_type.TEXT)
    assert 1 + 1 == 2


def test_fails():
    with allure.step("failing"):
        raise OSError("told to allure")
