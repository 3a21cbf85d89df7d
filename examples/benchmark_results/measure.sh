#!/bin/bash
# Everything that is to be known of a GPU, what matters most first:
#
#     bash examples/benchmark_results/measure.sh CHIP [NAME...]
#
# CHIP is what its files are called (h100); NAMEs are those of the parts below, by default all of them. A part that takes
# longer than SECONDS_EACH (900) is ended, one that fails is told, and the next one begins; what is measured is written
# as it is measured. RESULTS is another folder for the files than this one, PYTHON another interpreter, DRY=1 prints the
# commands. For the comparison with `spidr`: pip install spidr, before.
set -u
if [ -n "${RESULTS:-}" ]; then
  RESULTS=$(realpath -m "$RESULTS")
  mkdir -p "$RESULTS" || exit
fi
cd "$(dirname "$0")/../.." || exit
chip=${1:?the name of the chip, h100 say}
shift
results=${RESULTS:-examples/benchmark_results}/$chip
chosen=("$@")
names=(parity step profile tests parity-all modules frozen lengths compile-cold compile-warm inference curves)
for name in "${chosen[@]}"; do
  if [[ " ${names[*]} " != *" $name "* ]]; then
    echo "error: $name is none of ${names[*]}" >&2
    exit 2
  fi
done
failed=()

part() { # NAME COMMAND...
  local name=$1
  shift
  if [ ${#chosen[@]} -gt 0 ] && [[ " ${chosen[*]} " != *" $name "* ]]; then return; fi
  if [ -n "${DRY:-}" ]; then
    echo "$name: $*"
    return
  fi
  echo "== $name, $(date +%T)"
  timeout --signal=INT --kill-after=10 "${SECONDS_EACH:-900}" env "PYTHONUNBUFFERED=1" "$@"
  local status=$?
  if [ $status -ne 0 ]; then
    echo "== $name ended with status $status"
    failed+=("$name")
  fi
}
run() { # NAME COMMAND-OF-EXAMPLES OPTIONS...
  local name=$1 command=$2
  shift 2
  part "$name" "${PYTHON:-python}" "examples/$command.py" "$@" --json "$results-$name.json"
}

train() { # FOLDER OPTIONS...
  local folder=$1
  shift
  part curves "${PYTHON:-python}" examples/pretrain.py --config examples/configs/demo.toml --optimizer.max_steps 500 \
    --run.log_interval 10 --output-dir "$scratch/$folder" "$@"
}

run parity check_parity tests/fixtures/parity/spidr-tiny --forms plain kernels
run step benchmark_cuda --parts step
run profile benchmark_cuda --parts profile
part tests "${PYTHON:-python}" -m pytest tests/test_kernels.py tests/test_device_step.py tests/pretraining/test_updates.py \
  -m "slow or not slow"
run parity-all check_parity
run modules benchmark_cuda --parts modules kernels
run frozen benchmark_cuda --frozen --parts step
run lengths benchmark_cuda --parts step --new-lengths
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export TORCHINDUCTOR_CACHE_DIR=$scratch/compiled # of which the second start finds what the first one leaves
run compile-cold benchmark_cuda --parts compile
run compile-warm benchmark_cuda --parts compile
unset TORCHINDUCTOR_CACHE_DIR
run inference benchmark --size base --device cuda --batch 16 --seconds 14.8 --dtype bfloat16
# Two runs that differ in nothing but the order of the audio say how far apart the third may be.
train other --run.kernels false --run.compile false --optimizer.dtype float32 --data.random_seed 1
train plain --run.kernels false --run.compile false --optimizer.dtype float32
train fast --optimizer.dtype bfloat16
for one in other fast; do
  part curves "${PYTHON:-python}" examples/compare_runs.py "$scratch/$one/metrics.jsonl" "$scratch/plain/metrics.jsonl"
done

if [ ${#failed[@]} -gt 0 ]; then
  echo "== not done: ${failed[*]}"
  exit 1
fi
