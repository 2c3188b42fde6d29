#!/bin/sh
# What both image definitions run: Python, and the lock's packages in /opt/venv. No sources of this project: they are
# mounted when the image is used.
#
#   install.sh cpu|cuda LOCK
#
# Found at /run/ziprc-build when containers/build.sh starts the build, and no part of the image:
#   wheels/        wheels of the lock; when there are any, nothing is downloaded (but by apt, in a base without Python)
#   settings/pip   the building machine's pip settings, as shell assignments; settings/ca.crt its certificates
set -eu
accelerator=$1 lock=$2
given=/run/ziprc-build
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

if [ -s "$given/settings/pip" ]; then
    set -a
    . "$given/settings/pip"
    set +a
fi
[ ! -s "$given/settings/ca.crt" ] || export PIP_CERT="$given/settings/ca.crt"
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_USER || true
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
if ls "$given"/wheels/*.whl > /dev/null 2>&1; then
    export PIP_NO_INDEX=1 PIP_FIND_LINKS="$given/wheels" PIP_CONFIG_FILE=/dev/null
fi

# vLLM's CPU kernels link to libnuma, which no wheel brings; flash-attn and triton compile, which takes a C++ compiler and
# Python's headers
wanted=
python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null ||
    wanted="python3 python3-venv ca-certificates"
if [ "$accelerator" = cpu ]; then
    python3 -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2> /dev/null || wanted="$wanted libnuma1"
else
    wanted="$wanted python3-dev g++"
fi
if [ -n "$wanted" ]; then
    apt-get update -q
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $wanted
    rm -rf /var/lib/apt/lists/*
fi

python3 -m venv /opt/venv
pip() { /opt/venv/bin/python -m pip "$@"; }
work=$(mktemp -d)
# compiling to bytecode is done at once for all, below, on every core
if [ "$accelerator" = cpu ]; then
    grep '^torch==' "$lock" > "$work/torch.txt"
    pip install --quiet --no-deps --no-compile -r "$work/torch.txt" ||
        pip install --quiet --no-deps --no-compile --index-url "$torch_index" -r "$work/torch.txt"
    pip install --quiet --no-deps --no-compile -r "$lock"
else
    grep -v '^flash-attn' "$lock" > "$work/lock.txt"
    grep '^flash-attn' "$lock" > "$work/flash.txt"
    pip install --quiet --no-deps --no-compile -r "$work/lock.txt"
    pip install --quiet --no-deps --no-compile --no-build-isolation -r "$work/flash.txt"
fi
rm -rf "$work"
/opt/venv/bin/python -m compileall -q -j 0 /opt/venv/lib || true # some packages ship files for other Python versions
