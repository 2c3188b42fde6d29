#!/usr/bin/env bash
# Build the image of one environment with what this machine has, unless it is there already. `make image` calls this.
#
#   ACCELERATOR=cpu|cuda     which target and lock (default cpu)
#   BUILDER=docker|podman|buildah|apptainer     default: the first of these that works
#   BASE=…                   base image instead of the definition's; BOOTSTRAP=localimage and the like for Apptainer
#   WHEELS=folder            wheels of the lock (pip download --no-deps -r LOCK -d folder): nothing is downloaded then
#   IMAGES=folder            where Apptainer images go (default containers/images)
#   MKSQUASHFS_ARGS=…        compression of an Apptainer image, e.g. "-comp zstd -Xcompression-level 3"
#   TORCH_INDEX=…            where CPU builds of torch are, when pip's own sources have none
#
# pip's index, time limits, certificates and the proxies are taken from this machine's environment and pip settings. They
# are mounted for the time of the build; neither the repository nor the image gets them.
set -euo pipefail
umask 022
here=$(cd "$(dirname "$0")" && pwd)
accelerator=${ACCELERATOR:-cpu}
lock=$here/requirements/$accelerator.txt
images=${IMAGES:-$here/images}
[ -f "$lock" ] || { echo "error: there is no lock $lock; ACCELERATOR is cpu or cuda" >&2; exit 2; }

# the same digest as image_name() in ziprc/workflow/container.py
digest() { cat "$1" "$here/install.sh" "$here/check.py" "$lock" | sha256sum | cut -c 1-12; }

works() {
    case $1 in
    docker | podman) command -v "$1" > /dev/null && "$1" info > /dev/null 2>&1 ;;
    *) command -v "$1" > /dev/null ;;
    esac
}

choose_builder() {
    local builder found=()
    if [ -n "${BUILDER:-}" ]; then
        case $BUILDER in
        docker | podman | buildah | apptainer) ;;
        *) echo "error: BUILDER=$BUILDER is none of docker, podman, buildah, apptainer" >&2; exit 2 ;;
        esac
        works "$BUILDER" || { echo "error: BUILDER=$BUILDER is not installed, or does not answer (try: $BUILDER info)" >&2; exit 2; }
        echo "$BUILDER"
        return
    fi
    for builder in docker podman buildah apptainer; do ! works "$builder" || found+=("$builder"); done
    if [ ${#found[@]} = 0 ]; then
        echo "error: nothing here can build an image. Install Apptainer 1.2 or newer (https://apptainer.org; it also runs" >&2
        echo "the workflow: make all CONTAINER=1), or Docker, Podman or Buildah, then run make image again." >&2
        exit 2
    fi
    [ ${#found[@]} = 1 ] || echo "builders found: ${found[*]}; taking ${found[0]}, name another with BUILDER=…" >&2
    echo "${found[0]}"
}

# settings of this machine that the build needs, in a folder that only this user reads and that goes when the build ends
write_settings() {
    local name value
    mkdir -p "$given/settings" "$given/wheels"
    for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_TRUSTED_HOST PIP_DEFAULT_TIMEOUT PIP_RETRIES \
        http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
        value=${!name:-}
        if [ -z "$value" ] && [[ $name = PIP_* ]]; then
            value=$(pip_setting "$name")
        fi
        case $value in
        '') ;;
        *file:* | /*) echo "note: $name names a folder of this machine, which a build can't read; use WHEELS=…" >&2 ;;
        *) printf '%s=%q\n' "$name" "$value" ;;
        esac
    done > "$given/settings/pip"
    value=${PIP_CERT:-$(pip_setting PIP_CERT)}
    value=${value:-${SSL_CERT_FILE:-}}
    [ ! -f "$value" ] || cp "$value" "$given/settings/ca.crt"
}

pip_setting() {
    local key=${1#PIP_}
    key=${key,,}
    python3 -m pip config get "global.${key//_/-}" 2> /dev/null || true
}

build_docker_like() {
    local tag=ziprc:$accelerator-$(digest "$here/Dockerfile") options=()
    exists() { if [ "$builder" = buildah ]; then buildah inspect --type image "$1"; else "$builder" image inspect "$1"; fi; }
    if exists "$tag" > /dev/null 2>&1; then
        echo "image: $tag is there already"
    else
        [ -z "${BASE:-}" ] || options+=(--build-arg "BASE_${accelerator^^}=$BASE")
        [ -z "${TORCH_INDEX:-}" ] || options+=(--build-arg "TORCH_INDEX=$TORCH_INDEX")
        DOCKER_BUILDKIT=1 "$builder" build --target "$accelerator" --tag "$tag" "${options[@]}" \
            --build-context "wheels=$wheels" --build-context "settings=$given/settings" \
            --file "$here/Dockerfile" "$here"
        echo "image: built $tag with $builder"
    fi
    echo "use it (containers/README.md): $builder run --rm -v \"\$PWD\":\"\$PWD\" -w \"\$PWD\" -e PYTHONPATH=\"\$PWD\" $tag python -m ziprc --help"
}

build_apptainer() {
    local target=$images/ziprc-$accelerator-$(digest "$here/ziprc.def").sif options=()
    if [ -f "$target" ]; then
        echo "image: $target is there already"
    else
        mkdir -p "$images"
        options+=(--build-arg "ACCELERATOR=$accelerator")
        [ "$accelerator" = cpu ] || options+=(--build-arg "BASE=${BASE_CUDA:-nvidia/cuda:13.0.1-devel-ubuntu24.04}")
        [ -z "${BASE:-}" ] || options+=(--build-arg "BASE=$BASE")
        [ -z "${BOOTSTRAP:-}" ] || options+=(--build-arg "BOOTSTRAP=$BOOTSTRAP")
        [ -z "${TORCH_INDEX:-}" ] || options+=(--build-arg "TORCH_INDEX=$TORCH_INDEX")
        [ -z "${MKSQUASHFS_ARGS:-}" ] || options+=(--mksquashfs-args "$MKSQUASHFS_ARGS")
        rm -f "$target.partial"
        (cd "$here" && apptainer build "${options[@]}" --bind "$given/settings:/run/ziprc-build/settings:ro" \
            --bind "$wheels:/run/ziprc-build/wheels:ro" "$target.partial" ziprc.def)
        mv "$target.partial" "$target"
        echo "image: built $target with Apptainer"
    fi
    echo "use it: make all CONTAINER=1$([ "$images" = "$here/images" ] || echo " (here: CONTAINER=$target)")"
}

builder=$(choose_builder)
given=$(mktemp -d)
trap 'rm -rf "$given"' EXIT
write_settings
wheels=$(cd "${WHEELS:-$given/wheels}" && pwd)
if [ "$builder" = apptainer ]; then build_apptainer; else build_docker_like; fi
