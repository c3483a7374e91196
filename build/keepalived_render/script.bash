#!/bin/bash
# Parameters: KEEPALIVED LIBRARY INTERFACE SCRIPTS
render() {
    apply_overlay
    lay 644 "$FILES/check.json" /.keepalived-check/check.json
    lay 644 "$FILES/check.conf" /.keepalived-check/check.conf
    in_tree env PYTHONDONTWRITEBYTECODE=1 python3 -I "/$LIBRARY/render.py" "/$LIBRARY/keepalived.conf.j2" \
        /.keepalived-check/check.json >"$WORK/rendered"
    cmp "$FILES/check.conf" "$WORK/rendered" ||
        fail "the image's Jinja2 fills keepalived.conf.j2 differently" "keep to what both versions of Jinja2 do"
    # keepalived looks at the interfaces it finds: its network namespace gets the one it asks for.
    # shellcheck disable=SC2016  # expanded by the inner shell
    in_tree --capability NET_ADMIN sh -euc '
        ip link add "$1" type veth || ip link add "$1" type bridge || ip link add "$1" type dummy
        ip link set "$1" up
        keepalived --config-test --use-file=/.keepalived-check/check.conf
    ' sh "$INTERFACE" 2>"$WORK/report" || {
        cat "$WORK/report" >&2
        fail "keepalived refuses its file: $(tail -n 1 "$WORK/report")" "correct vrrp in the image definition"
    }
    rm -r "$ROOT/.keepalived-check"
    for script in "${SCRIPTS[@]}"; do
        [ -x "$ROOT$script" ] || note "$script is not in the image: it must be there when keepalived starts"
    done
}

if [ -n "$KEEPALIVED" ]; then render; else note "this image has no keepalived"; fi
