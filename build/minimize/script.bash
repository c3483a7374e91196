#!/bin/bash
# Parameters: MINIMIZE JRE DESKTOP
minimize() {
    if [ -n "$JRE" ]; then
        libraries="$("$PYTHON" -I "$FILES/closure.py" "$ROOT" "$JRE" "$DESKTOP")"
        [ -z "$libraries" ] ||
            fail "the Java runtime brought a desktop library: ${libraries%%$'\n'*}" "set jre to a headless package"
    fi

    # Some packages only recommend what a plug-in of theirs needs: a gap here is for the log.
    "$PYTHON" -I "$FILES/elf.py" check "$ROOT" "$WORK/needed" || true

    "$PYTHON" -I "$FILES/minimize.py" "$ROOT" >"$WORK/saved"
    while IFS=$'\t' read -r rule count bytes; do
        if [ "$count" -eq 0 ]; then continue; fi
        note "$(printf '%-16s %8s in %6d files' "$rule" "$(numfmt --to=iec "$bytes")" "$count")"
    done <"$WORK/saved"

    # What still runs is tried while what still links is looked at.
    runs() {
        if [ -e "$ROOT/usr/bin/python3" ]; then
            in_tree python3 -c 'import ctypes, hashlib, json, ssl, subprocess'
        fi
        if [ -e "$ROOT/usr/bin/java" ] || [ -L "$ROOT/usr/bin/java" ]; then in_tree java -version; fi
    }
    runs &
    trying=$!
    gone="$("$PYTHON" -I "$FILES/elf.py" recheck "$ROOT" "$WORK/needed")" ||
        fail "minimize took what programs need: ${gone%%$'\n'*}" "correct build/minimize/minimize.py"
    audit="$(in_tree dpkg --audit)"
    [ -z "$audit" ] ||
        fail "dpkg finds packages half installed: ${audit%%$'\n'*}" "read the log of this step"
    wait "$trying"
}

if [ -n "$MINIMIZE" ]; then minimize; else note "MINIMIZE is off: nothing is taken out"; fi
