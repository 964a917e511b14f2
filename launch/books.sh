#!/usr/bin/env bash
# The comparison of docs/results.md on textbooks and novels: trains, evaluates (validation and zero-shot sets) and
# samples the runs of configs/books.py, then prints the table and writes the comparison page. What is done is reused and
# what was stopped goes on, so it may be killed and called again. Needs the data under $HDLM_DATA (../shared/data).
#   NAMES="ar mdlm hdlm" SEEDS="0 1" ./launch/books.sh [--config.train.steps=25000 ...]
# The autoregressive run is the judge of all samples, so `ar` of seed 0 has to be among them or there already.
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

export HDLM_DATA=${HDLM_DATA:-../shared/data}
runs=${RUNS:-runs/books}
read -ra names <<<"${NAMES:-ar mdlm gidd0 gidd hdlm hdlm_xi9 hdlm_k3}"
read -ra seeds <<<"${SEEDS:-0}"
zero_shot=(--config.evaluate.tasks="('ptb','wikitext2','lambada','ag_news','openwebtext')" --config.evaluate.draws=2
           --config.evaluate.limit=1000 --config.evaluate.protocols="('packed',)")
setup_venv
all=()
for seed in "${seeds[@]}"; do
  for name in "${names[@]}"; do
    run=$name
    if [ "$seed" != 0 ]; then run=$name-s$seed; fi
    all+=("$runs/$run")
    main=("$PY" -m hdlm_jax.main --config="configs/books.py:$run" --workdir="$runs/$run" --config.data.dir="$runs/data")
    say "$run"
    "${main[@]}" --mode=train "$@"
    "${main[@]}" --mode=evaluate "$@"
    "${main[@]}" --mode=evaluate "${zero_shot[@]}" "$@"
    "${main[@]}" --mode=generate --config.generate.judge="$runs/ar" "$@"
    "${main[@]}" --mode=report "$@"
  done
done
"$PY" -m hdlm_jax.report "${all[@]}"
"$PY" -m hdlm_jax.report --html="$runs/comparison.html" "${all[@]}"
