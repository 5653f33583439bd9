import anyio
import anyio.lowlevel
import pytest


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.mark.anyio
async def test_passes():
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.sleep, 0)


@pytest.mark.anyio
async def test_fails():
    await anyio.lowlevel.checkpoint()
    raise OSError("in a task")
