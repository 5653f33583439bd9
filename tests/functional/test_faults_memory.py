"""Too little memory, as programs in the guest see it."""

import pytest

from pytest_vmsandbox import ConfigError

HOG = "dd if=/dev/zero of=/dev/null bs={}M count=1 2>/dev/null"
KIB = 1024


def available(vm):
    """MiB."""
    lines = vm.read_text("/proc/meminfo").splitlines()
    return next(int(line.split()[1]) // KIB for line in lines if line.startswith("MemAvailable"))


@pytest.mark.origins("cloned")
@pytest.mark.vm("tiny", memory="256MiB")
def test_of_the_whole_guest(vm):
    with vm.faults.memory("48MiB") as fault:
        assert 40 <= available(vm) <= 56
        vm.shell(HOG.format(8))
        killed = vm.shell(HOG.format(100), check=False)
        assert killed.returncode in {-9, 137, 1}  # killed, or no memory
        assert vm.run(["true"]).returncode == 0  # the helper lives
        assert "48MiB" in fault.text
        with vm.snapshot():
            fault.end()
    assert available(vm) > 128  # it was ended once more
    assert "ramfs" not in vm.read_text("/proc/mounts")
    vm.shell(HOG.format(100))
    with pytest.raises(ConfigError, match="available already"):
        vm.faults.memory("1GiB")
    assert not vm.faults.in_force


@pytest.mark.origins("cloned")
@pytest.mark.vm("tiny", memory="256MiB")
def test_of_one_process(vm):
    mounts = vm.read_text("/proc/mounts")
    script = f"read go; {HOG.format(60)}; echo $?; read go; {HOG.format(60)}; echo $?"
    with vm.popen(["sh", "-c", script]) as it, vm.popen(["sh", "-c", script]) as other:
        with vm.faults.memory("24MiB", of=it):
            for process, status in ((it, "137"), (other, "0")):
                print(file=process.stdin, flush=True)
                assert process.stdout.readline().strip() == status
        assert "vmsandbox" not in vm.read_text(f"/proc/{it.pid}/cgroup")
        print(file=it.stdin, flush=True)
        assert it.stdout.readline().strip() == "0"
        assert "Killed process" in vm.run(["dmesg"]).stdout
        assert vm.read_text("/proc/mounts") == mounts
        with vm.faults.memory("24MiB", of=other.pid):
            pass
        with pytest.raises(ConfigError, match="systemd"):
            vm.faults.memory("24MiB", of="it.service")
        with pytest.raises(ConfigError, match="no process 99999"):
            vm.faults.memory("24MiB", of=99999)
    for wrong in ({"of": "it"}, {"of": 0}, {"of": True}):
        with pytest.raises(ConfigError):
            vm.faults.memory("24MiB", **wrong)
    with pytest.raises(ConfigError, match="at least 16MiB"):
        vm.faults.memory("1MiB")


@pytest.mark.origins("cloned")
@pytest.mark.vm("tiny", memory="256MiB")
def test_of_a_process_that_has_memory_already(vm):
    mounts = vm.read_text("/proc/mounts")
    script = "a=$(head -c 40000000 /dev/zero | tr '\\0' a); {0}; b=$(head -c 30000000 /dev/zero | tr '\\0' b); {0}"
    with vm.popen(["sh", "-c", script.format("echo ${#a}; read go")]) as it:
        assert it.stdout.readline() == "40000000\n"
        with pytest.raises(ConfigError, match="has .*MiB already, so it cannot be limited"):
            vm.faults.memory("20MiB", of=it)
        assert not vm.faults.in_force
        assert "vmsandbox" not in vm.read_text(f"/proc/{it.pid}/cgroup")
        assert vm.read_text("/proc/mounts") == mounts
        with vm.faults.memory("160MiB", of=it):
            group = vm.shell("cat /run/vmsandbox-cgroup/vmsandbox-fault-*/memory.max").stdout
            assert int(group) <= (160 << 20) - 40_000_000
            with pytest.raises(ConfigError, match="another fault limits"):
                vm.faults.memory("200MiB", of=it)
        with vm.faults.memory("64MiB", of=it):
            print(file=it.stdin, flush=True)
            assert it.wait(60) == -9
    children = (
        "i=0; while [ $i -lt 60 ]; do sleep 600 & i=$((i + 1)); [ $i != 15 ] || echo; done; wait"
    )
    with vm.popen(["sh", "-c", children]) as it:
        it.stdout.readline()
        with vm.faults.memory("64MiB", of=it):  # none escapes that it starts meanwhile
            family = f"cat /proc/{it.pid}/task/*/children"
            vm.wait_until(["sh", "-c", f"[ $({family} | wc -w) -eq 60 ]"], timeout=120)
            groups = vm.shell(f"for pid in $({family}); do cat /proc/$pid/cgroup; done").stdout
            assert groups.count("vmsandbox-fault-") == 60
        it.kill()
        vm.shell("killall sleep", check=False)


@pytest.mark.origins("cloned")
@pytest.mark.vm("debian-13")
def test_of_a_service(vm):
    script = (
        f"while sleep 0.2; do [ ! -e /go ] || {{ rm /go; {HOG.format(60)}; echo $? >/said; }}; done"
    )
    vm.write_text("/hog", script)
    unit = "[Service]\nMemoryMax=1G\nOOMPolicy=continue\nExecStart=/bin/sh /hog\n"
    vm.write_text("/etc/systemd/system/hog.service", unit)
    vm.shell("systemctl daemon-reload && systemctl start hog")
    limit = "/sys/fs/cgroup/system.slice/hog.service/memory.max"
    with vm.faults.memory("24MiB", of="hog.service"):
        assert int(vm.read_text(limit)) == 24 << 20
        vm.run(["touch", "/go"])
        vm.wait_until(["test", "-s", "/said"], timeout=120)
        assert vm.read_text("/said").strip() == "137"
    assert int(vm.read_text(limit)) == 1 << 30
    first, last = (vm.faults.memory(size, of="hog.service") for size in ("32MiB", "48MiB"))
    assert int(vm.read_text(limit)) == 32 << 20
    first.end()
    assert int(vm.read_text(limit)) == 48 << 20
    last.end()
    assert int(vm.read_text(limit)) == 1 << 30
    vm.shell("rm /said; touch /go")
    vm.wait_until(["test", "-s", "/said"], timeout=120)
    assert vm.read_text("/said").strip() == "0"
