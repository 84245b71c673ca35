# Sourced by scripts/rcpo and scripts/test: makes, renews and repairs the virtual environment.
#
# RCPO_VENV         its folder            (default: .venv beside pyproject.toml)
# RCPO_PYTHON       the Python it is of   (default: python3 if it will do, else the newest of 3.13, 3.12, 3.11)
# RCPO_CONSTRAINTS  the pinned versions   (default: what it was made from; at first scripts/constraints.txt)

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$(realpath -ms -- "${RCPO_VENV:-$root/.venv}")
pins=$root/scripts/constraints.txt
constraints=$pins
# An environment made from other versions keeps to them until RCPO_CONSTRAINTS names yet others.
if [[ -r $venv/.rcpo-constraints ]]; then constraints=$(<"$venv/.rcpo-constraints"); fi
if [[ -n ${RCPO_CONSTRAINTS:-} ]]; then constraints=$(realpath -ms -- "$RCPO_CONSTRAINTS"); fi

say() { printf 'rcpo: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

# ensure_environment EXTRA: EXTRA is "" or "dev". Costs one sha256sum where nothing is to be done.
ensure_environment() {
    local wanted stamp=$venv/.rcpo-ready${1:+-$1}
    [[ -r $constraints ]] || die "cannot read the pinned versions in $constraints; name another file in RCPO_CONSTRAINTS"
    wanted=$(environment_hash)
    is_ready "$stamp" "$wanted" || (build_environment "$1" "$stamp" "$wanted")
}

# What the environment depends on: where it is, where the code is, what it asks for.
environment_hash() {
    { printf '%s\n' "$venv" "$root" && cat -- "$root/pyproject.toml" "$constraints"; } | sha256sum
}

# The stamp is written last, so it stands only on an environment that was finished.
is_ready() { [[ -r $1 && $(<"$1") == "$2" && -x $venv/bin/python && -x $venv/bin/rcpo ]]; }

# Runs in a subshell: its lock ends with it and with the pip it started, however they end.
build_environment() {
    local extra=$1 stamp=$2 wanted=$3 python
    local log=$venv/setup.log unfinished=$venv/.rcpo-unfinished fresh=
    python=$(find_python) || exit
    check_compiler "$python"
    refuse_foreign_folder "$unfinished"
    mkdir -p -- "$venv" || exit
    exec 9>"$venv/.rcpo-lock" || exit
    "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null || {
        say "another set-up of $venv is running; waiting for it"
        "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    }
    if is_ready "$stamp" "$wanted"; then return; fi
    [[ -e $unfinished ]] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 && fresh=yes
    : >"$unfinished"
    if [[ $fresh ]]; then
        rm -f -- "$venv"/.rcpo-ready*
        find "$venv" -mindepth 1 -maxdepth 1 ! -name '.rcpo-*' -exec rm -rf -- {} +
        say "making $venv with $("$python" --version); once only, a few minutes"
        logged "$python" -m venv "$venv"
    fi
    say "installing pip"
    logged "$venv/bin/python" -m pip install --upgrade -c "$constraints" pip
    say "installing rcpo${extra:+ with its $extra tools} and the pinned versions of what it needs"
    logged "$venv/bin/python" -m pip install -c "$constraints" --build-constraint "$constraints" \
        -e "$root${extra:+[$extra]}"
    if [[ $constraints == "$pins" ]]; then
        rm -f -- "$venv/.rcpo-constraints"
    else
        printf '%s\n' "$constraints" >"$venv/.rcpo-constraints"
    fi
    rm -f -- "$unfinished"
    # What has the extra's packages has the plain one's too.
    for stamp in "$venv/.rcpo-ready" "$stamp"; do
        printf '%s\n' "$wanted" >"$stamp.new" && mv -- "$stamp.new" "$stamp"
    done
    say "ready"
}

# The interpreter itself, never one of an environment: a repair may be about to empty that one.
find_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11)
    [[ -z ${RCPO_PYTHON:-} ]] || candidates=("$RCPO_PYTHON")
    for candidate in "${candidates[@]}"; do
        "$candidate" -c 'import ensurepip, sys, venv
sys.exit(1) if sys.version_info < (3, 11) else print(sys._base_executable)' 2>/dev/null && return
    done
    die "no Python of 3.11 or newer with its venv module among: ${candidates[*]}." \
        "Install one (Debian, Ubuntu: python3 python3-venv python3-dev) or name one in RCPO_PYTHON."
}

# DeepSpeed compiles a small operator on its first use; better said now than in the middle of a run.
check_compiler() {
    local compiler=${CXX:-c++}
    command -v -- "${compiler%% *}" >/dev/null ||
        die "no C++ compiler: '$compiler' is not on the PATH, and DeepSpeed compiles an operator on its first use." \
            "Install one (Debian, Ubuntu: g++) or name one in CXX."
    "$1" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
        die "$1 has no header files, which DeepSpeed's operator is compiled with." \
            "Install them (Debian, Ubuntu: python3-dev) or name another Python in RCPO_PYTHON."
}

# A repair empties the folder: never one that is not a virtual environment.
refuse_foreign_folder() {
    if [[ ! -e $venv || -e $venv/pyvenv.cfg || -e $1 || -e $venv/.rcpo-lock ]]; then return; fi
    [[ -d $venv && -z $(ls -A -- "$venv") ]] ||
        die "$venv is there and is no virtual environment; remove it, or name another folder in RCPO_VENV."
}

# Runs a command with its output in the log; shows the log's end where the command fails. A failed renewal is
# rolled back by pip, so that the environment it found stays and is no ruin to be cleared away.
logged() {
    "$@" >>"$log" 2>&1 && return
    [[ $fresh ]] || rm -f -- "$unfinished"
    tail -n 25 -- "$log" >&2
    die "set-up failed in: $*. The whole log is $log; the next call tries again."
}
