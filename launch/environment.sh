# Sourced by the other scripts of this folder: makes .venv with the locked packages and this project, and activates it.
#
#     PYTHON=python3.12 source launch/environment.sh
#
# Installs nothing when .venv already holds what launch/requirements.txt and pyproject.toml ask for. The packages are
# installed with uv, which is much faster than pip; uv does not read pip's configuration, so pip's indexes, folders of
# wheels, certificate and timeout are passed on to it. Nothing is installed outside .venv.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

environment_fail() {
    echo "error: $*" >&2
    exit 1
}

# Prints uv's options for pip's settings, a line each, and first the variables that have no option, as NAME=value.
uv_settings_from_pip() {
    .venv/bin/python - <<'PYTHON'
import ast
import os
import subprocess
import sys

settings = {}
listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
# pip's order of precedence is the order of the lines: files first, then the environment. In a file, [install] is
# more special than [global].
for scope in ("global", "install", ":env:"):
    for line in listing.stdout.splitlines():
        name, _, value = line.partition("=")
        if name.startswith(f"{scope}."):
            settings[name.removeprefix(f"{scope}.")] = str(ast.literal_eval(value))

variables = {"cert": "SSL_CERT_FILE", "default-timeout": "UV_HTTP_TIMEOUT", "timeout": "UV_HTTP_TIMEOUT"}
for name, variable in variables.items():
    if name in settings and variable not in os.environ:
        print(f"{variable}={settings[name]}")
if settings.get("no-index", "false").lower() in ("1", "true", "yes", "on"):
    print("--no-index")
options = {
    "index-url": "--index-url",
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "trusted-host": "--allow-insecure-host",
}
for name, option in options.items():
    for value in settings.get(name, "").split():
        print(f"{option}={value}")
PYTHON
}

uv_from_pip_settings() {
    local settings=() line
    # pip weighs all indexes alike; uv by default stops at the first that knows a package.
    local options=(--index-strategy unsafe-best-match)
    while IFS= read -r line; do
        case "$line" in
            --*) options+=("$line") ;;
            *) settings+=("$line") ;;
        esac
    done < <(uv_settings_from_pip)
    local verb=("$1" "$2")
    shift 2
    env ${settings[@]+"${settings[@]}"} .venv/bin/python -m uv "${verb[@]}" --quiet "${options[@]}" "$@"
}

environment_digest() {
    "$1" - launch/requirements.txt pyproject.toml launch/environment.sh <<'PYTHON'
import hashlib
import sys

digest = hashlib.sha256(sys.version.encode())
for path in sys.argv[1:]:
    digest.update(open(path, "rb").read())
print(digest.hexdigest())
PYTHON
}

environment_create() {
    local python="${PYTHON:-python3}"
    command -v "$python" >/dev/null || environment_fail "$python not found; set PYTHON to a Python 3.11 or 3.12"
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' ||
        environment_fail "$("$python" --version) is not supported; set PYTHON to a Python 3.11 or 3.12"
    echo "environment: creating .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv ||
        environment_fail "$python cannot create a virtual environment (on Debian: apt-get install python3-venv)"
}

environment_install() {
    echo "environment: installing launch/requirements.txt into .venv"
    .venv/bin/python -m pip install -qq --disable-pip-version-check "uv==0.13.9" ||
        environment_fail "pip could not install uv; are the package index and pip's configuration in order?"
    uv_from_pip_settings pip install --python .venv/bin/python --requirement launch/requirements.txt ||
        environment_fail "the packages of launch/requirements.txt could not be installed"
    uv_from_pip_settings pip install --python .venv/bin/python --no-deps --no-build-isolation --editable . ||
        environment_fail "the project itself could not be installed"
}

environment_prepare() {
    local digest
    # A .venv that was moved or whose Python is gone cannot run; a half-made one has no pip.
    .venv/bin/python -m pip --version >/dev/null 2>&1 || environment_create
    digest="$(environment_digest .venv/bin/python)"
    if [[ "$(cat .venv/environment.sha256 2>/dev/null)" != "$digest" ]]; then
        local begin=$SECONDS
        environment_install
        echo "$digest" >.venv/environment.sha256
        echo "environment: ready after $((SECONDS - begin)) s"
    fi
    export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
    # Where this is set, each of the many processes compiles torch's and torchtitan's sources anew: half of its start.
    unset PYTHONDONTWRITEBYTECODE
}

environment_prepare
