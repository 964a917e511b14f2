"""One job at a time changes a folder, as the operating system sees it."""
import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from hdlm_jax.common import lock
from hdlm_jax.config import ConfigError

HOLDS = """
import sys, time
from hdlm_jax.common import lock
with lock.held(sys.argv[1], "train"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_told_who_holds_it_and_a_kill_frees_it(tmp_path, root):
    path = str(tmp_path / "run" / "lock")
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, path], stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"PYTHONPATH": str(root)})
    assert holder.stdout.readline() == "held\n"
    said = rf"{path} is held by pid {holder.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d \S+, --mode=train; wait"
    with pytest.raises(ConfigError, match=said) as error, lock.held(path, "cluster"):
        pass
    assert "\n" not in str(error.value)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with lock.held(path, "cluster"):
        assert f"pid {os.getpid()} on" in open(path).read() and "--mode=cluster" in open(path).read()
        with pytest.raises(ConfigError, match=f"pid {os.getpid()}"), lock.held(path, "train"):
            pass
    assert open(path).read() == "", "nobody holds it any more"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys, number):
    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    for _ in range(2):
        with lock.held(str(tmp_path / "lock"), "train"):
            pass
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"lock: {tmp_path} lies on a file system without locks" in said
