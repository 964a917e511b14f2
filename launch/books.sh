#!/usr/bin/env bash
# The comparison of docs/results.md on textbooks and novels: trains, evaluates and samples every run of
# configs/books.py (what is done is reused), then prints the table. Needs the data under $HDLM_DATA (../shared/data).
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

export HDLM_DATA=${HDLM_DATA:-../shared/data}
setup_venv
runs=runs/books
names=(mdlm hdlm shuffled mdlm-warm hdlm-warm mdlm-s1 hdlm-s1 hdlm-factorised hdlm-factorised-s1)
for name in "${names[@]}"; do
  for mode in train evaluate generate; do
    say "$name: $mode"
    "$PY" -m hdlm_jax.main --config="configs/books.py:$name" --workdir="$runs/$name" --mode="$mode" \
      --config.data.dir="$runs/data" "$@"
  done
done
"$PY" -m hdlm_jax.run.report "${names[@]/#/$runs/}"
