def sign(number):
    if number < 0:
        return -1
    return 1


def never():
    return "no test comes here"
