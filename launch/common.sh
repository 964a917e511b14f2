# Shared set-up, sourced by the scripts beside it: `source "$(dirname "$0")/common.sh"`, then `setup_venv`.
# Goes to the repository root and stops at the first error. Reads two variables of the environment:
#   PYTHON   the interpreter to make the environment with (default: the first Python >= 3.11 found)
#   VENV     the folder of the environment (default: .venv in the repository root)
# shellcheck shell=bash
set -euo pipefail
# Huge pages for large temporary arrays (glibc, Linux): about a tenth more speed on CPU, for JAX as for PyTorch.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n[%s] %s\n' "$(basename "$0" .sh)" "$*"; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

# runs_python INTERPRETER MINOR: succeeds where it starts (a version manager's stub may not), is at least
# Python 3.MINOR and can make virtual environments.
runs_python() {
  "$1" -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, $2))" >/dev/null 2>&1
}

# find_python: prints an interpreter >= 3.11, or explains in one line why there is none.
find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    runs_python "$PYTHON" 11 || die "PYTHON=$PYTHON is not a Python >= 3.11 with the venv module."
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.11 python3.12 python3.13 python3.14 python; do
    if runs_python "$candidate" 11; then echo "$candidate"; return; fi
  done
  die "no Python >= 3.11 with the venv module found; install one (Debian: apt install python3 python3-venv)" \
    "or name it: PYTHON=/path/to/python3 $0"
}

# install_into FOLDER INTERPRETER: makes the environment unless it is there and installs requirements.txt and
# the package itself (editable, so that it imports from any folder). A stamp, written last, makes the next
# call install nothing until requirements.txt, setup.py or the place of the repository changes.
install_into() {
  local folder=$1 interpreter=$2 python="$1/bin/python" stamp started
  if ! "$python" -m pip --version >/dev/null 2>&1; then  # absent, or left half made by an interruption
    say "making $folder with $("$interpreter" --version 2>&1)"
    "$interpreter" -m venv --clear "$folder"
  fi
  runs_python "$python" 11 || die "$folder holds $("$python" --version 2>&1); needed is 3.11 or newer: remove $folder."
  stamp=$("$python" -c 'import hashlib, os, pathlib
parts = [pathlib.Path(name).read_bytes() for name in ("requirements.txt", "setup.py")]
print(hashlib.sha256(b"\0".join([*parts, os.getcwd().encode()])).hexdigest())')
  if [ "$(cat "$folder/installed.sha256" 2>/dev/null)" = "$stamp" ]; then
    say "using $folder ($("$python" --version 2>&1)), nothing to install"
    return
  fi
  say "installing requirements.txt into $folder (once, about a minute, 1.1 GB)"
  started=$SECONDS
  "$python" -m pip install -qq --disable-pip-version-check --no-input -r requirements.txt \
    || die "pip could not install requirements.txt (message above): is a package index reachable?"
  "$python" -m pip install -qq --disable-pip-version-check --no-input --no-deps --no-build-isolation -e .
  echo "$stamp" >"$folder/installed.sha256"
  say "installed in $((SECONDS - started)) s"
}

# setup_venv: the environment of the scripts; sets PY to its interpreter.
setup_venv() {
  local interpreter
  VENV=${VENV:-.venv}
  interpreter=$(find_python) || exit 1
  install_into "$VENV" "$interpreter"
  # shellcheck disable=SC2034  # for the scripts that source this one
  PY="$VENV/bin/python"
}
