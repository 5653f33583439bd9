import asyncio

import pytest
import pytest_asyncio


@pytest_asyncio.fixture
async def word():
    await asyncio.sleep(0)
    return "of a coroutine"


@pytest.mark.asyncio
async def test_passes(word):
    assert word == "of a coroutine"


@pytest.mark.asyncio
async def test_fails():
    await asyncio.sleep(0)
    raise OSError("in a coroutine")
