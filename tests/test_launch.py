"""The launchers: shell and schema checks, local_processes.sh for real, the others with stand-ins for what they call."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml

SCRIPTS = ("bench.sh", "books.sh", "common.sh", "quickstart.sh", "test.sh", "local_processes.sh", "slurm.sbatch",
           "tpu_pod.sh")
SCALE = ("local_processes.sh", "slurm.sbatch", "tpu_pod.sh", "gke.yaml")


def test_the_scripts_are_all_checked(root):
    found = {path.name for path in (root / "launch").iterdir() if path.suffix in (".sh", ".sbatch")}
    assert set(SCRIPTS) <= found
    for path in (root / "launch").glob("*.s*"):
        subprocess.run(["bash", "-n", path], check=True)


def test_shellcheck(root):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted((root / "launch").glob("*.s*"))
    done = subprocess.run(["shellcheck", *scripts], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SCALE)
def test_launchers_are_short_and_documented(root, name):
    text = (root / "launch" / name).read_text()
    assert len(text.splitlines()) <= 60
    assert f"launch/{name}" in (root / "docs" / "scale.md").read_text()
    assert name == "local_processes.sh" or "UNTESTED" in text


# ---- gke.yaml ----


@pytest.fixture
def jobset(root):
    return yaml.safe_load((root / "launch" / "gke.yaml").read_text())


def test_gke_resumes_what_was_preempted(jobset):
    """A pod that saved (75) or was preempted restarts all of them and does not count; crashes do."""
    from hdlm_jax.runs.interrupt import RESUME_EXIT

    (slice_,) = jobset["spec"]["replicatedJobs"]
    job, pod = slice_["template"]["spec"], slice_["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    exits, disrupted = job["podFailurePolicy"]["rules"]
    assert exits == {"action": "FailJob", "onExitCodes": {
        "containerName": container["name"], "operator": "In", "values": [RESUME_EXIT]}}
    assert disrupted == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    (rule,) = policy["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"  # what podFailurePolicy asks for
    assert pod["terminationGracePeriodSeconds"] >= 300 and pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"


def test_gke_starts_one_process_a_host_on_shared_storage(jobset):
    (slice_,) = jobset["spec"]["replicatedJobs"]
    job, pod = slice_["template"]["spec"], slice_["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][:3] == ["python", "-m", "hdlm_jax.main"] and "--distributed" in container["command"]
    chips = [int(n) for n in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")]
    hosts = chips[0] * chips[1] // container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == hosts and job["completionMode"] == "Indexed"
    (mount,) = container["volumeMounts"]
    assert mount["name"] == pod["volumes"][0]["name"]
    assert any(a.startswith(f"--workdir={mount['mountPath']}/") for a in container["args"])
    # the schema knows ports as numbers; a port that jax does not use would go unnoticed
    assert 8482 in [p["containerPort"] for p in container["ports"]], "jax's coordinator on TPUs"


def test_gke_is_a_jobset(root, jobset):
    """Against the fields of JobSet's own API, v1alpha2 (tests/jobset_schema.json: no field that it does not know)."""
    validator = jsonschema.Draft7Validator(json.loads((root / "tests" / "jobset_schema.json").read_text()))
    assert [f"{list(e.absolute_path)}: {e.message}" for e in validator.iter_errors(jobset)] == []
    jobset["spec"]["failurePolicy"]["rules"][0]["action"] = "Restart"
    assert list(validator.iter_errors(jobset)), "the schema says nothing about actions"


# ---- local_processes.sh ----


@pytest.fixture
def local(root, tmp_path, hearing):
    """start(n, script, **env): local_processes.sh running a Python script that imports no jax; logs in tmp_path."""
    started = []

    def start(n, script, python=(sys.executable, "-S", "-E"), **env):
        keep = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
        process = subprocess.Popen([root / "launch" / "local_processes.sh", str(n), *python, "-c", script],
                                   env=keep | {"LOGS": str(tmp_path)} | env, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:  # a test that failed: nothing of it stays behind
            os.killpg(process.pid, signal.SIGKILL)


def finished(process, timeout=60):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


SHOW = """
import os
print(*(os.environ[k] for k in ("HDLM_PROCESS_ID", "HDLM_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS", "JAX_PLATFORMS",
                                "XLA_FLAGS")))
"""


def test_local_processes_know_each_other(local, tmp_path):
    code, out, err = finished(local(2, SHOW, DEVICES="4", XLA_FLAGS="--given"))
    assert code == 0, err
    first, second = out.split(), (tmp_path / "process_1.log").read_text().split()
    assert [first[0], second[0]] == ["0", "1"] and first[1:] == second[1:]
    number, address, platform, *flags = first[1:]
    assert number == "2" and platform == "cpu" and address.startswith("127.0.0.1:")
    assert flags == ["--given", "--xla_force_host_platform_device_count=4"]
    code, out, _ = finished(local(1, SHOW, PORT="12345", JAX_PLATFORMS="cuda"))
    assert code == 0 and out.split()[1:4] == ["1", "127.0.0.1:12345", "cuda"]


@pytest.mark.parametrize("arguments", [[], ["two", "true"], ["0", "true"], ["2"]])
def test_local_processes_refuses(root, arguments):
    done = subprocess.run([root / "launch" / "local_processes.sh", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "give a number of processes and a command" in done.stderr


@pytest.mark.parametrize("codes, expected", [((0, 0), 0), ((75, 75), 75), ((75, 0), 75), ((75, 3), 3)])
def test_local_processes_exit_code(local, codes, expected):
    script = f"import os, sys; sys.exit({codes}[int(os.environ['HDLM_PROCESS_ID'])])"
    code, _, err = finished(local(len(codes), script))
    assert code == expected, err


WAITS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, {handler})
os.write(1, b"waiting\\n")  # not print: a handler may not come in between and print as well
if os.environ["HDLM_PROCESS_ID"] == "2":
    print("what went wrong", file=sys.stderr)
    sys.exit(7)
time.sleep(60)
"""


def test_local_processes_ends_the_rest_when_one_dies(local, tmp_path):
    """The code is that of the first; who does not leave when asked (process 0, 1) is killed after GRACE seconds."""
    started = time.time()
    code, out, err = finished(local(3, WAITS.format(handler="signal.SIG_IGN"), GRACE="1"))
    assert code == 7 and "process 2 left with code 7" in err and "what went wrong" in err
    assert time.time() - started < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_processes_passes_the_signal_on_and_waits(local, tmp_path, number):
    """Both are asked, and both have the time to finish."""
    handler = r"lambda *_: (time.sleep(1), os.write(1, b'saved\n'), sys.exit(75))"
    process = local(2, WAITS.format(handler=handler), GRACE="0")
    log = tmp_path / "process_1.log"
    deadline = time.time() + 30
    assert process.stdout.readline() == "waiting\n"
    while "waiting" not in (log.read_text() if log.exists() else "") and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    code, out, err = finished(process)
    assert code == 75, err
    assert out == "saved\n" and log.read_text() == "waiting\nsaved\n"


def test_local_processes_end_at_once_when_interrupted_twice(local, tmp_path):
    process = local(2, WAITS.format(handler=r"lambda *_: os.write(1, b'asked\n')"))
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked\n"
    started = time.time()
    process.send_signal(signal.SIGINT)
    code, _, err = finished(process)
    assert code == 130 and time.time() - started < 20, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_is_passed_on_as_well(local, tmp_path, number):
    """As of a terminal's Ctrl-C, which the script's own `sleep` gets, too; its processes are deaf to it."""
    handler = r"lambda *_: (time.sleep(1), os.write(1, b'saved\n'), sys.exit(75))"
    process = local(2, WAITS.format(handler=handler))
    log = tmp_path / "process_1.log"
    deadline = time.time() + 30
    assert process.stdout.readline() == "waiting\n"
    while "waiting" not in (log.read_text() if log.exists() else "") and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    code, out, err = finished(process)
    assert code == 75, err
    assert "saved" in out and "saved" in log.read_text()


JOIN = """
import os, jax, numpy as np
jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], int(os.environ["HDLM_NUM_PROCESSES"]),
                           int(os.environ["HDLM_PROCESS_ID"]))
from jax.experimental import multihost_utils
mine = np.array([10 + jax.process_index()])
print(multihost_utils.process_allgather(mine, tiled=True).tolist(), jax.local_device_count(), jax.device_count(),
      flush=True)
"""


def test_two_jax_processes(local, tmp_path):
    """Simulated devices are DEVICES of each process, also where XLA_FLAGS says another number."""
    script = local(2, JOIN, (sys.executable,), DEVICES="2", XLA_FLAGS="--xla_force_host_platform_device_count=8")
    code, out, err = finished(script, 120)
    log = (tmp_path / "process_1.log").read_text()
    assert code == 0, err + log
    assert "[10, 11] 2 4" in out and "[10, 11] 2 4" in log, "the collectives' library writes lines of its own"


# ---- slurm.sbatch and tpu_pod.sh, with stand-ins ----


@pytest.fixture
def stand_in(tmp_path):
    """make(name, script) -> environment in which `name` is that script; what it adds to $CALLS is in tmp_path/calls."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(name, script):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)
        return {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}

    return make


SRUN = """
[ "$1" = --kill-on-bad-exit=0 ] && shift
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=0 "$@" || code=$?; done
exit ${code:-0}
"""


@pytest.mark.parametrize("code, gpus, devices", [(0, "4", "0,1,2,3"), (75, "h100:2", "0,1"), (1, "1", "0")])
def test_slurm(root, tmp_path, stand_in, code, gpus, devices):
    """Every task gets its node's GPUs and the command; 75, and that alone, puts the job back into the queue."""
    stand_in("task", f'echo "$SLURM_PROCID $JAX_LOCAL_DEVICE_IDS $*" >>"$CALLS"; exit {code}')
    stand_in("scontrol", 'echo "scontrol $*" >>"$CALLS"')
    env = stand_in("srun", SRUN) | {"PY": "task", "SLURM_JOB_ID": "17", "SLURM_NTASKS": "2"}
    env["SLURM_GPUS_PER_NODE"] = gpus
    done = subprocess.run(["bash", root / "launch" / "slurm.sbatch", "--config=c.py", "--workdir=a b"], cwd=root,
                          env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    command = f"{devices} -m hdlm_jax.main --distributed --mode=train --config=c.py --workdir=a b"
    assert calls == [f"0 {command}", f"1 {command}"] + ["scontrol requeue 17"] * (code == 75)


def test_slurm_asks_for_what_a_resume_needs(root):
    text = (root / "launch" / "slurm.sbatch").read_text()
    for option in ("ntasks-per-node=1", "signal=TERM@300", "requeue", "open-mode=append"):
        assert f"\n#SBATCH --{option}\n" in text


# Plays a slice: $CALLS.d/state is its state, $CALLS.d/codes what the training commands leave with, one a line;
# a code with a state behind it, as in "1 PREEMPTED", changes the state as well.
GCLOUD = r"""
shift 3
echo "${*//$'\n'/ }" >>"$CALLS"
for word in "$@"; do case $word in --command=*) bash -nc "${word#*=}" || exit 9 ;; esac; done
folder=$CALLS.d
case $1 in
  describe) cat "$folder/state" 2>/dev/null || exit 1 ;;
  create) [ ! -e "$folder/state" ] || exit 1; echo READY >"$folder/state" ;;
  delete) rm "$folder/state" ;;
  scp) tar -tzf "$2" >"$folder/files" ;;
  ssh)
    case "$*" in
      *"main --distributed"*)
        read -r code next <"$folder/codes"
        sed -i 1d "$folder/codes"
        [ -z "$next" ] || echo "$next" >"$folder/state"
        exit "$code" ;;
    esac ;;
esac
"""


@pytest.fixture
def tpu_pod(root, tmp_path, stand_in):
    """run(codes, state, **env) -> (exit code, what was created, deleted and trained, all calls, output)."""
    def run(codes, state="", **env):
        folder = tmp_path / "calls.d"
        folder.mkdir()
        (folder / "codes").write_text("\n".join(codes) + "\n")
        if state:
            (folder / "state").write_text(f"{state}\n")
        stand_in("git", 'echo "git $*" >>"$CALLS"; exec tar -czf "$4" --files-from /dev/null')
        env = os.environ | {"ZONE": "z", "WAIT": "0"} | stand_in("gcloud", GCLOUD) | env
        done = subprocess.run([root / "launch" / "tpu_pod.sh", "--config=c.py", "--workdir=a b"], env=env, timeout=60,
                              capture_output=True, text=True)
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        kinds = ["train" if "main --distributed" in c else c.split()[0] for c in calls]
        kinds = [kind for kind in kinds if kind in ("create", "delete", "train")]
        return done.returncode, kinds, calls, done.stdout + done.stderr

    return run


def test_tpu_pod_from_creation_to_the_end(tpu_pod):
    code, kinds, calls, output = tpu_pod(["0"], SETUP="mount it", TYPE="v5litepod-256", VERSION="v9", TPU_NAME="slice")
    assert code == 0, output
    assert kinds == ["create", "train", "delete"] and calls[0].endswith(" HEAD") and calls[0].startswith("git archive ")
    create, copy, setup, install, train = (next(c for c in calls if word in c) for word in (
        "create", "scp", "mount it", "uv pip install", "main --distributed"))
    assert create == "create slice --accelerator-type=v5litepod-256 --version=v9 --spot --zone=z"
    assert all("--worker=all" in c and " slice" in c and c.endswith(" --zone=z") for c in (copy, setup, install, train))
    assert calls.index(copy) < calls.index(setup) < calls.index(install) < calls.index(train)
    assert r"-m hdlm_jax.main --distributed --mode=train --config=c.py --workdir=a\ b" in train


def test_tpu_pod_comes_back_after_every_preemption(tpu_pod):
    """Saved in time (75) or not (255, 1): a slice taken away is made anew; one that is there is used again."""
    codes = ["75 PREEMPTED", "255 PREEMPTED", "1 PREEMPTED", "255 PREEMPTED", "75", "255", "0"]
    code, kinds, _, output = tpu_pod(codes)
    assert code == 0, output
    again = ["create", "train", "delete"]
    assert kinds == again * 4 + ["create", "train", "train", "train", "delete"]


def test_tpu_pod_stops_when_the_command_fails(tpu_pod):
    code, kinds, _, output = tpu_pod(["1", "1", "75", "1", "3", "4"], "READY")
    assert code == 4 and kinds == ["train"] * 6, "three failures in a row, and the slice is kept"
    assert "three failures in a row" in output


def test_tpu_pod_settings(tpu_pod):
    code, kinds, calls, _ = tpu_pod(["0"], "TERMINATED", SPOT="no", KEEP="yes", MODE="evaluate")
    assert code == 0 and kinds == ["delete", "create", "train"], "one that has ended is removed first"
    assert not any("--spot" in c for c in calls) and any("--mode=evaluate" in c for c in calls)


def test_tpu_pod_needs_a_zone(tpu_pod):
    code, kinds, _, output = tpu_pod([], ZONE="")
    assert code != 0 and kinds == [] and "ZONE: is not set" in output
