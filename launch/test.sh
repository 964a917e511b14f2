#!/usr/bin/env bash
# Checks and tests: ./launch/test.sh [--slow] [--second-python] [pytest arguments]
#   (nothing)            ruff, mypy, the fast tests
#   --slow               the slow tests as well
#   --second-python      then the core tests on the newest jax, where a Python >= 3.12 is at hand and the
#                        environment is older than that (in .venv-new, or $VENV_NEW); CI does this
#   pytest arguments     e.g. tests/test_levels.py or -k posterior: those tests only, in the first Python only
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

# What has to hold on both ends of the supported versions: the mathematics, the network and the training step.
core=(tests/test_levels.py tests/test_process.py tests/test_sampler.py tests/test_hierarchy.py
      tests/test_network.py tests/test_train.py::test_one_path_for_any_mesh_and_microbatches
      tests/test_train.py::test_killed_and_resumed_equals_never_killed)

slow=no second=no
arguments=()
for argument in "$@"; do
  case "$argument" in
    --slow) slow=yes ;;
    --second-python) second=yes ;;
    -h | --help) sed -n '2,7s/^# //p' "$0"; exit ;;
    *) arguments+=("$argument") ;;
  esac
done
options=(-q -ra --durations=10)
# Whole passes on two processes, a file of tests to one of them: most of the time goes into compiling on one core.
if [ ${#arguments[@]} = 0 ]; then options+=(-n 2 --dist loadfile); fi
if [ "$slow" = yes ]; then options+=(--timeout=3600); else options+=(-m "not slow" --timeout=300); fi

# find_new_python: prints a Python >= 3.12 that really runs, from PATH or pyenv; fails where there is none.
find_new_python() {
  local candidate
  for candidate in python3.14 python3.13 python3.12 python3 "${HOME:-}"/.pyenv/versions/3.1[2-9]*/bin/python; do
    if runs_python "$candidate" 12; then echo "$candidate"; return; fi
  done
  return 1
}

setup_venv
say "ruff"
"$PY" -m ruff check .
say "mypy"
"$PY" -m mypy

# Announced before the tests, so that the closing line is pytest's own.
new_python=
if [ ${#arguments[@]} -gt 0 ] || [ "$second" = no ]; then
  say "tests"
elif runs_python "$PY" 12; then
  say "tests; these are the newest versions already, so no second Python"
elif new_python=$(find_new_python); then
  say "tests; the core tests once more after them with $("$new_python" --version)"
else
  say "tests; no Python >= 3.12 that runs was found, so the core tests are not run on the newest jax"
fi

"$PY" -m pytest "${options[@]}" ${arguments[@]+"${arguments[@]}"}

if [ -n "$new_python" ]; then
  new_venv=${VENV_NEW:-.venv-new}
  install_into "$new_venv" "$new_python"
  say "core tests with jax $("$new_venv/bin/python" -c 'from importlib.metadata import version; print(version("jax"))')"
  "$new_venv/bin/python" -m pytest "${options[@]}" "${core[@]}"
fi
