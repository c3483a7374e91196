#!/bin/bash
# Parameters: PASSWORD
"$PYTHON" -I "$FILES/seal.py" "$ROOT" "$FILES/kept.json" "$SECRETS/$PASSWORD" 2>"$WORK/left" || {
    cat "$WORK/left" >&2
    fail "seal: $(head -n 1 "$WORK/left")" "take it out of the overlay, or correct the step that leaves it"
}
