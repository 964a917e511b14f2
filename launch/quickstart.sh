#!/usr/bin/env bash
# The main job on the embedded corpus: prepare -> cluster -> train -> evaluate -> generate, for HDLM and MDLM,
# then a table of both. After installation a few minutes on 2 CPU cores; everything lies under runs/quickstart.
# Run again, it reuses what is there. Arguments go to every stage: ./launch/quickstart.sh --config.train.steps=50
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

case "${1:-}" in
  -h | --help) sed -n '2,4s/^# //p' "$0"; exit ;;
esac

setup_venv
started=$SECONDS
runs=runs/quickstart
for name in hdlm_tiny mdlm_tiny; do
  for mode in train evaluate generate; do
    say "$name: $mode ($((SECONDS - started)) s so far)"
    "$PY" -m hdlm_jax.main --config="configs/$name.py" --workdir="$runs/$name" --mode="$mode" \
      --config.data.dir="$runs/data" "$@"
  done
done

say "results"
"$PY" -m hdlm_jax.report "$runs/hdlm_tiny" "$runs/mdlm_tiny"
say "done in $((SECONDS - started)) s, installation not counted"
