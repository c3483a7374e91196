#!/bin/bash
set -Eeuo pipefail
shopt -s inherit_errexit
umask 022
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export LC_ALL=C.UTF-8 TZ=UTC DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true HOME=/root
trap 'tell error "$?" "$BASH_COMMAND"' ERR

# Lines for the builder go to descriptor 3; everything else is log.
tell() {
    local IFS=$'\t' line
    line="$*"
    printf '%s\n' "${line//$'\n'/ }" >&3
}

# progress LABEL DONE TOTAL
progress() { tell progress "$1" "$2" "$3"; }

# note TEXT: a line for the user
note() { tell note "$1"; }

# fail MESSAGE [HINT]
fail() {
    trap - ERR
    tell fail "$1" "${2:-}"
    exit 1
}

# apply_overlay: lay the overlay files of this step over the tree
apply_overlay() {
    "$PYTHON" -I "$FILES/apply_overlay.py" "$ROOT" "$FILES/tree" "$FILES/table.json" 2>"$WORK/refused" ||
        fail "$(cat "$WORK/refused")" "change the overlay so that it fits the tree"
}

# in_tree [--fd N]... [--capability NAME]... COMMAND [ARGUMENT...]: run a command in the tree, behind the fence
# that build/agent/enter.py describes
in_tree() { "$PYTHON" -I -S -B "$ENTER" "$ROOT" "$@" </dev/null; }

# lay MODE FILE PATH: put a text of the step into the tree. The tree's programs do it: links that lie in the way
# lead no further than its root.
lay() {
    # shellcheck disable=SC2016  # expanded by the inner shell
    in_tree sh -euc '
        mkdir -p "${3%/*}"
        rm -f "$3"
        printf "%s\n" "$2" >"$3"
        chmod "$1" "$3"
    ' sh "$1" "$(cat "$2")" "$3"
}
