#!/usr/bin/env bash
# Labels the pairs of a run in several jobs of a Slurm cluster, a share in each, and joins the labels.
#
#     bash label.sh RECIPE RUN SHARES [options of sbatch, such as --gpus=1 --time=4:00:00]
#
# submits a job that makes the pairs in the folder RUN, an array of SHARES jobs that label, each in a copy of RUN below
# RUN.shares, and one that joins their labels and makes the preferences. After a failure, submit the same again: what
# is labeled stays labeled. Then `trl-rlaif run RECIPE --resume --output RUN` goes on.
#
# All jobs need RUN on a file system that they share, and the environment that trl-rlaif is installed in. Name the type of
# the judge's weights (dtype), since the machines may differ; RECIPE and RUN may not begin with two dashes.
#SBATCH --requeue
set -euo pipefail

if [[ ${1:-} != --* ]]; then
    recipe=${1:?RECIPE is missing} run=${2:?RUN is missing} shares=${3:?SHARES is missing}
    shift 3
    submit() {
        local id
        id=$(sbatch --parsable --kill-on-invalid-dep=yes "$@" "$recipe" "$run" "$shares") || return
        echo "${id%%;*}"
    }
    pairs=$(submit --job-name=rlaif-pairs "$@" "$0" --pairs)
    labels=$(submit --job-name=rlaif-label --dependency="afterok:$pairs" --array="1-$shares" "$@" "$0" --share)
    joined=$(submit --job-name=rlaif-join --dependency="afterok:$labels" "$@" "$0" --join)
    echo "Jobs: $pairs (pairs), $labels (labels, $shares shares), $joined (join)."
    exit
fi

job=$1 recipe=$2 run=$3 shares=$4
label() { srun trl-rlaif run "$recipe" --resume --only label "$@"; }

case $job in
--pairs)
    stages=$(trl-rlaif check "$recipe" | sed -n 's/.*Stages: \(.*\), label.*/\1/p' | tr -d ' ')
    srun trl-rlaif run "$recipe" --resume --only "${stages:?the recipe labels nothing}" --output "$run"
    ;;
--share)
    share=$run.shares/$SLURM_ARRAY_TASK_ID-of-$shares
    if [[ ! -d $share ]]; then # whole, or not at all
        mkdir -p "$run.shares/.copying"
        rm -rf "$run.shares/.copying/$SLURM_ARRAY_TASK_ID"
        cp -R "$run" "$run.shares/.copying/$SLURM_ARRAY_TASK_ID"
        mv "$run.shares/.copying/$SLURM_ARRAY_TASK_ID" "$share"
    fi
    label --output "$share" --shard "$SLURM_ARRAY_TASK_ID/$shares"
    ;;
--join)
    if compgen -G "$run.shares/*/labels.jsonl" >/dev/null; then
        # The run's own first: they stay, and of equal labels one counts.
        touch "$run/labels.jsonl"
        cat "$run/labels.jsonl" "$run.shares"/*/labels.jsonl >"$run/.labels.joining"
        mv "$run/.labels.joining" "$run/labels.jsonl"
    fi
    label --output "$run"
    rm -rf "$run.shares"
    ;;
esac
