#!/usr/bin/env bash
# How much should a synthetic gradient count, and does either interface learn? Mode dni on the embedded corpus: the neuron-wise
# DNI for three values of alpha, the layer-wise one for 0.1, three seeds each. With alpha 0 the DNI only watches: BPTT.
# Writes experiments/logs/alpha.csv; about 15 minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
runs="$(mktemp -d)"
trap 'rm -rf "$runs"' EXIT
one() {
  out="$1/$2-$3-$4"
  test_ppl="$(OMP_NUM_THREADS=1 python train.py --mode dni --dni "$2" --dni-alpha "$3" --seed "$4" --out "$out" | tail -n 1 | cut -d' ' -f3)"
  echo "$2,$3,$4,$(tail -n 1 "$out/log.csv" | cut -d, -f6-8),$test_ppl"
}
export -f one
printf '%s\n' {"neuron 0","neuron 0.1","neuron 1","layer 0.1"}" "{42,43,44} |
  xargs -P 2 -L 1 bash -c 'one "$0" "$1" "$2" "$3"' "$runs" | sort > "$runs/rows"
{ echo "dni,alpha,seed,valid_perplexity,dni_cosine,dni_r2,test_perplexity"; cat "$runs/rows"; } | tee experiments/logs/alpha.csv
