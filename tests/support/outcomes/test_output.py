import os
import subprocess
import sys

import pytest


def test_both_streams():
    print("to stdout")
    print("to stderr", file=sys.stderr)


def test_both_streams_and_fails():
    print("to stdout")
    print("to stderr", file=sys.stderr)
    assert 0


def test_descriptors(capfd):
    os.write(1, b"by descriptor\n")
    assert capfd.readouterr().out == "by descriptor\n"


@pytest.fixture
def talks():
    print("setup talks")
    yield
    print("teardown talks")


def test_phases(talks):
    print("call talks")


def test_phases_and_fails(talks):
    print("call talks")
    assert 0


def test_subprocess():
    sys.stdout.flush()
    script = "import sys; print('child out'); print('child err', file=sys.stderr)"
    subprocess.run([sys.executable, "-c", script], check=True)
    os.system("echo from a shell")


def test_capsys(capsys):
    print("caught")
    out, _ = capsys.readouterr()
    with capsys.disabled():
        pass
    assert out == "caught\n"


def test_odd_characters():
    print("nul \x00 bell \x07 red \x1b[31mred\x1b[0m clear \x1b[2J title \x1b]0;x\x07 high \x9b é 日本")
    print("back\rspace \b vertical \v form \f tab\t.")
    assert 0


def test_bytes_that_are_no_text():
    os.write(1, b"\xff\xfe\n")
    sys.stdout.buffer.write(b"\xf0\x9f\n")
    assert 0


def test_lone_surrogate():
    print("\udcff")


def test_very_long_output():
    for number in range(200):
        print(f"{number:06} " + "x" * 9_993)


def test_one_long_line():
    print("y" * 200_000)
    assert 0


def test_no_line_end():
    sys.stdout.write("no end")
    sys.stderr.write("no end either")
    assert 0


def test_standard_input():
    input()


def test_arguments_of_the_process():
    assert sys.stdin is not None
    assert sys.__stdout__ is not None
